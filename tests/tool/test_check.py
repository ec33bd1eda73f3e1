"""`python -m x_transformers.xpos`: it passes on the package, refuses what it cannot do, and fails on broken ones."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PACKAGE, SHORT, Tool, failed, no_decay_before_the_center, process
from trees import ROOT, hatch_build, pristine_tree

from x_transformers import x_transformers as upstream
from x_transformers.xpos import build_record
from x_transformers.xpos import checker as checker
from x_transformers.xpos.checker import OWN_MODELS, check_model, formula, properties, runs, samples
from x_transformers.xpos.checker.models import find
from x_transformers.xpos.checker.properties import Point, Property
from x_transformers.xpos.checker.report import Report, Result, package
from x_transformers.xpos.checker.runs import Case, deviation

LINE = ROOT / "patches" / "2.x"
PROPERTIES = properties.ALL
KEYS = {prop.key for prop in PROPERTIES}


def own_case(**options: Any) -> Case:
    (model,) = find(samples.build(**options).module).values()
    return Case(model, samples.texts(64))


# on the package itself


def test_every_property_holds(tool: Tool) -> None:
    status, out, err = tool.run(*SHORT)
    assert status == 0, out
    assert out.count("\npass  ") == len(KEYS)
    assert f"all {len(KEYS)} properties hold" in out
    assert "the files are as they were built" in out
    assert str(PACKAGE) in out
    assert all(name in out for name in hatch_build.read_series(LINE))
    assert max(len(line) for line in out.splitlines() if str(PACKAGE) not in line) <= 100
    compared = [f"{prop.key}: {prop.compared}" for prop in PROPERTIES]
    assert err.splitlines() == [f"[{number}/{len(KEYS)}] {line}" for number, line in enumerate(compared, 1)]
    assert [line for line in compared if f"  {line}\n" not in out] == []


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
        ("--max-len 31", ["max_len is 31", "from 32 to 29008"]),
        ("--max-len 100000 --dtype float16", ["max_len is 100000", "from 32 to 4532", "range of float16"]),
        ("--device no-such", ["device = 'no-such'"]),
        ("--device cuda:99", ["device = 'cuda:99'"]),
        ("--device meta", ["device = 'meta'"]),
        ("--max 128", ["--max"]),
        ("no-such-command", ["no-such-command", "check"]),
        ("limits --dim 2", ["dim is 2", "from 3 on"]),
        ("limits --scale-base 0", ["scale_base is 0", "above 0"]),
        ("limits --scale-base nan", ["scale_base is nan", "above 0"]),
        ("limits --length 0", ["length is 0", "at least 1"]),
    ],
)
def test_refusals_name_the_argument_and_a_way_out(arguments: str, expected: list[str], tool: Tool) -> None:
    message = tool.refusal(*arguments.split())
    assert [words for words in expected if words not in message] == [], message


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, tool: Tool) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checker, "check_model", interrupt)
    assert tool.run(*SHORT) == (130, "", "\ninterrupted\n")


def test_in_a_checkout_that_is_not_installed_the_reason_is_one_line() -> None:
    # without site-packages, so that nothing is installed; the checkout has no x_transformers/__init__.py
    words = [sys.executable, "-S", "-m", "x_transformers.xpos", "limits"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(words, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1), found.stderr
    assert "x_transformers is not installed in this environment" in found.stderr
    assert "Run `pip install .`" in found.stderr


@pytest.mark.parametrize("arguments", ["limits", "--help"])
def test_a_standard_output_that_is_closed_is_no_traceback(arguments: str) -> None:
    run = f"'{sys.executable}' -m x_transformers.xpos {arguments}"
    # buffered, so that what is left is written at exit
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    # in the first the reader is gone before anything is written
    for line in (f"({run}; echo $? >&2) | true", f"{run} >&-; echo $? >&2"):
        found = subprocess.run(["bash", "-c", line], env=environment, text=True, capture_output=True)
        assert found.stderr.endswith("0\n"), found.stderr
        assert "Traceback" not in found.stderr
        assert "Exception" not in found.stderr


def test_without_asserts_what_is_one_is_left_out() -> None:
    chosen = (
        "from x_transformers.xpos.checker import *\n"
        "properties.ALL = [prop for prop in properties.ALL if prop.key in ('prefix', 'refusals')]\n"
        "print(check_model(OWN_MODELS, max_len=32))"
    )
    found = process(ROOT, python=("-O", "-c", chosen))
    assert "all 1 properties hold" in found.stdout, found.stderr
    assert "left out  refusals: these refusals are assert statements, which python -O removes" in found.stdout


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
def test_own_models_hide_nothing_and_touch_nothing() -> None:
    """No parameter is left at zero or one, attention is far from uniform, and a seed gives the same weights."""
    state = torch.random.get_rng_state()
    model, again = samples.build(flash=False), samples.build(flash=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.module.parameters(), again.module.parameters()))
    assert [name for name, parameter in model.module.named_parameters() if parameter.std() == 0] == []
    _, attention = model.module(torch.arange(64)[None], return_attn=True)
    assert all(layer[0, :, -1].max() > 8 / 64 for layer in attention)


def test_chunks_are_measured_by_the_public_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def prefill(module: Any, tokens: Any, chunk_size: int) -> Any:
        sizes.append(chunk_size)
        return module(tokens), None

    monkeypatch.setattr(runs, "prefill", prefill)
    assert all(point.deviation == 0 for point in properties.chunks(own_case()))
    assert sizes == [64 // 4, 64 // 7]


def test_a_property_that_raises_fails_and_the_rest_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(_case: Case) -> Iterator[Point]:
        yield Point(1, 0.0)
        raise RuntimeError("on\ntwo lines")

    def holds(_case: Case) -> Iterator[Point]:
        yield Point(1, 0.0)

    chosen = [Property(measure.__name__, "this", measure, lambda _: 0.0) for measure in (raises, holds)]
    monkeypatch.setattr(properties, "ALL", chosen)
    found = check_model(OWN_MODELS, max_len=32)
    first, second = found.results
    assert (first.passed, first.deviation, first.detail) == (False, None, "RuntimeError: on two lines")
    assert (second.passed, second.deviation) == (True, 0.0)
    assert (found.passed, found.failures) == (False, (first,))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    bad = torch.tensor([value])
    assert deviation(bad, bad) == math.inf
    assert not Result("key", "this", math.inf, 1.0, "").passed
    case = own_case()
    case.model.layers.final_norm.register_forward_hook(lambda _module, _args, out: out * value)
    with pytest.raises(ArithmeticError, match="not finite"):
        _ = case.tolerance("calls")


def a_report(*results: Result) -> Report:
    run = {"device": "cpu", "dtype": "float32", "torch": "2", "factor": 4.0, "seconds": 1.0}
    return Report(results, (), run, package())


def test_table_and_json_show_the_same() -> None:
    point = Point(7, 1.5e-3, "somewhere")
    rows = [
        ("a good one", 1.5e-3, 2.5e-3, "pass 1.5e-03 2.5e-03", True),
        ("a bad one", 5e-3, 2.5e-3, "FAIL 5.0e-03 2.5e-03", False),
        ("not a number", math.inf, 2.5e-3, "FAIL inf 2.5e-03", False),
        ("an error", None, None, "FAIL error error", False),
    ]
    results = [Result(name, "this", apart, tolerance, "7 to 7", (point,)) for name, apart, tolerance, _, _ in rows]
    found = a_report(*results)
    lines, fields = str(found).splitlines(), json.loads(found.to_json())
    assert not fields["passed"]
    assert [each.key for each in found.failures] == [name for name, *_, passed in rows if not passed]
    for (name, apart, tolerance, words, passed), result in zip(rows, fields["results"]):
        (number,) = (number for number, line in enumerate(lines) if line.endswith(f"{name}: this"))
        assert lines[number].split()[:3] == words.split()
        assert ("7 to 7" in lines[number + 1]) is not passed
        shown = None if apart == math.inf else apart
        assert (result["deviation"], result["tolerance"], result["passed"]) == (shown, tolerance, passed)


# where it is broken

_forward, _layers = upstream.RotaryEmbedding.forward, upstream.AttentionLayers.forward


def center_of_all_positions(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    return _forward(self, t)


def keys_before_the_queries_one_off(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    return _forward(self, t - (t < offset).long(), offset, seq_len)


def raises_with_mems(self: Any, *args: Any, mems: Any = None, **kwargs: Any) -> Any:
    assert mems is None, "no mems today"
    return _layers(self, *args, **kwargs)


DECODING = {"cached-whole", "cached-new", "chunked", "mems", "scores-cache"}


@pytest.mark.parametrize(
    ("place", "broken", "must_fail", "must_pass"),
    [
        ("RotaryEmbedding.forward", center_of_all_positions, {"scores-cache"}, {"prefix", "scores"}),
        ("RotaryEmbedding.forward", keys_before_the_queries_one_off, DECODING, {"prefix", "scores"}),
        ("RotaryEmbedding.forward", no_decay_before_the_center, {"prefix", "scores", *DECODING}, {"shift"}),
        ("AttentionLayers.forward", raises_with_mems, {"mems"}, KEYS - {"mems"}),
    ],
)
def test_a_broken_package_fails_where_it_is_broken(
    place: str, broken: Any, must_fail: set[str], must_pass: set[str], monkeypatch: pytest.MonkeyPatch, tool: Tool
) -> None:
    name, method = place.split(".")
    monkeypatch.setattr(getattr(upstream, name), method, broken)
    monkeypatch.setattr(properties, "ALL", [prop for prop in PROPERTIES if prop.key in must_fail | must_pass])
    status, fields = tool.check(*SHORT)
    assert status == 1
    assert must_fail <= failed(fields)
    assert not must_pass & failed(fields)


def test_the_unpatched_release_is_told_from_the_fork(tmp_path: Path) -> None:
    result = process(tmp_path, *SHORT, path=pristine_tree())
    assert result.returncode == 1, result.stderr
    assert "UNPATCHED RotaryEmbedding.forward takes no seq_len" in result.stdout
    assert "the package is UNPATCHED: it is upstream's, not the fork" in result.stdout
    verdicts = {line.split()[3]: line.split()[0] for line in result.stdout.splitlines() if line[:4] in ("pass", "FAIL")}
    assert {verdicts[key] for key in ("shift:", "scores-cache:", "range:")} == {"FAIL"}
    assert verdicts["prefix:"] == "pass"

    limits = process(tmp_path, "limits", path=pristine_tree())
    assert limits.returncode == 2
    assert "install the fork" in limits.stderr


def test_a_patched_package_without_a_record_is_an_unknown_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_record, "read_record", lambda _package: None)
    found = a_report(Result("key", "this", 0.0, 1.0, ""))
    assert found.passed
    assert "build     unknown build: the package has no record of it" in str(found)
    assert "UNPATCHED" not in str(found)


@pytest.mark.slow
def test_a_modified_package_is_told_although_every_property_holds(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    with (tmp_path / PACKAGE.name / "attend.py").open("a", encoding="utf-8") as file:
        file.write("\n# a note\n")
    result = process(tmp_path, *SHORT, path=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "MODIFIED  these files are not as they were built: x_transformers/attend.py" in result.stdout
    assert f"all {len(KEYS)} properties hold; the package is MODIFIED since it was built" in result.stdout
