"""`check`: what it measures and leaves out of users' models, where it fails, and what it says of the package."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from commands import Capture, Patch
from strategies import OPTIONS, build
from torch import nn
from trees import LINE, ROOT, hatch_build

import x_transformers
from x_transformers import Decoder, TransformerWrapper
from x_transformers import free_transformer as free_transformer
from x_transformers import x_transformers as upstream
from x_transformers.xpos import build_record, check
from x_transformers.xpos.checker import OWN_MODELS, check_model, properties, runs, samples
from x_transformers.xpos.checker.models import Model
from x_transformers.xpos.checker.report import LeftOut, Report, Result, package
from x_transformers.xpos.checker.runs import Case, deviation

PROPERTIES = properties.ALL
KEYS = [prop.key for prop in PROPERTIES]
OF_ANY_MODEL = [prop.key for prop in PROPERTIES if prop.variant is None]


# models of users


def net(wrapper: dict[str, Any] | None = None, **layers: Any) -> TransformerWrapper:
    return build({**OPTIONS, **layers}, 0, torch.float32, **(wrapper or {}))


def decoder(**options: Any) -> Decoder:
    return net(**options).attn_layers


def compiled(model: nn.Module) -> nn.Module:
    model.compile(dynamic=False)
    return model


WRAPPED: dict[str, Any] = dict(max_seq_len=64, use_abs_pos_emb=False, attn_layers=decoder())
SIZES = dict(num_tokens=9, depth=1, max_seq_len=64)
BOTH = {f"{part}_{name}": size for part in ("enc", "dec") for name, size in SIZES.items()}
FREE = dict(dim=32, num_tokens=9, max_seq_len=64, dec_head_depth=1, dec_tail_depth=1, enc_depth=1)
# of models in public code with `rotary_xpos`, which are larger
ALIBI: dict[str, Any] = dict(alibi_pos_bias=True, attn_flash=True, attn_one_kv_head=True, attn_qk_norm=True)
RESIDUAL: dict[str, Any] = dict(residual_attn=True, attn_add_zero_kv=True, pre_norm=False, attn_qk_norm=True)

# what is left out, and words of the reason
CACHE = ("cached-whole", "cached-new", "chunked")
NO_MEMS = {"mems": "its max_mem_len is 0"}
PLAIN = "the same model with plain rotary does not have it either"
NO_CACHE = {**NO_MEMS, **dict.fromkeys(CACHE, "have no KV cache"), "padded": PLAIN}
NO_POS = {"shift": "does not pass pos to its layers", "padded": PLAIN}
SHIFTED = {**NO_CACHE, **dict.fromkeys(CACHE, "shift_tokens is wrong with a KV cache or mems in upstream")}
NO_SHIFT = {**NO_MEMS, "shift": PLAIN, "padded": PLAIN}
# and what is said of a model
SIZE = "Decoder: 2 attention layers, 2 heads of 8 dims, 6 rotated, scale base 32; 32 random"
WRAPPER = "TransformerWrapper of a Decoder"


@pytest.mark.parametrize(
    ("model", "said", "left_out"),
    [
        ("net()", f"TransformerWrapper of a {SIZE} token ids", NO_MEMS),
        ("decoder()", f"{SIZE} hidden states", {}),
        ("XLAutoregressiveWrapper(net(dict(max_mem_len=256)))", f"net, {WRAPPER}", {}),
        ("net(dict(max_mem_len=9))", WRAPPER, {}),
        ("XTransformer(dim=32, dec_rotary_xpos=True, **BOTH)", f"decoder.net, {WRAPPER}", NO_MEMS),
        ("free_transformer.FreeTransformer(dec_kwargs=dict(rotary_xpos=True), **FREE)", "decoder_tail, Decoder", {}),
        ("ContinuousTransformerWrapper(dim_in=5, dim_out=3, max_mem_len=20, **WRAPPED)", "Continuous", NO_POS),
        ("MultiInputTransformerWrapper(num_tokens=dict(a=10, b=20), **WRAPPED)", "Multi", {**NO_MEMS, **NO_POS}),
        ("net(dict(num_memory_tokens=3))", WRAPPER, NO_CACHE),
        ("net(dict(num_memory_tokens=2, memory_tokens_interspersed_every=5))", WRAPPER, NO_CACHE),
        ("decoder(shift_tokens=1)", "Decoder", {**SHIFTED, "mems": "shift_tokens is wrong"}),
        ("compiled(net(attn_laser=True, add_value_residual=True, shift_tokens=1))", WRAPPER, SHIFTED),
        ("torch.compile(AutoregressiveWrapper(net(**RESIDUAL)))", WRAPPER, NO_MEMS),
        ("net(**ALIBI)", WRAPPER, {**NO_MEMS, **dict.fromkeys(CACHE, PLAIN)}),
        ("net(attn_num_mem_kv=16, use_scalenorm=True, attn_flash=True, layer_dropout=0.1)", WRAPPER, NO_SHIFT),
        # of 32 positions no part has the 8 keys that a query chooses among
        ("net(cross_attend=True, attn_sparse_topk=8)", WRAPPER, {**NO_MEMS, "chunked": PLAIN}),
        # half: a copy in float64 that shared anything with it could not be called
        ("net(dict(tie_embedding=True)).half()", WRAPPER, NO_MEMS),
        ("net(use_adaptive_layernorm=True, use_adaptive_layerscale=True, dim_condition=6)", WRAPPER, NO_MEMS),
        ("net(dict(recycling=True))", "the Decoder alone, on hidden states, since the TransformerWrapper cannot", {}),
        ("net(dict(average_pool_embed=True))", "the model returns (2, 32) instead of (2, 32, dim)", {}),
        # a token attends to itself alone
        ("net(attn_max_attend_past=0)", "the output is the same without positions", NO_MEMS),
        ("net(disable_abs_pos_emb=False)", WRAPPER, {**NO_MEMS, "shift": "it has absolute positions as well"}),
    ],
)
def test_what_a_model_can_have_holds_and_the_rest_is_left_out(model: str, said: str, left_out: dict[str, str]) -> None:
    report = check(eval(model, {**vars(x_transformers), **globals()}), max_len=32)
    assert report.passed, str(report)
    assert said in " ".join(report.checked + report.notes)
    # of each stack of layers, if there are several
    stacks = ["decoder_head: ", "decoder_tail: "] if "FreeTransformer" in model else [""]
    keys = [at + key for at in stacks for key in OF_ANY_MODEL if key not in left_out]
    assert [each.key for each in report.results] == keys
    reasons = {each.key: each.reason for each in report.left_out}
    assert reasons.keys() == left_out.keys()
    assert [key for key in left_out if left_out[key] not in reasons[key]] == [], reasons


def test_a_dtype_is_cast_to_if_given_and_an_absolute_position_embedding_limits_the_length() -> None:
    layers = decoder(disable_abs_pos_emb=False, attn_flash=True)
    model = TransformerWrapper(num_tokens=9, max_seq_len=40, attn_layers=layers).bfloat16()
    for dtype in (None, torch.float16, torch.bfloat16, torch.float64):
        report = check(model, dtype=dtype)
        found = (report.passed, report.run["dtype"], report.run["max_len"])
        assert found == (True, str(dtype or torch.bfloat16)[6:], 40), str(report)


def test_neither_the_model_nor_the_random_state_is_touched(capsys: Capture) -> None:
    model = net(attn_num_mem_kv=2).train().requires_grad_(True)
    state, expected = torch.get_rng_state(), deepcopy(model.state_dict())
    assert check(model, dtype=torch.bfloat16, max_len=32).passed
    assert not any(capsys.readouterr())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


# what is wrong

ROTARY, LAYERS = (f"x_transformers.x_transformers.{name}.forward" for name in ("RotaryEmbedding", "AttentionLayers"))
_forward, _layers, _prefill = upstream.RotaryEmbedding.forward, upstream.AttentionLayers.forward, runs.prefill


def keys_before_the_queries_one_off(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    return _forward(self, t - (t < offset).long(), offset, seq_len)


def no_decay_before_the_center(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    freqs, scale = _forward(self, t, offset, seq_len)
    return freqs, scale.clamp(max=1)


def raises_with_mems(self: Any, *args: Any, mems: Any = None, **kwargs: Any) -> Any:
    if mems is not None:
        raise RuntimeError("no mems\ntoday")
    return _layers(self, *args, **kwargs)


def one_more(*args: Any, **kwargs: Any) -> Any:
    return _prefill(*args, **kwargs)[0] + 1, None


# five more than there should be, which the check is not told of
limit = Model.limit
FIVE_MORE = property(lambda self: limit.__get__(self) - 5)
DECODING = {*CACHE, "mems", "scores-cache"}
CHECKER = "x_transformers.xpos.checker"


@pytest.mark.parametrize(
    ("model", "place", "broken", "must_fail", "must_pass"),
    [
        (OWN_MODELS, ROTARY, keys_before_the_queries_one_off, DECODING, {"prefix", "scores"}),
        (OWN_MODELS, ROTARY, no_decay_before_the_center, {"prefix", "scores", *DECODING}, {"shift"}),
        # plain rotary has what fails here, so it is not left out as upstream's
        (net(), ROTARY, no_decay_before_the_center, {"prefix", *CACHE}, {"shift"}),
        (OWN_MODELS, LAYERS, raises_with_mems, {"mems"}, {*KEYS} - {"mems"}),
        # the check measures the one that users call
        (OWN_MODELS, f"{CHECKER}.runs.prefill", one_more, {"chunked"}, {"prefix", "mems"}),
        (net(), f"{CHECKER}.models.Model.limit", FIVE_MORE, {"range"}, {*OF_ANY_MODEL} - {"range"}),
        (net(**ALIBI), f"{CHECKER}.models.Model.limit", FIVE_MORE, {"range"}, {*OF_ANY_MODEL} - {"range"}),
    ],
)
def test_what_is_broken_fails_and_nothing_else(
    model: Any, place: str, broken: Any, must_fail: set[str], must_pass: set[str], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(place, broken)
    monkeypatch.setattr(properties, "ALL", [prop for prop in PROPERTIES if prop.key in must_fail | must_pass])
    failed = {each.key: each for each in check_model(model, max_len=64).failures}
    assert must_fail <= failed.keys()
    assert not must_pass & failed.keys()
    if broken is raises_with_mems:
        assert (failed["mems"].deviation, failed["mems"].error) == (None, "RuntimeError: no mems today")


def test_what_is_not_finite_never_passes() -> None:
    for value in (math.nan, math.inf):
        assert deviation(torch.tensor([value]), torch.tensor([value])) == math.inf
    assert not Result("key", "this", math.inf, 1.0, "").passed
    model = samples.build()
    model.layers.final_norm.register_forward_hook(lambda _module, _args, out: out * math.inf)
    with pytest.raises(ArithmeticError, match="not finite"):
        Case(model, model.text(1, 64)).tolerance("calls")


@torch.no_grad()
def test_own_models_hide_nothing() -> None:
    """No parameter is left at zero or one, attention is far from uniform, and the weights are the same each time."""
    model = samples.build(flash=False).module
    torch.testing.assert_close(model.state_dict(), samples.build(flash=True).module.state_dict(), rtol=0, atol=0)
    assert [name for name, parameter in model.named_parameters() if parameter.std() == 0] == []
    _, attention = model(torch.arange(64)[None], return_attn=True)
    assert all(layer[0, :, -1].max() > 8 / 64 for layer in attention)


# what it reports


def report(*results: Result) -> Report:
    run = {"device": "cpu", "dtype": "float32", "torch": "2", "factor": 4.0, "seconds": 1.0}
    lacked = [LeftOut(key, "this", "a reason that takes more than one line " * 4) for key in ("one", "other")]
    return Report(results, tuple(lacked), run, package(), ("what is checked " * 10,), ("a note " * 20,))


TABLE = """
pass       1.5e-03    2.5e-03  key: this
FAIL       5.0e-03    2.5e-03  key: this
                               7 to 7
FAIL           inf    2.5e-03  key: this
                               7 to 7
FAIL         error      error  key: this
                               7 to 7
"""


def test_table_and_json_show_the_same() -> None:
    rows = [(1.5e-3, 2.5e-3), (5e-3, 2.5e-3), (math.inf, 2.5e-3), (None, None)]
    results = [Result("key", "this", *numbers, "7 to 7") for numbers in rows]
    results += [Result(prop.key, prop.compared, 1e-5, 1e-4, "") for prop in PROPERTIES]
    found = report(*results)
    lines, fields = str(found).splitlines(), json.loads(found.to_json())
    assert max(map(len, lines[1:])) <= 100  # the first has the path
    assert {f"          {name}" for name in hatch_build.read_series(ROOT / LINE)} < {*lines}
    assert "left out  one, other: a reason" in str(found)
    assert TABLE in str(found)
    assert f"3 of {len(results)} properties FAIL" in lines[-1]
    assert (found.failures, fields["passed"]) == (tuple(results[1:4]), False)
    verdicts = [(row["deviation"], row["tolerance"], row["passed"]) for row in fields["results"]]
    assert verdicts[:4] == [(1.5e-3, 2.5e-3, True), (5e-3, 2.5e-3, False), (None, 2.5e-3, False), (None, None, False)]


@pytest.mark.parametrize(
    ("found", "passed", "said"),
    [
        ({}, True, "the files are as they were built.*all 1 properties hold"),
        ({"read_record": None}, True, "unknown build: the package has no record of it"),
        ({"modified_files": ("a.py",)}, False, "not as they were built: a.py.*hold; the package is MODIFIED since"),
    ],
)
def test_the_build_is_named(found: dict[str, Any], passed: bool, said: str, monkeypatch: Patch) -> None:
    for name, value in found.items():
        monkeypatch.setattr(build_record, name, Mock(return_value=value))
    named = report(Result("key", "this", 0.0, 1.0, ""))
    assert named.passed is passed
    assert re.search(said, str(named), re.S)
