"""The library and the command line on what users bring: their models, lengths and checkpoints."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import math
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PACKAGE, SHORT, Tool, failed, no_decay_before_the_center, process
from hypothesis import given
from hypothesis import strategies as st
from trees import BACKPORT, ROOT, patched_tree

import x_transformers
from x_transformers import Decoder, TransformerWrapper, xpos
from x_transformers import x_transformers as upstream
from x_transformers.xpos import check, fold_mem_kv_, limits
from x_transformers.xpos.checker import properties
from x_transformers.xpos.checker.models import Model
from x_transformers.xpos.limits import DTYPES

KEYS = [prop.key for prop in properties.ALL if prop.variant is None]

MODULE = """
import torch
from torch import nn
from x_transformers import *

SIZE = dict(dim=32, depth=2, heads=2, attn_dim_head=32, rotary_xpos=True, rotary_emb_dim=32)
if not OLD:
    SIZE.update(attn_dim_head=16, rotary_emb_dim=16, verbose=False)


def net(wrapper=None, **layers):
    torch.manual_seed(0)
    options = dict(num_tokens=50, max_seq_len=256, attn_layers=Decoder(**{**SIZE, **layers}))
    return TransformerWrapper(**{**options, **(wrapper or {})})


def layers(): return Decoder(**SIZE)
def plain(): return net()
def memory_keys(): return net(attn_num_mem_kv=3, attn_flash=True)
def with_argument(size): return net()
not_a_function = 7
class Builder: build = staticmethod(net)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, from which the module `train` is imported anew for each test."""
    monkeypatch.chdir(tmp_path)
    # where `python -m` finds modules first
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    write_model()
    return tmp_path


def write_model(expression: str = "net()", *, more: str = "", old: bool = False) -> None:
    """The module `train` in the current directory, with a function build_model that returns this."""
    code = f"OLD = {old}\n{MODULE}\n{more}\ndef build_model(): return {expression}\n"
    Path("train.py").write_text(code, encoding="utf-8")


def left_out(document: dict[str, Any]) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in document["left_out"]}


# the library


def test_the_public_names_are_four_and_import_nothing_of_the_checker(tmp_path: Path) -> None:
    code = (
        "import sys; from x_transformers.xpos import *; import x_transformers.xpos as xpos; "
        "limits(); print(xpos.__all__, [name for name in sys.modules if 'xpos.checker' in name])"
    )
    found = process(tmp_path, python=("-c", code))
    assert found.stdout == "['check', 'fold_mem_kv_', 'limits', 'prefill'] []\n", found.stderr


@pytest.mark.parametrize("name", xpos.__all__)
def test_examples_of_the_docstrings_run(name: str) -> None:
    function = getattr(xpos, name)
    (example,) = doctest.DocTestFinder().find(function, name, globs={name: function})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example).attempted >= 2
    assert runner.failures == 0
    documented = inspect.getdoc(function) or ""
    assert [word for word in ("Args:", "Returns:", "Raises:", "Example:") if word not in documented] == []
    assert [word for word in inspect.signature(function).parameters if f"{word}: " not in documented] == []


# check --model

MODEL = ("--model", "train:build_model")
NO_CACHE, NO_MEMS, NO_SHIFT = {"cached-whole", "cached-new", "chunked"}, {"mems"}, {"shift"}
DECODER = "Decoder: 2 attention layers, 2 heads of 16 dims, 16 rotated, scale base 512; 32 random"
ENCODER_DECODER = """dict(dim=32, dec_rotary_xpos=True, **{f"{part}_{name}": value for part in ("enc", "dec")
    for name, value in dict(num_tokens=20, depth=1, heads=2, max_seq_len=256).items()})"""


@pytest.mark.parametrize(
    ("model", "tested", "not_measured"),
    [
        ("net()", f"TransformerWrapper of a {DECODER} token ids", NO_MEMS),
        ("XLAutoregressiveWrapper(net(dict(max_mem_len=256)))", "net, TransformerWrapper", set()),
        ("layers()", f"{DECODER} hidden states", set()),
        (
            "ContinuousTransformerWrapper(dim_in=5, dim_out=3, max_seq_len=256, max_mem_len=20, attn_layers=layers())",
            "ContinuousTransformerWrapper of a Decoder",
            NO_SHIFT,
        ),
        ("nn.ModuleDict(dict(a=nn.Linear(2, 2), language=net()))", "language, TransformerWrapper", NO_MEMS),
        (f"XTransformer(**{ENCODER_DECODER})", "decoder.net, TransformerWrapper", NO_MEMS),
        ("net(dict(max_mem_len=9))", "TransformerWrapper", set()),
        ("net(dict(num_memory_tokens=3))", "TransformerWrapper", NO_CACHE | NO_MEMS),
        (
            "net(dict(num_memory_tokens=2, memory_tokens_interspersed_every=5))",
            "TransformerWrapper",
            NO_CACHE | NO_MEMS,
        ),
        ("net(attn_num_mem_kv=3)", "TransformerWrapper", NO_SHIFT | NO_MEMS),
        ("Decoder(**SIZE, shift_tokens=1)", "Decoder", NO_CACHE | NO_MEMS),
        ("net(alibi_pos_bias=True)", "TransformerWrapper", NO_CACHE | NO_MEMS),
        # of 32 positions no part has the 8 keys that a query chooses among
        ("net(attn_sparse_topk=8)", "TransformerWrapper", {"chunked"} | NO_MEMS),
        # half: a copy in float64 that shared anything with it could not be called
        ("net(dict(tie_embedding=True)).half()", "TransformerWrapper", NO_MEMS),
        (
            "net(dict(recycling=True))",
            "the Decoder alone, on hidden states, since the TransformerWrapper cannot be called",
            set(),
        ),
        ("net(dict(average_pool_embed=True))", "the model returns (2, 50) instead of (2, 32, dim)", set()),
        ("net(use_adaptive_layernorm=True, dim_condition=6)", "TransformerWrapper", NO_MEMS),
    ],
)
def test_what_a_model_can_have_holds_and_the_rest_is_left_out(
    model: str, tested: str, not_measured: set[str], here: Path, tool: Tool
) -> None:
    write_model(model)
    status, document = tool.check(*MODEL, *SHORT)
    assert status == 0, document["results"]
    assert document["passed"]
    assert tested in " ".join(document["checked"] + document["notes"])
    assert left_out(document).keys() == not_measured
    assert [result["key"] for result in document["results"]] == [key for key in KEYS if key not in not_measured]
    if "shift_tokens" in model:
        assert len(set(left_out(document).values())) == 1
        assert left_out(document)["chunked"].startswith("shift_tokens is wrong with a KV cache or mems in upstream")


def test_dtype_is_cast_to_only_if_given(here: Path, tool: Tool) -> None:
    write_model("net(attn_flash=True).bfloat16()")
    assert tool.check(*MODEL, *SHORT)[1]["run"]["dtype"] == "bfloat16"
    for dtype in ("float16", "bfloat16", "float64"):
        status, document = tool.check(*MODEL, *SHORT, "--dtype", dtype)
        assert (status, document["run"]["dtype"]) == (0, dtype)


def test_every_stack_of_a_model_is_tested(here: Path, tool: Tool) -> None:
    write_model("nn.ModuleList([net(), layers()])")
    status, document = tool.check(*MODEL, *SHORT)
    assert status == 0
    assert [line.partition(",")[0] for line in document["checked"]] == ["0", "1"]
    assert {result["key"].partition(": ")[0] for result in document["results"]} == {"0", "1"}


def test_an_absolute_position_embedding_limits_the_length(here: Path, tool: Tool) -> None:
    write_model("net(dict(max_seq_len=40), disable_abs_pos_emb=False)")
    status, document = tool.check(*MODEL)
    assert (status, document["run"]["max_len"]) == (0, 40)
    assert "absolute positions" in left_out(document)["shift"]
    assert "from 32 to 40, as its absolute position embedding" in tool.refusal(*MODEL, "--max-len", "41")


def test_table_fits_and_names_what_is_upstreams(here: Path, tool: Tool) -> None:
    status, out, _ = tool.run("--model", "train:memory_keys", *SHORT)
    assert status == 0, out
    assert max(len(line) for line in out.splitlines() if str(PACKAGE) not in line) <= 100
    assert "checked   TransformerWrapper of a Decoder" in out
    assert "left out  shift: the same model with plain rotary does not have it either" in out
    assert "all 6 properties hold" in out


def test_neither_the_model_nor_the_random_state_is_touched() -> None:
    model = with_memory_keys().train()
    state, expected, path = torch.get_rng_state(), deepcopy(model.state_dict()), list(sys.path)
    assert check(model, dtype=torch.bfloat16, max_len=32).passed
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.path == path
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_a_model_that_does_without_positions_is_noted(here: Path, tool: Tool) -> None:
    zero = "[nn.init.zeros_(value) for name, value in MODEL.named_parameters() if 'to_out' in name]"
    write_model("MODEL", more=f"MODEL = net()\n{zero}")
    status, document = tool.check(*MODEL, *SHORT)
    assert status == 0
    assert "the output is the same without positions" in document["notes"][0]


@pytest.mark.parametrize("name", ["MultiInputTransformerWrapper", "FreeTransformer"])
def test_other_wrappers(name: str) -> None:
    """Those that are not among the models above; `check` takes each from Python."""
    size: dict[str, Any] = dict(dim=32, heads=2)
    if name == "FreeTransformer":
        depths = dict(dec_head_depth=1, dec_tail_depth=1, enc_depth=1)
        options = dict(num_tokens=20, max_seq_len=64, dec_kwargs=dict(rotary_xpos=True))
        model = importlib.import_module("x_transformers.free_transformer").FreeTransformer(**size, **depths, **options)
    else:
        layers = Decoder(**size, depth=1, rotary_xpos=True)
        options = dict(num_tokens=dict(a=10, b=20), max_seq_len=64, use_abs_pos_emb=False)
        model = getattr(x_transformers, name)(**options, attn_layers=layers)
    report = check(model, max_len=32)
    assert report.passed, str(report)
    assert report.notes == ()
    names = (
        ["decoder_head, Decoder", "decoder_tail, Decoder"] if name == "FreeTransformer" else [f"{name} of a Decoder"]
    )
    assert [line.partition(":")[0] for line in report.checked] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dtype=torch.int8), "dtype is torch.int8"),
        (dict(dtype="float16"), "dtype is float16: give torch.float16"),
        (dict(max_len=40.5), "max_len is 40.5: give a whole number from 32"),
        (dict(device="nowhere"), "device = 'nowhere'"),
    ],
)
def test_arguments_of_check_that_cannot_be_used(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(Decoder(dim=32, depth=1, heads=2, rotary_xpos=True), **arguments)


# models that are wrong


def test_a_fault_of_xpos_is_not_taken_for_upstreams(here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream.RotaryEmbedding, "forward", no_decay_before_the_center)
    status, document = tool.check("--model", "train:Builder.build", *SHORT)
    assert status == 1
    assert {"prefix", *NO_CACHE} <= failed(document)
    assert left_out(document).keys() == NO_MEMS


@pytest.mark.parametrize("model", ["net()", "net(alibi_pos_bias=True)"])
def test_a_model_without_the_limit_fails(model: str, here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(model)
    # five more than there should be, which the check is not told of
    limit = Model.limit
    monkeypatch.setattr(Model, "limit", property(lambda self: limit.__get__(self) - 5))
    status, document = tool.check(*MODEL, "--max-len", "64")
    assert (status, failed(document)) == (1, {"range"})


@pytest.mark.parametrize(
    ("spec", "model", "expected"),
    [
        ("train", "", ["MODULE:FACTORY", "train:build_model"]),
        ("train.py:build_model", "", ["MODULE:FACTORY", "train:build_model"]),
        ("models/train:build_model", "", ["MODULE:FACTORY", "train:build_model"]),
        ("nowhere:build_model", "", ["importing nowhere failed", "No module named 'nowhere'"]),
        ("train:nothing", "", ["has no attribute 'nothing'"]),
        ("train:not_a_function", "", ["'int' object is not callable"]),
        ("train:with_argument", "", ["without arguments", "'size'"]),
        ("train:Builder.nothing", "", ["has no attribute 'nothing'"]),
        ("train:build_model", "{}['dim']", ["KeyError: 'dim'", "train.py, line"]),
        ("train:build_model", "__import__('sys').exit(3)", ["SystemExit: 3", "train.py, line"]),
        ("train:build_model", "{}", ["the model is a dict", "TransformerWrapper"]),
        ("train:build_model", "None", ["the model is a NoneType"]),
        ("train:build_model", "nn.Linear(2, 2)", ["Linear has no Decoder"]),
        (
            "train:build_model",
            "net(rotary_xpos=False, rotary_pos_emb=True, rotary_xpos_scale_base=64)",
            ["without rotary_xpos = True", "rotary_xpos_scale_base alone does nothing"],
        ),
        ("train:build_model", "net(attn_l2_distance=True)", ["AssertionError", "attn_l2_distance", "train.py, line"]),
        ("train:build_model", "net().to('meta')", ["meta device"]),
        ("train:build_model", "net(rotary_xpos_scale_base=0.1)", ["scale base of 0.1", "32"]),
        ("train:build_model", "(:", ["SyntaxError", "train.py, line"]),
        ("train:build_model", "1\nimport no_such", ["No module named 'no_such'", "train.py, line"]),
        ("train:build_model", "1\nraise SystemExit(1)", ["importing train failed: SystemExit: 1", "train.py, line"]),
    ],
)
def test_models_that_cannot_be_used_are_refused_in_one_line(
    spec: str, model: str, expected: list[str], here: Path, tool: Tool
) -> None:
    write_model(model or "net()")
    message = tool.refusal("check", "--model", spec, *SHORT)
    assert [text for text in expected if text not in message] == [], message
    assert "site-packages" not in message
    assert "(__init__.py" not in message


# limits


@given(st.integers(1, 10**6), st.floats(0.5, 10_000), st.sampled_from([*DTYPES]))
def test_limits_are_those_of_the_range_of_the_dtype(length: int, scale_base: float, name: str) -> None:
    def most(scale_base: float) -> int:
        largest = torch.finfo(DTYPES[name]).max
        return 2 * math.floor(scale_base * math.log(largest) / math.log(1.4 / 0.4)) + 1

    found = limits(scale_base, length)
    assert found.scale_bases is not None
    assert found.calls is not None
    assert found.queries[name] == most(scale_base)
    base = found.scale_bases[name]
    assert most(base - 1) < length <= most(base) or base == 1
    assert (found.calls[name] - 1) * found.queries[name] < length <= found.calls[name] * found.queries[name]


def test_the_table_of_limits(tool: Tool) -> None:
    status, out, err = tool.run("limits", "--length", "100000")
    assert (status, out, err) == (0, f"{limits(length=100_000)}\n", "")
    assert max(map(len, out.splitlines())) <= 105
    rows = [line.split() for line in out.splitlines()]
    # those that the documents name
    assert ["float16", "9,065", "5,649", "12"] in rows
    assert {("bfloat16", "72,519"), ("float32", "72,521")} <= {tuple(row[:2]) for row in rows}
    # at a distance of the scale base, with the decay of the first pair, of all 16 and of the last
    mean = sum(2 * d / 32 + 0.4 for d in range(16)) / 16 / 1.4
    assert ["512", *(f"{left:.2g}" for left in (0.4 / 1.4, mean, (30 / 32 + 0.4) / 1.4))] in rows
    assert tool.run("limits", "--dim", "33")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dim=2.5), "dim is 2.5"),
        (dict(scale_base=-1), "scale_base is -1"),
        (dict(length=0), "length is 0"),
        (dict(length=1.5), "length is 1.5"),
    ],
)
def test_limits_refuses_what_is_no_number_of_that_kind(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limits(**arguments)


# memory keys


def with_memory_keys() -> Any:
    options: dict[str, Any] = dict(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_emb_dim=8, verbose=False)
    layers = Decoder(**options, rotary_xpos=True, attn_num_mem_kv=2)
    return TransformerWrapper(num_tokens=32, max_seq_len=128, attn_layers=layers)


def test_a_second_fold_is_refused() -> None:
    model = with_memory_keys()
    fold_mem_kv_(model, 64)
    folded = {name: value.clone() for name, value in model.state_dict().items()}
    for again in (model, deepcopy(model), model.attn_layers):
        with pytest.raises(ValueError, match="folded before, for a seq_len of 64"):
            fold_mem_kv_(again, 64)
    assert all(torch.equal(value, folded[name]) for name, value in model.state_dict().items())
    # a state dict has the keys of upstream's, so it does not tell
    loaded = with_memory_keys()
    loaded.load_state_dict(folded)
    assert fold_mem_kv_(loaded, 64) == 2


def test_a_fold_that_leaves_the_range_changes_nothing() -> None:
    model = with_memory_keys().half()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"seq_len is 200000: .* the range of float16"):
        fold_mem_kv_(model, 200_000)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"seq_len is 2\.5"):
        fold_mem_kv_(model, 2.5)  # type: ignore[arg-type]


@torch.no_grad()
def test_the_recipe_converts_a_checkpoint_of_upstreams(tmp_path: Path) -> None:
    """At the length of training the converted checkpoint answers as upstream's release does with the old one."""
    # which imports the unpatched release, and is not typed
    build_both = importlib.import_module("pristine").build_both
    options = dict(
        dim=16, depth=2, heads=2, attn_dim_head=8, rotary_emb_dim=8, rotary_xpos_scale_base=32, verbose=False
    )
    options = {**options, "rotary_xpos": True, "attn_num_mem_kv": 2}
    model, upstreams = build_both(options, 0, torch.float64)
    old, new, seq_len = tmp_path / "old.pt", tmp_path / "new.pt", 40
    torch.save(upstreams.state_dict(), old)

    recipe: dict[str, Any] = {}
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/migration.md").read_text("utf-8"), re.S | re.M)
    exec(block, recipe)
    assert len(block.splitlines()) <= 12
    x = torch.arange(seq_len)[None] % 32
    model.load_state_dict(torch.load(old, weights_only=True))
    unconverted = model(x)
    recipe["convert"](model, old, new, seq_len)
    model.load_state_dict(torch.load(new, weights_only=True))

    expected = upstreams(x)
    torch.testing.assert_close(model(x), expected, atol=1e-9, rtol=0)
    assert not torch.allclose(unconverted, expected, atol=1e-3)


# help


@pytest.mark.parametrize("arguments", [[], ["check"], ["limits"]])
@pytest.mark.parametrize("setting", ["COLUMNS=40", "NO_COLOR=1", "FORCE_COLOR=1"])
def test_help_has_examples_and_the_exit_status(
    arguments: list[str], setting: str, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*setting.split("="))
    status, out, _ = tool.run(*arguments, "--help")
    assert status == 0
    assert "examples:\n  python -m x_transformers.xpos" in re.sub("\x1b.*?m", "", out)
    assert "exit status:" in out
    assert "130" in out
    assert max(map(len, out.splitlines())) <= 120


# the older line


@pytest.mark.slow
def test_the_older_line_has_the_commands_too(here: Path) -> None:
    tree = patched_tree(BACKPORT)
    write_model("XLAutoregressiveWrapper(net(dict(max_mem_len=256)))", old=True)
    result = process(here, *MODEL, *SHORT, "--json", path=tree)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert left_out(found).keys() == {"cached-new", "shift"}
    assert {row["key"] for row in found["results"]} == set(KEYS) - {"cached-new", "shift"}

    result = process(here, "limits", path=tree)
    assert result.returncode == 0, result.stderr
    assert ["float32", "72,521"] in [line.split() for line in result.stdout.splitlines()]

    fold = "import train; from x_transformers.xpos import fold_mem_kv_; print(fold_mem_kv_(train.memory_keys(), 100))"
    result = process(here, path=tree, python=("-c", fold))
    assert result.stdout == "2\n", result.stderr
