"""`check(model)` and `check --model` on models that users bring: what is measured, left out and refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, Capture, Patch, no_decay_before_the_center, run
from strategies import randomize_
from torch import nn

import x_transformers
from x_transformers import Attention, Decoder, TransformerWrapper
from x_transformers import free_transformer as free_transformer
from x_transformers import x_transformers as upstream
from x_transformers.xpos import check
from x_transformers.xpos.checker import properties
from x_transformers.xpos.checker.models import Model

# those of any model; the others are of models that are built for the check
KEYS = [prop.key for prop in properties.ALL if prop.variant is None]


def decoder(**options: Any) -> Decoder:
    size: dict[str, Any] = dict(dim=32, depth=2, heads=2, attn_dim_head=16, rotary_xpos=True, verbose=False)
    return randomize_(Decoder(**{**size, **options}), 0)


def net(wrapper: dict[str, Any] | None = None, **layers: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    return TransformerWrapper(
        **{"num_tokens": 50, "max_seq_len": 256, **(wrapper or {})}, attn_layers=decoder(**layers)
    )


def compiled(model: nn.Module) -> nn.Module:
    model.compile(dynamic=False)
    return model


def without_attention(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, Attention):
            nn.init.zeros_(part.to_out.weight)
    return model


WRAPPED: dict[str, Any] = dict(max_seq_len=64, use_abs_pos_emb=False, attn_layers=decoder())
BOTH = {
    f"{part}_{name}": n for part in ("enc", "dec") for name, n in dict(num_tokens=9, depth=1, max_seq_len=64).items()
}
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
ABSOLUTE = {**NO_MEMS, "shift": "it has absolute positions as well"}
SHIFTED = {**NO_MEMS, **dict.fromkeys(CACHE, "shift_tokens is wrong with a KV cache or mems in upstream")}
SHIFTED["padded"] = PLAIN
NO_SHIFT = {**NO_MEMS, "shift": PLAIN, "padded": PLAIN}
# and what is said of a model
SIZE = "Decoder: 2 attention layers, 2 heads of 16 dims, 8 rotated, scale base 512; 32 random"
WRAPPER = "TransformerWrapper of a Decoder"
ALONE = "the Decoder alone, on hidden states, since the TransformerWrapper cannot be called"


@pytest.mark.parametrize(
    ("model", "said", "left_out"),
    [
        ("net()", f"TransformerWrapper of a {SIZE} token ids", NO_MEMS),
        ("decoder()", f"{SIZE} hidden states", {}),
        ("nn.ModuleDict(dict(a=nn.Linear(2, 2), language=net()))", f"language, {WRAPPER}", NO_MEMS),
        ("XLAutoregressiveWrapper(net(dict(max_mem_len=256)))", f"net, {WRAPPER}", {}),
        ("net(dict(max_mem_len=9))", WRAPPER, {}),
        ("XTransformer(dim=32, dec_rotary_xpos=True, **BOTH)", f"decoder.net, {WRAPPER}", NO_MEMS),
        ("free_transformer.FreeTransformer(dec_kwargs=dict(rotary_xpos=True), **FREE)", "decoder_tail, Decoder", {}),
        ("ContinuousTransformerWrapper(dim_in=5, dim_out=3, max_mem_len=20, **WRAPPED)", "Continuous", NO_POS),
        ("MultiInputTransformerWrapper(num_tokens=dict(a=10, b=20), **WRAPPED)", "Multi", {**NO_MEMS, **NO_POS}),
        ("net(dict(num_memory_tokens=3))", WRAPPER, NO_CACHE),
        ("net(dict(num_memory_tokens=2, memory_tokens_interspersed_every=5))", WRAPPER, NO_CACHE),
        ("net(disable_abs_pos_emb=False)", WRAPPER, ABSOLUTE),
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
        ("net(dict(recycling=True))", ALONE, {}),
        ("net(dict(average_pool_embed=True))", "the model returns (2, 50) instead of (2, 32, dim)", {}),
        ("without_attention(net())", "the output is the same without positions", NO_MEMS),
    ],
)
def test_what_a_model_can_have_holds_and_the_rest_is_left_out(model: str, said: str, left_out: dict[str, str]) -> None:
    report = check(eval(model, {**vars(x_transformers), **globals()}), max_len=32)
    assert report.passed, str(report)
    assert said in " ".join(report.checked + report.notes)
    # of each stack of layers, if there are several
    stacks = ["decoder_head: ", "decoder_tail: "] if "FreeTransformer" in model else [""]
    assert [each.key for each in report.results] == [at + key for at in stacks for key in KEYS if key not in left_out]
    reasons = {each.key: each.reason for each in report.left_out}
    assert reasons.keys() == left_out.keys()
    assert [key for key in left_out if left_out[key] not in reasons[key]] == [], reasons


def test_dtype_is_cast_to_only_if_given() -> None:
    model = net(attn_flash=True).bfloat16()
    for dtype in (None, torch.float16, torch.bfloat16, torch.float64):
        report = check(model, max_len=32, dtype=dtype)
        assert (report.passed, report.run["dtype"]) == (True, str(dtype or torch.bfloat16)[6:]), str(report)


def test_an_absolute_position_embedding_limits_the_length() -> None:
    report = check(net(dict(max_seq_len=40), disable_abs_pos_emb=False))
    assert (report.passed, report.run["max_len"]) == (True, 40)


def test_neither_the_model_nor_the_random_state_is_touched(capsys: Capture) -> None:
    model = net(attn_num_mem_kv=2).train()
    state, expected, path = torch.get_rng_state(), deepcopy(model.state_dict()), list(sys.path)
    assert check(model, dtype=torch.bfloat16, max_len=32).passed
    assert not any(capsys.readouterr())
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.path == path
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


# models that are wrong


def test_a_fault_of_xpos_is_not_taken_for_upstreams(monkeypatch: Patch) -> None:
    monkeypatch.setattr(upstream.RotaryEmbedding, "forward", no_decay_before_the_center)
    report = check(net(), max_len=32)
    assert {"prefix", *CACHE} <= {each.key for each in report.failures}
    assert [each.key for each in report.left_out] == ["mems"]


@pytest.mark.parametrize("options", [{}, ALIBI])
def test_a_model_without_the_limit_fails(options: dict[str, Any], monkeypatch: Patch) -> None:
    # five more than there should be, which the check is not told of
    limit = Model.limit
    monkeypatch.setattr(Model, "limit", property(lambda self: limit.__get__(self) - 5))
    assert [each.key for each in check(net(**options), max_len=64).failures] == ["range"]


# the command

TRAIN = """
from torch import nn
from x_transformers import *

def net(rotary_xpos=True, **options):
    layers = Decoder(dim=32, depth=1, heads=2, rotary_xpos=rotary_xpos, **options)
    return TransformerWrapper(num_tokens=50, max_seq_len=40, attn_layers=layers)

def with_argument(size): return net()
not_a_function = 7
class Builder: build = staticmethod(net)
def build_model(): return {model}
"""
MODEL, NET = "--model train:build_model", "net()"


@pytest.fixture
def train(tmp_path: Path, monkeypatch: Patch) -> Callable[[str], object]:
    """Writes the module `train`, of which build_model returns this; it is imported anew, as `python -m` would."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    return lambda model: (tmp_path / "train.py").write_text(TRAIN.format(model=model), encoding="utf-8")


def test_check_of_a_function(train: Callable[[str], object], capsys: Capture) -> None:
    train("1")
    status, out, _ = run(capsys, "--model", "train:Builder.build", *SHORT)
    assert (status, "checked   TransformerWrapper of a Decoder" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "model", "expected"),
    [
        ("no-such-command", NET, ["no-such-command", "check"]),
        ("--max 128", NET, ["--max"]),
        ("--dtype int8", NET, ["--dtype", "int8", "float32", "bfloat16"]),
        ("--max-len 100000 --dtype float16", NET, ["max_len is 100000", "from 32 to 4532", "range of float16"]),
        (f"{MODEL} --max-len 41", "net(disable_abs_pos_emb=False)", ["to 40, as its absolute position embedding"]),
        ("--device no-such", NET, ["device = 'no-such'"]),
        ("--device meta", NET, ["device = 'meta'"]),
        ("limits --scale-base nan", NET, ["scale_base is nan", "above 0"]),
        ("--model train", NET, ["MODULE:FACTORY", "train:build_model"]),
        ("--model train.py:build_model", NET, ["MODULE:FACTORY", "train:build_model"]),
        ("--model models/train:build_model", NET, ["MODULE:FACTORY", "train:build_model"]),
        ("--model nowhere:build_model", NET, ["importing nowhere failed", "No module named 'nowhere'"]),
        ("--model train:not_a_function", NET, ["'int' object is not callable"]),
        ("--model train:with_argument", NET, ["without arguments", "'size'"]),
        ("--model train:Builder.nothing", NET, ["has no attribute 'nothing'"]),
        (MODEL, "{}['dim']", ["KeyError: 'dim'", "train.py, line"]),
        (MODEL, "__import__('sys').exit(3)", ["SystemExit: 3", "train.py, line"]),
        (MODEL, "1\nraise SystemExit(1)", ["importing train failed: SystemExit: 1", "train.py, line"]),
        (MODEL, "(:", ["SyntaxError", "train.py, line"]),
        (MODEL, "{}", ["the model is a dict", "TransformerWrapper"]),
        (MODEL, "nn.Linear(2, 2)", ["Linear has no Decoder"]),
        (
            MODEL,
            "net(False, rotary_xpos_scale_base=64)",
            ["without rotary_xpos = True", "_scale_base alone does nothing"],
        ),
        (MODEL, "net(rotary_xpos_scale_base=0.1)", ["scale base of 0.1", "32"]),
        (MODEL, "net(attn_l2_distance=True)", ["AssertionError", "attn_l2_distance", "train.py, line"]),
        (MODEL, "net().to('meta')", ["meta device"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    arguments: str, model: str, expected: list[str], train: Callable[[str], object], capsys: Capture
) -> None:
    train(model)
    status, out, message = run(capsys, *arguments.split())
    assert (status, out, message.count("\n")) == (2, "", 1), message
    assert [text for text in expected if text not in message] == [], message
    assert "site-packages" not in message
    assert "(__init__.py" not in message
