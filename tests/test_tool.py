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
from test_check import PACKAGE, Tool, failed, process
from torch import nn

from x_transformers import Decoder, TransformerWrapper
from x_transformers import x_transformers as upstream
from x_transformers.xpos import fold_mem_kv_, limits, migrate, properties, theirs
from x_transformers.xpos.net import Net, duplicate, first_attention
from x_transformers.xpos.subject import deviation

SHORT = ("--max-len", "32")
KEYS = [prop.key for prop in properties.OF_ANY]

MODELS = """
import torch
from torch import nn
from x_transformers import (
    AutoregressiveWrapper, ContinuousTransformerWrapper, Decoder, TransformerWrapper, XLAutoregressiveWrapper,
    XTransformer,
)

SIZE = dict(dim=32, depth=2, heads=2, attn_dim_head=16, rotary_xpos=True, rotary_emb_dim=32 if OLD else 16)
if OLD:
    SIZE["attn_dim_head"] = 32
else:
    SIZE["verbose"] = False


def net(wrapper=None, **layers):
    torch.manual_seed(0)
    options = dict(num_tokens=50, max_seq_len=256, attn_layers=Decoder(**{**SIZE, **layers}))
    return TransformerWrapper(**{**options, **(wrapper or {})})


def plain(): return net()
def flash(): return net(attn_flash=True)
def half(): return net().bfloat16()
def autoregressive(): return AutoregressiveWrapper(net())
def xl(): return XLAutoregressiveWrapper(net(dict(max_mem_len=256)))
def decoder(): return Decoder(**SIZE)
def continuous():
    layers = Decoder(**SIZE)
    return ContinuousTransformerWrapper(dim_in=5, dim_out=3, max_seq_len=256, max_mem_len=20, attn_layers=layers)
def in_a_module(): return nn.ModuleDict({"a": nn.Linear(2, 2), "language": net()})
def encoder_decoder():
    sizes = dict(num_tokens=20, depth=1, heads=2, max_seq_len=256)
    options = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in sizes.items()}
    return XTransformer(dim=32, dec_rotary_xpos=True, **options)
def absolute(): return net(dict(max_seq_len=40), disable_abs_pos_emb=False)
def few_mems(): return net(dict(max_mem_len=9))
def memory_tokens(): return net(dict(num_memory_tokens=3))
def interspersed(): return net(dict(num_memory_tokens=2, memory_tokens_interspersed_every=5))
def memory_keys(): return net(attn_num_mem_kv=3)
def normed(): return net(attn_num_mem_kv=3, attn_qk_norm=True)
def shifted_tokens(): return net(shift_tokens=1)
def tied(): return net(dict(tie_embedding=True)).half() if not OLD else net(dict(tie_embedding=True))
def recycling(): return net(dict(recycling=True))
def conditioned(): return net(dict(embed_num_tokens=dict(kind=3)), use_adaptive_layernorm=True, dim_condition=6)
def two(): return nn.ModuleList([net(), Decoder(**SIZE)])
def pooled(): return net(dict(average_pool_embed=True))
def alibi(): return net(alibi_pos_bias=True)
def short_scale(): return net(rotary_xpos_scale_base=0.1)

def refused(): return net(attn_l2_distance=True)
def no_xpos(): return net(rotary_xpos=False, rotary_pos_emb=True)
def no_layers(): return nn.Linear(2, 2)
def returns_a_dict(): return {}
def returns_nothing(): pass
def with_argument(size): return net()
def raises(): raise KeyError("dim")
def leaves(): raise SystemExit(3)
def on_meta(): return net().to("meta")
not_a_function = 7


class Builder:
    @staticmethod
    def build(): return net()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the module `train` in it, imported anew for each test."""
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    return tmp_path


def write_models(directory: Path, more: str = "", *, old: bool = False) -> None:
    (directory / "train.py").write_text(f"OLD = {old}\n{MODELS}\n{more}", encoding="utf-8")


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(capsys)


def left_out(document: dict[str, Any]) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in document["left_out"]}


# check --model

NO_CACHE, NO_MEMS, NO_SHIFT = {"cached-whole", "cached-new", "chunked"}, {"mems"}, {"shift"}
DECODER = "Decoder: 2 attention layers, 2 heads of 16 dims, 16 rotated, scale base 512; 32 random"


@pytest.mark.parametrize(
    ("factory", "tested", "not_measured"),
    [
        ("plain", f"TransformerWrapper of a {DECODER} token ids", NO_MEMS),
        ("half", "random token ids", NO_MEMS),
        ("xl", "net, TransformerWrapper", set()),
        ("decoder", f"{DECODER} hidden states", set()),
        ("continuous", "ContinuousTransformerWrapper of a Decoder", NO_SHIFT),
        ("in_a_module", "language, TransformerWrapper", NO_MEMS),
        ("encoder_decoder", "decoder.net, TransformerWrapper", NO_MEMS),
        ("few_mems", "TransformerWrapper", set()),
        ("memory_tokens", "TransformerWrapper", NO_CACHE | NO_MEMS),
        ("interspersed", "TransformerWrapper", NO_CACHE | NO_MEMS),
        ("memory_keys", "TransformerWrapper", NO_SHIFT | NO_MEMS),
        ("shifted_tokens", "TransformerWrapper", NO_CACHE | NO_MEMS),
        ("alibi", "TransformerWrapper", NO_CACHE | NO_MEMS),
        ("tied", "TransformerWrapper", NO_MEMS),
        ("recycling", "Decoder: 2 attention layers", set()),
        ("conditioned", "Decoder: 2 attention layers", set()),
        ("Builder.build", "TransformerWrapper", NO_MEMS),
    ],
)
def test_what_a_model_can_have_holds_and_the_rest_is_left_out(
    factory: str, tested: str, not_measured: set[str], here: Path, tool: Tool
) -> None:
    status, document = tool.check("--model", f"train:{factory}", *SHORT)
    assert status == 0, document["results"]
    assert document["passed"]
    assert tested in document["tested"][0]
    assert left_out(document).keys() == not_measured
    assert [result["key"] for result in document["results"]] == [key for key in KEYS if key not in not_measured]
    assert all(reason for reason in left_out(document).values())


def test_dtype_is_cast_to_only_if_given(here: Path, tool: Tool) -> None:
    assert tool.check("--model", "train:half", *SHORT)[1]["run"]["dtype"] == "bfloat16"
    for dtype in ("float16", "bfloat16", "float64"):
        status, document = tool.check("--model", "train:flash", *SHORT, "--dtype", dtype)
        assert (status, document["run"]["dtype"]) == (0, dtype)


def test_every_stack_of_a_model_is_tested(here: Path, tool: Tool) -> None:
    status, document = tool.check("--model", "train:two", *SHORT)
    assert status == 0
    assert [line.partition(",")[0] for line in document["tested"]] == ["0", "1"]
    assert {result["key"].partition(": ")[0] for result in document["results"]} == {"0", "1"}


def test_an_absolute_position_embedding_limits_the_length(here: Path, tool: Tool) -> None:
    status, document = tool.check("--model", "train:absolute")
    assert (status, document["run"]["max_len"]) == (0, 40)
    assert "absolute positions" in left_out(document)["shift"]
    assert "give 40 or fewer" in tool.refusal("check", "--model", "train:absolute", "--max-len", "41")


def test_table_fits_and_names_what_is_upstreams(here: Path, tool: Tool) -> None:
    status, out, _ = tool.run("--model", "train:memory_keys", *SHORT)
    assert status == 0, out
    assert max(len(line) for line in out.splitlines() if str(PACKAGE) not in line) <= 100
    assert "train:memory_keys, a TransformerWrapper" in out
    assert "left out  shift of positions: upstream does not have it with plain rotary and these options" in out
    assert "all 6 properties hold" in out


def test_neither_the_model_nor_the_random_state_is_touched(here: Path, tool: Tool) -> None:
    write_models(here, "MODEL = net().train()\ndef kept(): torch.rand(3); return MODEL")
    before, path = torch.get_rng_state(), list(sys.path)
    status, _ = tool.check("--model", "train:kept", *SHORT)
    assert status == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert sys.path == path

    train = sys.modules["train"]
    expected, model = train.net(), train.MODEL
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_a_copy_of_tied_embeddings_shares_nothing(here: Path) -> None:
    model = TransformerWrapper(num_tokens=9, max_seq_len=8, tie_embedding=True, attn_layers=Decoder(dim=8, depth=1))
    copied = duplicate(model)
    model.token_emb.emb.weight.data.fill_(math.nan)
    assert copied(torch.tensor([[1, 2]])).isfinite().all()


def test_what_there_is_to_say_of_a_model_is_a_note(here: Path, tool: Tool) -> None:
    silent = "[nn.init.zeros_(value) for name, value in model.named_parameters() if 'to_out' in name]"
    write_models(here, f"def silent():\n    model = net()\n    {silent}\n    return model")
    for factory, note in (
        ("silent", "without positions the output is the same"),
        ("pooled", "tested is the Decoder in it, on hidden states"),
    ):
        status, document = tool.check("--model", f"train:{factory}", *SHORT)
        assert status == 0
        assert note in document["notes"][0]


# models that are wrong


def test_a_center_that_moves_with_the_length_fails(here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_factors = upstream.XPosTable.with_factors

    def moves(table: Any, *sizes: int) -> Any:
        q_factor, k_factor = with_factors(table, *sizes).factors
        # queries are centered on the middle of the text once more, keys are not
        pairs = torch.arange(q_factor.shape[-1]) / q_factor.shape[-1]
        table.factors = (q_factor * ((pairs + 0.4) / 1.4) ** (-q_factor.shape[-2] / 2 / 512), k_factor)
        return table

    monkeypatch.setattr(upstream.XPosTable, "with_factors", moves)
    status, document = tool.check("--model", "train:plain", *SHORT)
    assert status == 1
    assert "prefix" in failed(document)
    assert "rows" not in failed(document)
    assert left_out(document).keys() == NO_MEMS


@pytest.mark.parametrize("factory", ["plain", "alibi"])
def test_a_model_without_the_limit_fails(factory: str, here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_of = limits.limit_of
    # five more than there should be, which the check is not told of
    monkeypatch.setattr(properties, "limit_of", lambda *args, **options: limit_of(*args, **options) - 5)
    status, document = tool.check("--model", f"train:{factory}", "--max-len", "64")
    assert (status, failed(document)) == (1, {"range"})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("train", ["MODULE:FACTORY", "train:build_model"]),
        ("train.py:plain", ["MODULE:FACTORY", "train:build_model"]),
        ("models/train:plain", ["MODULE:FACTORY", "train:build_model"]),
        ("nowhere:plain", ["importing nowhere failed", "No module named 'nowhere'"]),
        ("train:nothing", ["has no attribute 'nothing'"]),
        ("train:not_a_function", ["'int' object is not callable"]),
        ("train:with_argument", ["without arguments", "'size'"]),
        ("train:raises", ["KeyError: 'dim'", "train.py, line"]),
        ("train:leaves", ["SystemExit: 3", "train.py, line"]),
        ("train:returns_a_dict", ["returned a dict", "TransformerWrapper"]),
        ("train:returns_nothing", ["returned None"]),
        ("train:no_layers", ["Linear has no Decoder"]),
        ("train:no_xpos", ["without rotary_xpos=True"]),
        ("train:refused", ["AssertionError", "attn_l2_distance", "train.py, line"]),
        ("train:on_meta", ["meta device"]),
        ("train:short_scale", ["scale base of 0.1", "32"]),
        ("broken_syntax:plain", ["SyntaxError"]),
        ("needs_more:plain", ["No module named 'no_such_library'", "needs_more.py, line 1"]),
        ("script:plain", ["importing script failed: SystemExit: 1", "script.py, line"]),
    ],
)
def test_models_that_cannot_be_used_are_refused_in_one_line(
    spec: str, expected: list[str], here: Path, tool: Tool
) -> None:
    (here / "broken_syntax.py").write_text("def plain(:\n")
    (here / "needs_more.py").write_text("import no_such_library\n")
    (here / "script.py").write_text("import sys\nsys.exit(1)\n")
    message = tool.refusal("check", "--model", spec, *SHORT)
    assert [words for words in expected if words not in message] == [], message
    # how long a text it reads, and where it is, is of no concern for a conversion
    if spec not in ("train:short_scale", "train:on_meta"):
        torch.save({"a": torch.ones(1)}, "old.pt")
        message = tool.refusal("migrate", "old.pt", "--model", spec, "--length", "8", "--output", "new.pt")
        assert [words for words in expected if words not in message] == [], message


def test_a_text_is_for_the_checks_own_models(here: Path, tool: Tool) -> None:
    assert "--text" in tool.refusal("--model", "train:plain", "--text", "train.py")
    assert "32 or more" in tool.refusal("--model", "train:plain", "--max-len", "31")


def test_the_command_in_a_process_of_its_own(here: Path) -> None:
    result = process(here, "--model", "train:plain", "--max-len", "32", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["passed"]
    assert result.stderr.splitlines()[-1] == f"[{len(KEYS) - 1}/{len(KEYS) - 1}] up to the limit"


# limits


@pytest.mark.parametrize("name", limits.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_the_limit_is_the_real_one(name: str, masked: bool) -> None:
    """A model at the limit is finite, and one query more is refused before a layer runs."""
    dtype, scale_base = limits.DTYPES[name], 0.5
    limit = limits.limit_at(4, scale_base, dtype, masked=masked)
    options = dict(rotary_xpos=True, rotary_emb_dim=4, rotary_xpos_scale_base=scale_base, verbose=False)
    layers = Decoder(dim=8, depth=1, heads=1, attn_dim_head=8, attn_flash=masked, **options).to(dtype).eval()
    ran: list[int] = []
    first_attention(layers).to_q.register_forward_hook(lambda *_: ran.append(1))
    x = torch.randn(1, limit + 1, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    # so large a scale leaves no room for a query that is not small
    for parameter in layers.parameters():
        parameter.data.mul_(0.02)
    mask = torch.ones(1, limit + 1, dtype=torch.bool)

    assert layers(x[:, :limit], self_attn_kv_mask=mask[:, :limit]).isfinite().all()
    ran.clear()
    with pytest.raises(ValueError, match=f"limit of {limit} "):
        layers(x, self_attn_kv_mask=mask)
    assert ran == []


@given(st.integers(1, 10**6), st.sampled_from([*limits.DTYPES.values()]), st.booleans())
def test_the_least_scale_base_is_enough_and_one_less_is_not(length: int, dtype: torch.dtype, masked: bool) -> None:
    base = limits.least_scale_base(32, length, dtype, masked=masked)
    assert limits.limit_at(32, base, dtype, masked=masked) >= length
    assert base == 1 or limits.limit_at(32, base - 1, dtype, masked=masked) < length


def test_the_table_of_limits(tool: Tool) -> None:
    status, out, err = tool.run("limits", "--length", "100000")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 105
    rows = [line.split() for line in out.splitlines() if line.startswith(("float", "bfloat"))]
    # those that the documents name
    limits_of = [["float16", "9,065", "9,065"], ["bfloat16", "72,519", "36,261"], ["float32", "72,521", "36,261"]]
    assert rows[:3] == limits_of
    for (name, *_, masked), (same_name, *bases, calls) in zip(rows[:4], rows[4:]):
        expected = [
            limits.least_scale_base(32, 100_000, limits.DTYPES[name], masked=masked) for masked in (False, True)
        ]
        assert (same_name, bases) == (name, [f"{base:,}" for base in expected])
        assert int(calls) == math.ceil(100_000 / int(masked.replace(",", "")))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dim", "3"], ["--dim", "3", "even number from 4"]),
        (["--dim", "2"], ["--dim", "2", "even number from 4"]),
        (["--scale-base", "0"], ["--scale-base", "above 0"]),
        (["--scale-base", "nan"], ["--scale-base", "above 0"]),
        (["--length", "0"], ["--length", "1 or more"]),
    ],
)
def test_limits_refuses_what_has_none(arguments: list[str], expected: list[str], tool: Tool) -> None:
    message = tool.refusal("limits", *arguments)
    assert [words for words in expected if words not in message] == []


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
def test_upstreams_answer_is_the_formula(here: Path) -> None:
    """What is compared with: memory keys that are neither rotated nor scaled, against absolute queries."""
    net = Net(memory_keys(torch.float64).eval())
    attention = first_attention(net.layers)
    queries: list[Any] = []
    attention.to_q.register_forward_hook(lambda _module, _args, out: queries.append(out))
    scores: list[Any] = []
    attention.attend.register_forward_hook(lambda _module, _args, out: scores.append(out[1].qk_similarities))
    length, positions = 90, 21
    migrate.as_upstream(net, net.inputs(1, positions), length)

    q = queries[0][0].unflatten(-1, (2, 16)).transpose(0, 1)
    pairs = torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous())
    mem = torch.view_as_complex(attention.mem_k.unflatten(-1, (-1, 2)).contiguous())
    d, m = torch.arange(8, dtype=torch.float64), torch.arange(positions, dtype=torch.float64)[:, None]
    table = torch.polar(((2 * d / 16 + 0.4) / 1.4) ** ((m - length // 2) / 512), m * 10_000 ** (-2 * d / 16))
    expected = ((pairs * table) @ mem.conj().transpose(-1, -2)).real * 16**-0.5
    # float64, after some thirty roundings
    assert deviation(scores[0][0, ..., :3], expected) < 1e-13


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
    write_models(here, "def twice():\n    one = net(attn_num_mem_kv=3)\n    return nn.ModuleList([one, one])")
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
        (None, {"model": "train:normed"}, ["attn_qk_norm", "no exact conversion"]),
        (lambda: torch.save(memory_keys(factory="plain").state_dict(), "old.pt"), {"model": "train:plain"},
         ["needs no conversion"]),
        (None, {"model": "train:in_a_module"}, ['Missing key(s) in state_dict: "a.']),
        (lambda: torch.save(memory_keys(torch.float16).state_dict(), "old.pt"), {"length": "200000"},
         ["mem_k", "range of float16", "float32 or bfloat16"]),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_in_one_line(
    make: Callable[[], None] | None, arguments: dict[str, str], expected: list[str], here: Path, tool: Tool
) -> None:
    factory = "normed" if "normed" in arguments.get("model", "") else "memory_keys"
    torch.save(memory_keys(factory=factory).state_dict(), "old.pt")
    if make is not None:
        make()

    def files() -> dict[str, int]:
        return {path.name: path.lstat().st_mtime_ns for path in here.iterdir() if path.name != "__pycache__"}

    before = files()
    message = tool.refusal(*words(**arguments))
    assert [words for words in expected if words not in message] == [], message
    assert files() == before


def test_safetensors_that_is_not_there(here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("old.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in tool.refusal(*words("old.safetensors", output="new.safetensors"))


def no_space(_content: object, path: str) -> None:
    Path(path).write_bytes(b"half of it")
    raise OSError(28, "No space left on device")


def no_links(*_args: object) -> None:
    raise PermissionError


@pytest.mark.parametrize(("links", "meanwhile"), [(True, True), (False, True), (False, False)])
def test_a_file_that_appears_meanwhile_is_not_overwritten(
    links: bool, meanwhile: bool, here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_save = torch.save

    def saves(content: object, path: str) -> None:
        really_save(content, path)
        if meanwhile:
            Path("new.pt").write_bytes(b"someone else's")

    torch.save(memory_keys().state_dict(), "old.pt")
    monkeypatch.setattr(torch, "save", saves)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    if meanwhile:
        assert "cannot write new.pt: it exists by now" in tool.refusal(*words())
        assert Path("new.pt").read_bytes() == b"someone else's"
    else:
        assert tool.run(*words())[0] == 0
        assert load("new.pt").keys() == load("old.pt").keys()
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == {"new.pt", "old.pt", "train.py"}


def test_a_write_that_fails_leaves_nothing(here: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(memory_keys().state_dict(), "old.pt")
    monkeypatch.setattr(torch, "save", no_space)
    message = tool.refusal(*words())
    assert "cannot write new.pt: [Errno 28] No space left on device" in message
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == {"old.pt", "train.py"}


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
def test_the_older_line_has_the_commands_too(tmp_path: Path) -> None:
    tree = patched_tree(BACKPORT)
    write_models(tmp_path, old=True)
    result = process(tmp_path, "--model", "train:xl", *SHORT, "--json", path=tree)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert left_out(found).keys() == {"cached-new", "shift"}
    assert {row["key"] for row in found["results"]} == set(KEYS) - {"cached-new", "shift"}

    result = process(tmp_path, "limits", path=tree)
    assert result.returncode == 0, result.stderr
    assert ["float32", "72,521", "36,261"] in [line.split() for line in result.stdout.splitlines()]

    make = "import torch, train; torch.save(train.memory_keys().state_dict(), 'old.pt')"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
    result = process(tmp_path, *words(length="100"), path=tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "new.pt").is_file()
