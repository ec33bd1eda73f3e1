"""`python -m x_transformers.xpos`: it passes on the package, refuses what it cannot do, and fails on broken ones."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging_support import hatch_build, pristine_tree

import x_transformers
from x_transformers import x_transformers as upstream
from x_transformers.xpos import Ours, Result, formula, judge, ours, properties, report
from x_transformers.xpos import __main__ as command
from x_transformers.xpos.net import Net
from x_transformers.xpos.properties import Point, Property
from x_transformers.xpos.subject import Subject, deviation

LINE = Path(__file__).parent.parent / "patches" / "2.x"
PACKAGE = Path(x_transformers.__file__).parent
SHORT = ("--max-len", "32")
PROPERTIES = properties.ALL
KEYS = {prop.key for prop in PROPERTIES}


def process(cwd: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which imports from `path` first."""
    # models this small gain nothing from threads, and lose much where other tests run beside them
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    first = [str(PACKAGE.parent if path is None else path)]
    environment["PYTHONPATH"] = os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "x_transformers.xpos", *arguments]
    return subprocess.run(words, cwd=cwd, env=environment, text=True, capture_output=True, check=False)


@dataclass
class Tool:
    """The command in this process."""

    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        try:
            status = command.main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = self.capsys.readouterr()
        return status, captured.out, captured.err

    def check(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        status, out, err = self.run("check", "--json", *arguments)
        assert out, err
        return status, json.loads(out)

    def refusal(self, *arguments: str) -> str:
        """The one line that refuses the arguments, with status 2 and nothing on stdout."""
        status, out, err = self.run(*arguments)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1
        return err


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(capsys)


def failed(document: dict[str, Any]) -> set[str]:
    return {result["key"] for result in document["results"] if not result["passed"]}


# on the package itself


def test_every_property_holds(tmp_path: Path, tool: Tool) -> None:
    status, out, err = tool.run(*SHORT, "--plot", str(tmp_path / "plot.png"))
    assert status == 0, out
    assert out.count("  pass  ") == len(KEYS)
    assert f"all {len(KEYS)} properties hold" in out
    assert str(PACKAGE) in out
    assert all(name in out for name in hatch_build.read_series(LINE))
    assert max(len(line) for line in out.splitlines() if str(PACKAGE) not in line) <= 100
    assert err.splitlines() == [f"[{number}/{len(KEYS)}] {prop.name}" for number, prop in enumerate(PROPERTIES, 1)]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", pytest.param("float64", marks=pytest.mark.slow)])
def test_every_property_holds_in_every_dtype(dtype: str, tool: Tool) -> None:
    status, fields = tool.check(*SHORT, "--dtype", dtype)
    assert (status, fields["passed"], fields["run"]["dtype"]) == (0, True, dtype), failed(fields)
    assert {result["key"] for result in fields["results"]} == KEYS
    for result in fields["results"]:
        assert result["deviation"] == max(point["deviation"] for point in result["points"]) <= result["tolerance"]


# requests that cannot be met


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--dtype int8", ["--dtype", "int8", "float32", "bfloat16"]),
        ("--max-len many", ["--max-len", "many"]),
        ("--max-len 31", ["--max-len", "31", "32 or more"]),
        ("--max-len 100000 --dtype float16", ["--max-len", "100000", "float16", "5665 or fewer"]),
        ("--max-len 32862", ["--max-len", "32862", "float32", "32861 or fewer"]),
        ("--text missing.txt", ["--text", "missing.txt", "readable file"]),
        ("--text .", ["--text", "readable file"]),
        ("--text short.txt", ["--max-len", "1024", "7 bytes of short.txt", "--text FILE"]),
        ("--device no-such", ["--device", "no-such", "as cpu"]),
        ("--device cuda:99", ["--device", "cuda:99", "as cpu"]),
        ("--device meta", ["--device", "meta", "as cpu"]),
        ("--plot no-such-folder/plot.png", ["--plot", "no-such-folder/plot.png"]),
        ("--plot plot.txt", ["--plot", "plot.txt", "png"]),
        ("--max 128", ["--max"]),
        ("no-such-command", ["no-such-command", "check"]),
        ("limits --dim 3", ["--dim", "3", "even number from 4"]),
        ("limits --dim 2", ["--dim", "2", "even number from 4"]),
        ("limits --scale-base 0", ["--scale-base", "above 0"]),
        ("limits --scale-base nan", ["--scale-base", "above 0"]),
        ("limits --length 0", ["--length", "1 or more"]),
    ],
)
def test_refusals_name_the_argument_and_a_way_out(
    arguments: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool
) -> None:
    (tmp_path / "short.txt").write_bytes(b"7 bytes")
    monkeypatch.chdir(tmp_path)
    message = tool.refusal(*arguments.split())
    assert [words for words in expected if words not in message] == []
    assert [file.name for file in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("pydoc_data.topics", "", "--text FILE"),
        ("matplotlib.figure", "--plot plot.png", 'pip install "x-transformers[plot]"'),
        ("safetensors", "migrate a.safetensors --model a:b --length 9 --output b.safetensors", "install safetensors"),
    ],
)
def test_modules_that_are_not_there(
    module: str, arguments: str, expected: str, monkeypatch: pytest.MonkeyPatch, tool: Tool
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert expected in tool.refusal(*arguments.split())


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, tool: Tool) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(judge, "check", interrupt)
    assert tool.run(*SHORT) == (130, "", "\ninterrupted\n")


def test_a_reader_that_has_had_enough() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        command._write(stream, "a table\n")
        command._write(stream, "and more\n")


# the parts


def test_formula_is_the_tests_own() -> None:
    """It was written apart from the reference of all other tests."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (3, 5))
    query_pos, key_pos = torch.tensor([4, 5, 9]), torch.arange(5, 10)
    found, _ = formula.scores(q, k, query_pos, key_pos, rotary_dim=4)
    # which is not typed
    reference = importlib.import_module("reference")
    expected = reference.xpos_score(q, k, query_pos, key_pos, rotated_dim=4) * 6**-0.5
    torch.testing.assert_close(found, expected * (query_pos[:, None] >= key_pos), rtol=0, atol=1e-12)


@torch.no_grad()
def test_our_models_hide_nothing_and_touch_nothing() -> None:
    """No parameter is left at zero or one, attention is far from uniform, and a seed gives the same weights."""
    state = torch.random.get_rng_state()
    net, again = ours.build(flash=False), ours.build(flash=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(net.module.parameters(), again.module.parameters()))
    assert [name for name, parameter in net.module.named_parameters() if parameter.std() == 0] == []
    _, attention = net.module(torch.arange(64)[None], return_attn=True)
    assert all(layer[0, :, -1].max() > 8 / 64 for layer in attention)


def test_a_property_that_raises_fails_and_the_rest_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(_subject: Ours) -> Iterator[Point]:
        yield Point(1, 0.0)
        raise RuntimeError("on\ntwo lines")

    def holds(_subject: Ours) -> Iterator[Point]:
        yield Point(1, 0.0)

    chosen = [Property(measure.__name__, "", measure, lambda _: 0.0) for measure in (raises, holds)]
    monkeypatch.setattr(judge, "ALL", chosen)
    first, second = judge.check(Ours(torch.arange(64)))[0]
    assert (first.passed, first.deviation, first.detail) == (False, None, "RuntimeError: on two lines")
    assert (second.passed, second.deviation) == (True, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    bad = torch.tensor([value])
    assert deviation(bad, bad) == math.inf
    assert not Result("key", "name", math.inf, 1.0, "").passed
    net = Net(ours.build().module)
    net.layers.final_norm.register_forward_hook(lambda _module, _args, out: out * value)
    with pytest.raises(ArithmeticError, match="not finite"):
        _ = Subject(net, net.inputs(3, 64)).of_calls


def test_table_json_and_plot_show_the_same(tmp_path: Path) -> None:
    point = Point(7, 1.5e-3, "somewhere")
    rows = [
        ("a good one", 1.5e-3, 2.5e-3, "1.5e-03 2.5e-03 pass", True),
        ("a bad one", 5e-3, 2.5e-3, "5.0e-03 2.5e-03 FAIL", False),
        ("not a number", math.inf, 2.5e-3, "inf/nan 2.5e-03 FAIL", False),
        ("an error", None, None, "error error FAIL", False),
    ]
    results = tuple(Result(name, name, apart, tolerance, "7 to 7", (point,)) for name, apart, tolerance, _, _ in rows)
    run = dict.fromkeys(("device", "dtype", "max_len", "text", "model", "torch", "seconds"), 1)
    outcome = report.outcome(results, (), run, logit_factor=4.0, tested=[], notes=[])
    lines, fields = report.table(outcome).splitlines(), json.loads(report.document(outcome))
    report.plot(outcome, str(tmp_path / "plot.svg"))
    plot = xml.etree.ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert plot.tag.endswith("svg")
    assert not fields["passed"]
    for (name, apart, tolerance, words, passed), found in zip(rows, fields["results"]):
        (line,) = (line for line in lines if line.startswith(name))
        assert line.split(name)[1].split()[:3] == words.split()
        shown = None if apart == math.inf else apart
        assert (found["deviation"], found["tolerance"], found["passed"]) == (shown, tolerance, passed)


# where it is broken

_forward, _layers = upstream.RotaryEmbedding.forward, upstream.AttentionLayers.forward


def center_of_all_positions(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    return _forward(self, t)


def keys_before_the_queries_one_off(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    return _forward(self, t - (t < offset).long(), offset, seq_len)


def raises_with_mems(self: Any, *args: Any, mems: Any = None, **kwargs: Any) -> Any:
    assert mems is None, "no mems today"
    return _layers(self, *args, **kwargs)


def keys_without_decay(self: Any, *args: Any, right: Any = upstream.XPosTable.with_factors) -> Any:
    table = right(self, *args)
    q_factor, k_factor = table.factors
    table.factors = (q_factor, k_factor / k_factor.abs())
    return table


DECODING = {"cached-whole", "cached-new", "chunked", "mems", "scores-cache"}


@pytest.mark.parametrize(
    ("place", "broken", "must_fail", "must_pass"),
    [
        ("RotaryEmbedding.forward", center_of_all_positions, {"scores-cache"}, {"prefix", "scores"}),
        ("RotaryEmbedding.forward", keys_before_the_queries_one_off, DECODING, {"prefix", "scores"}),
        ("XPosTable.with_factors", keys_without_decay, {"prefix", "scores", *DECODING}, {"shift"}),
        ("AttentionLayers.forward", raises_with_mems, {"mems"}, KEYS - {"mems"}),
    ],
)
def test_a_broken_package_fails_where_it_is_broken(
    place: str, broken: Any, must_fail: set[str], must_pass: set[str], monkeypatch: pytest.MonkeyPatch, tool: Tool
) -> None:
    name, method = place.split(".")
    monkeypatch.setattr(getattr(upstream, name), method, broken)
    monkeypatch.setattr(judge, "ALL", [prop for prop in PROPERTIES if prop.key in must_fail | must_pass])
    status, fields = tool.check(*SHORT)
    assert status == 1
    assert must_fail <= failed(fields)
    assert not must_pass & failed(fields)


def test_the_unpatched_release_is_told_from_the_fork(tmp_path: Path) -> None:
    result = process(tmp_path, *SHORT, path=pristine_tree())
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("UNPATCHED ") == 2
    assert "RotaryEmbedding.forward takes no seq_len" in result.stdout
    rows = {line[: line.index("  ")]: " FAIL " in line for line in result.stdout.splitlines() if "  " in line}
    assert rows["shift of positions"]
    assert rows["scores, long cache"]
    assert not rows["prefix consistency"]


@pytest.mark.slow
def test_a_modified_package_is_told_although_every_property_holds(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    with (tmp_path / PACKAGE.name / "attend.py").open("a", encoding="utf-8") as file:
        file.write("\n# a note\n")
    result = process(tmp_path, *SHORT, path=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "MODIFIED  not as they were built: x_transformers/attend.py" in result.stdout
    assert f"all {len(KEYS)} properties hold, but the package is MODIFIED" in result.stdout
