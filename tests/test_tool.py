"""The command line on what users bring: their models, lengths and checkpoints; and that it fails where it must."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging_support import BACKPORT, patched_tree
from test_check import PACKAGE, SHORT, Tool, failed, keys_without_decay, process
from torch import nn

from x_transformers import x_transformers as upstream
from x_transformers.xpos import fold_mem_kv_, limits, migrate, ours, properties, theirs
from x_transformers.xpos.net import Inputs, first_attention
from x_transformers.xpos.subject import deviation

KEYS = [prop.key for prop in properties.OF_ANY]

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
def normed(): return net(attn_num_mem_kv=3, attn_qk_norm=True)
def twice(): one = net(attn_num_mem_kv=3); return nn.ModuleList([one, one])
def with_argument(size): return net()
not_a_function = 7
class Builder: build = staticmethod(net)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, from which the module `train` is imported anew for each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    write_model()
    return tmp_path


def write_model(expression: str = "net()", *, more: str = "", old: bool = False) -> None:
    """The module `train` in the current directory, with a function build_model that returns this."""
    code = f"OLD = {old}\n{MODULE}\n{more}\ndef build_model(): return {expression}\n"
    Path("train.py").write_text(code, encoding="utf-8")


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(capsys)


def left_out(document: dict[str, Any]) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in document["left_out"]}


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
        ("net(dict(recycling=True))", "the Decoder in it, on hidden states, as the TransformerWrapper cannot", set()),
        ("net(dict(average_pool_embed=True))", "cannot be: it gives (2, 50) for 2 texts of 32", set()),
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
    assert tested in " ".join(document["tested"] + document["notes"])
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
    assert [line.partition(",")[0] for line in document["tested"]] == ["0", "1"]
    assert {result["key"].partition(": ")[0] for result in document["results"]} == {"0", "1"}


def test_an_absolute_position_embedding_limits_the_length(here: Path, tool: Tool) -> None:
    write_model("net(dict(max_seq_len=40), disable_abs_pos_emb=False)")
    status, document = tool.check(*MODEL)
    assert (status, document["run"]["max_len"]) == (0, 40)
    assert "absolute positions" in left_out(document)["shift"]
    assert "give 40 or fewer" in tool.refusal(*MODEL, "--max-len", "41")
    assert "--text" in tool.refusal(*MODEL, "--text", "train.py")


def test_table_fits_and_names_what_is_upstreams(here: Path, tool: Tool) -> None:
    status, out, _ = tool.run("--model", "train:memory_keys", *SHORT)
    assert status == 0, out
    assert max(len(line) for line in out.splitlines() if str(PACKAGE) not in line) <= 100
    assert "train:memory_keys, TransformerWrapper" in out
    assert "left out  shift of positions: upstream does not have it with plain rotary and these options" in out
    assert "all 6 properties hold" in out


def test_neither_the_model_nor_the_random_state_is_touched(here: Path, tool: Tool) -> None:
    write_model("torch.rand(3).sum() and MODEL", more="MODEL = Builder.build().train()")
    before, path = torch.get_rng_state(), list(sys.path)
    assert tool.check(*MODEL, *SHORT)[0] == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert sys.path == path

    expected, model = sys.modules["train"].net().state_dict(), sys.modules["train"].MODEL
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_a_model_that_does_without_positions_is_noted(here: Path, tool: Tool) -> None:
    zero = "[nn.init.zeros_(value) for name, value in MODEL.named_parameters() if 'to_out' in name]"
    write_model("MODEL", more=f"MODEL = net()\n{zero}")
    status, document = tool.check(*MODEL, *SHORT)
    assert status == 0
    assert "without positions the output is the same" in document["notes"][0]


# models that are wrong


def test_a_fault_of_xpos_is_not_taken_for_upstreams(here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream.XPosTable, "with_factors", keys_without_decay)
    status, document = tool.check("--model", "train:Builder.build", *SHORT)
    assert status == 1
    assert {"prefix", *NO_CACHE} <= failed(document)
    assert left_out(document).keys() == NO_MEMS


@pytest.mark.parametrize("model", ["net()", "net(alibi_pos_bias=True)"])
def test_a_model_without_the_limit_fails(model: str, here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(model)
    # five more than there should be, which the check is not told of
    monkeypatch.setattr(properties, "limit", lambda *args, **options: limits.limit(*args, **options) - 5)
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
        ("train:build_model", "{}", ["returned a dict", "TransformerWrapper"]),
        ("train:build_model", "None", ["returned a NoneType"]),
        ("train:build_model", "nn.Linear(2, 2)", ["Linear has no Decoder"]),
        (
            "train:build_model",
            "net(rotary_xpos=False, rotary_pos_emb=True, rotary_xpos_scale_base=64)",
            ["without rotary_xpos=True", "rotary_xpos_scale_base alone does nothing"],
        ),
        ("train:build_model", "net(attn_l2_distance=True)", ["AssertionError", "attn_l2_distance", "train.py, line"]),
        ("train:build_model", "net().to('meta')", ["meta device"]),
        ("train:build_model", "net(rotary_xpos_scale_base=0.1)", ["scale base of 0.1", "32"]),
        ("train:build_model", "(:", ["SyntaxError"]),
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
    # how long a text it reads, and where it is, is of no concern for a conversion
    if not model.startswith(("net(rotary_xpos_scale", "net().to")):
        torch.save({"a": torch.ones(1)}, "old.pt")
        message = tool.refusal(*words(model=spec))
        assert [text for text in expected if text not in message] == [], message


# limits


@given(st.integers(1, 10**6), st.sampled_from([*limits.DTYPES.values()]), st.booleans())
def test_the_least_scale_base_is_enough_and_one_less_is_not(length: int, dtype: torch.dtype, masked: bool) -> None:
    base = limits.least_scale_base(length, dtype, masked=masked)
    found = [upstream.RotaryEmbedding(4, use_xpos=True, scale_base=each) for each in (base, max(base - 1, 1e-9))]
    enough, less = (rotary.max_seq_len(dtype, is_masked=masked) for rotary in found)
    assert less < length <= enough or (base, length) == (1, 1)
    assert enough == limits.limit(base, dtype, masked=masked)


def test_the_table_of_limits(tool: Tool) -> None:
    status, out, err = tool.run("limits", "--length", "100000")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 105
    rows = [line.split() for line in out.splitlines() if line.startswith(("float", "bfloat"))]
    # those that the documents name
    limits_of = [["float16", "9,065", "9,065"], ["bfloat16", "72,519", "36,261"], ["float32", "72,521", "36,261"]]
    assert rows[:3] == limits_of
    for (name, *_, masked), (same_name, *bases, calls) in zip(rows[:4], rows[4:]):
        dtype = limits.DTYPES[name]
        expected = [limits.least_scale_base(100_000, dtype, masked=is_masked) for is_masked in (False, True)]
        assert (same_name, bases) == (name, [f"{base:,}" for base in expected])
        assert int(calls) == math.ceil(100_000 / int(masked.replace(",", "")))
    # at a distance of the scale base, with the decay of the first pair, of all 16 and of the last
    mean = sum(2 * d / 32 + 0.4 for d in range(16)) / 16 / 1.4
    assert ["512", *(f"{left:.2g}" for left in (0.4 / 1.4, mean, (30 / 32 + 0.4) / 1.4))] in map(
        str.split, out.splitlines()
    )


# migrate


def memory_keys(dtype: torch.dtype = torch.float32, factory: str = "memory_keys") -> nn.Module:
    with theirs.undisturbed():
        return theirs.build(f"train:{factory}").to(dtype)


def words(source: str = "old.pt", **options: str) -> list[str]:
    """The arguments of a conversion."""
    options = {"model": "train:memory_keys", "length": "64", "output": "new.pt", **options}
    return ["migrate", source, *(f"--{name}={value}" for name, value in options.items())]


def save(state: dict[str, Any], path: str) -> None:
    if path.endswith(".safetensors"):
        pytest.importorskip("safetensors.torch").save_file(state, path, metadata={"step": "7"})
    else:
        torch.save(state, path)


def load(path: str) -> dict[str, Any]:
    if path.endswith(".safetensors"):
        with pytest.importorskip("safetensors").safe_open(path, framework="pt") as file:
            assert file.metadata() == {"step": "7"}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", limits.DTYPES)
def test_a_converted_checkpoint_gives_upstreams_answers(name: str, suffix: str, here: Path, tool: Tool) -> None:
    model = memory_keys(limits.DTYPES[name])
    source, output = f"old{suffix}", f"new{suffix}"
    save(model.state_dict(), source)
    before = Path(source).read_bytes()
    status, out, err = tool.run(*words(source, output=output, length="200"))
    assert (status, err) == (0, "")
    assert f"folded    2 parameters in {name}, by up to " in out
    assert f"written   {output}" in out
    assert Path(source).read_bytes() == before
    assert sorted(path.name for path in here.iterdir() if path.suffix == suffix) == sorted([source, output])

    old, new = load(source), load(output)
    fold_mem_kv_(model, 200)
    expected = model.state_dict()
    assert list(new) == list(old)
    assert [name for name in old if not torch.equal(old[name], new[name])] == [n for n in old if n.endswith("mem_k")]
    assert all(torch.equal(new[name], expected[name]) and new[name].dtype == old[name].dtype for name in old)


@torch.no_grad()
def test_upstreams_answer_is_the_formula() -> None:
    """What is compared with: memory keys that are neither rotated nor scaled, against absolute queries."""
    net = ours.build(flash=False, depth=1, attn_num_mem_kv=3).as_float64()
    length, m = 90, torch.arange(21)
    with ours.observe(net, m) as layers:
        migrate.as_upstream(net, Inputs(m[None]), length)
    # (heads, 1, 3, dim_head), of which the first 32 dims are rotated
    q, mem = layers[0].queries[:, :, None], first_attention(net.layers).mem_k[:, None]
    pairs, of_mem = (torch.view_as_complex(t[..., :32].unflatten(-1, (-1, 2)).contiguous()) for t in (q, mem))
    d, m = torch.arange(16, dtype=torch.float64), m[:, None, None].double()
    table = torch.polar(((2 * d / 32 + 0.4) / 1.4) ** ((m - length // 2) / 512), m * 10_000 ** (-2 * d / 32))
    expected = (pairs * table * of_mem.conj()).real.sum(-1) + (q * mem)[..., 32:].sum(-1)
    # float64, after some thirty roundings of terms up to a hundred
    assert deviation(layers[0].scores[..., :3], expected * 64**-0.5) < 1e-12


@pytest.mark.parametrize("wrong", ["length", "weights"])
def test_a_conversion_that_gives_other_answers_is_caught(
    wrong: str, here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = memory_keys().state_dict()
    if wrong == "length":
        monkeypatch.setattr(migrate, "fold_mem_kv_", lambda model, length: fold_mem_kv_(model, length + 4))
    else:
        state["to_logits.weight"][0] = math.nan
    torch.save(state, "old.pt")
    status, out, _ = tool.run(*words(length="200"))
    assert status == 1
    assert "FAIL      the answers are not those of before: nothing was written" in out
    assert not Path("new.pt").exists()


def test_what_else_a_checkpoint_holds_stays(here: Path, tool: Tool) -> None:
    state = memory_keys().state_dict()
    name = next(name for name in state if name.endswith("mem_k"))
    content = {"state": {"model": state, "step": 7}, "average": state[name], "optimizer": {"lr": 0.1}}
    torch.save(content, "old.pt")
    os.chmod("old.pt", 0o640)
    assert tool.run(*words(key="state.model"))[0] == 0
    found = torch.load("new.pt", weights_only=True)
    assert (found["state"]["step"], found["optimizer"]) == (7, {"lr": 0.1})
    # shared before and after
    assert found["average"].data_ptr() == found["state"]["model"][name].data_ptr()
    assert not torch.equal(found["average"], state[name])
    assert stat.S_IMODE(Path("new.pt").stat().st_mode) == 0o640


def test_a_name_that_the_file_leaves_out_may_be_anothers_tensor(here: Path, tool: Tool) -> None:
    state = memory_keys(factory="twice").state_dict()
    save({name: value for name, value in state.items() if name.startswith("0.")}, "old.safetensors")
    status, out, err = tool.run(*words("old.safetensors", output="new.safetensors", model="train:twice"))
    assert status == 0, err
    assert "2 parameters in float32" in out
    assert load("new.safetensors").keys() == load("old.safetensors").keys()


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (None, {"source": "missing.pt"}, ["CHECKPOINT", "missing.pt", "No such file"]),
        (None, {"source": "."}, ["CHECKPOINT", "directory"]),
        (None, {"output": "old.pt"}, ["--output", "exists already"]),
        (lambda: os.symlink("nowhere", "new.pt"), {}, ["--output", "exists already"]),
        (None, {"output": "no/such/new.pt"}, ["--output", "the folder no/such"]),
        (None, {"output": "new.safetensors"}, ["--output", "not end in .safetensors"]),
        (lambda: Path("old.pt").write_bytes(b"what is this"), {}, ["CHECKPOINT", "cannot be read"]),
        (lambda: Path("old.safetensors").write_bytes(b"no"), {"source": "old.safetensors", "output": "new.safetensors"},
         ["CHECKPOINT", "cannot be read"]),
        (lambda: torch.save(nn.Linear(1, 1), "old.pt"), {}, ["CHECKPOINT", "torch.save(model.state_dict()"]),
        (lambda: torch.save([1], "old.pt"), {}, ["CHECKPOINT", "holds a list", "give --key"]),
        (lambda: torch.save({"model": {"a": torch.ones(1)}, "step": 1}, "old.pt"), {}, ['"model"', "with --key"]),
        (lambda: torch.save({"a": torch.ones(1)}, "old.pt"), {}, ["Missing key", "emb.weight", 'Unexpected key(s)']),
        (None, {"key": "model"}, ["--key", "'model'"]),
        (None, {"length": "0"}, ["--length", "1 or more"]),
        (lambda: torch.save(memory_keys(factory="normed").state_dict(), "old.pt"), {"model": "train:normed"},
         ["attn_qk_norm", "no exact conversion"]),
        (lambda: torch.save(memory_keys(factory="plain").state_dict(), "old.pt"), {"model": "train:plain"},
         ["needs no conversion"]),
        (None, {"model": "train:twice"}, ['Missing key(s) in state_dict: "0.']),
        (lambda: torch.save(memory_keys(torch.float16).state_dict(), "old.pt"), {"length": "200000"},
         ["mem_k", "range of float16", "float32 or bfloat16"]),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_in_one_line(
    make: Callable[[], None] | None, arguments: dict[str, str], expected: list[str], here: Path, tool: Tool
) -> None:
    torch.save(memory_keys().state_dict(), "old.pt")
    if make is not None:
        make()

    def files() -> dict[str, int]:
        return {path.name: path.lstat().st_mtime_ns for path in here.iterdir() if path.name != "__pycache__"}

    before = files()
    message = tool.refusal(*words(**arguments))
    assert [words for words in expected if words not in message] == [], message
    assert files() == before


def test_on_upstreams_release_there_is_nothing_to_convert(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream.RotaryEmbedding, "forward", lambda self, t, offset=0: None)
    assert "install the fork" in tool.refusal(*words())


@pytest.mark.parametrize(
    ("appears", "links", "error"),
    [
        (False, False, ""),
        (True, True, "it exists by now"),
        (True, False, "it exists by now"),
        (False, True, "no space"),
    ],
)
def test_all_is_written_or_nothing_and_never_over_a_file(
    appears: bool, links: bool, error: str, here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_save = torch.save

    def saves(content: object, path: str) -> None:
        really_save(content, path)
        if appears:
            Path("new.pt").write_bytes(b"someone else's")
        elif error:
            raise OSError(error)

    def no_links(*_args: object) -> None:
        raise PermissionError

    torch.save(memory_keys().state_dict(), "old.pt")
    monkeypatch.setattr(torch, "save", saves)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    if error:
        assert f"cannot write new.pt: {error}" in tool.refusal(*words())
    else:
        assert tool.run(*words())[0] == 0
    found = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    assert found.keys() - {"new.pt"} == {"old.pt", "train.py"}
    assert found.get("new.pt") == (b"someone else's" if appears else None) or not error


# help


@pytest.mark.parametrize("arguments", [[], ["check"], ["limits"], ["migrate"]])
def test_help_has_examples_and_the_exit_status(arguments: list[str], tool: Tool) -> None:
    status, out, _ = tool.run(*arguments, "--help")
    assert status == 0
    assert "examples:\n  python -m x_transformers.xpos" in out
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
    assert ["float32", "72,521", "36,261"] in [line.split() for line in result.stdout.splitlines()]

    make = "import torch, train; torch.save(train.memory_keys().state_dict(), 'old.pt')"
    subprocess.run([sys.executable, "-c", make], cwd=here, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
    result = process(here, *words(length="100"), path=tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (here / "new.pt").is_file()
