"""`python -m x_transformers.xpos`: it passes on the package, fails on broken ones, and ends without a traceback."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PACKAGE, SHORT, Capture, Patch, no_decay_before_the_center, process, run
from trees import LINE, ROOT, clean_environment, hatch_build, pristine_tree

from x_transformers import x_transformers as upstream
from x_transformers.xpos import build_record, checker
from x_transformers.xpos.checker import OWN_MODELS, check_model, properties, runs, samples
from x_transformers.xpos.checker.report import LeftOut, Report, Result, package
from x_transformers.xpos.checker.runs import Case, deviation

PROPERTIES = properties.ALL
KEYS = [prop.key for prop in PROPERTIES]


# on the package itself


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", pytest.param("float64", marks=pytest.mark.slow)])
def test_every_property_holds(dtype: str, capsys: Capture) -> None:
    status, out, err = run(capsys, *SHORT, "--json", "--dtype", dtype)
    fields = json.loads(out)
    results = fields["results"]
    assert (status, fields["passed"], fields["run"]["dtype"]) == (0, True, dtype), results
    assert [result["key"] for result in results] == KEYS
    for result in results:
        assert result["deviation"] == max(point["deviation"] for point in result["points"]) <= result["tolerance"]
    compared = [f"{prop.key}: {prop.compared}" for prop in PROPERTIES]
    assert err.splitlines() == [f"[{number}/{len(KEYS)}] {line}" for number, line in enumerate(compared, 1)]


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


# what it reports


def a_report(*results: Result) -> Report:
    run = {"device": "cpu", "dtype": "float32", "torch": "2", "factor": 4.0, "seconds": 1.0}
    lacked = [LeftOut(key, "this", "a reason that takes more than one line " * 4) for key in ("one", "other")]
    return Report(results, tuple(lacked), run, package(), ("what is checked " * 10,), ("a note " * 20,))


def test_table_and_json_show_the_same() -> None:
    rows: dict[str, tuple[float | None, float | None]] = {
        "pass 1.5e-03 2.5e-03": (1.5e-3, 2.5e-3),
        "FAIL 5.0e-03 2.5e-03": (5e-3, 2.5e-3),
        "FAIL inf 2.5e-03": (math.inf, 2.5e-3),
        "FAIL error error": (None, None),
    }
    results = [Result(words, "this", *numbers, "7 to 7") for words, numbers in rows.items()]
    results += [Result(prop.key, prop.compared, 1e-5, 1e-4, "") for prop in PROPERTIES]
    found = a_report(*results)
    lines, fields = str(found).splitlines(), json.loads(found.to_json())
    assert max(len(line) for line in lines if str(PACKAGE) not in line) <= 100
    assert {f"          {name}" for name in hatch_build.read_series(ROOT / LINE)} < {*lines}
    assert "left out  one, other: a reason" in str(found)
    assert (found.failures, fields["passed"]) == (tuple(results[1:4]), False)
    assert f"3 of {len(results)} properties FAIL" in lines[-1]
    for (words, (apart, tolerance)), result in zip(rows.items(), fields["results"]):
        (number,) = (number for number, line in enumerate(lines) if line.endswith(f"{words}: this"))
        passed = words.startswith("pass")
        assert lines[number].split()[:3] == words.split()
        assert ("7 to 7" in lines[number + 1]) is not passed
        shown = None if apart == math.inf else apart
        assert (result["deviation"], result["tolerance"], result["passed"]) == (shown, tolerance, passed)


@pytest.mark.parametrize(
    ("gives", "passed", "said"),
    [
        ({}, True, ["the files are as they were built", "all 1 properties hold"]),
        ({"read_record": None}, True, ["unknown build: the package has no record of it"]),
        ({"modified_files": ("a.py",)}, False, ["not as they were built: a.py", "hold; the package is MODIFIED since"]),
    ],
)
def test_the_build_is_named(gives: dict[str, Any], passed: bool, said: list[str], monkeypatch: Patch) -> None:
    for name, value in gives.items():
        monkeypatch.setattr(build_record, name, lambda _package, value=value: value)
    found = a_report(Result("key", "this", 0.0, 1.0, ""))
    assert found.passed is passed
    assert [words for words in said if words not in str(found)] == []


def test_what_is_not_finite_never_passes() -> None:
    for value in (math.nan, math.inf):
        assert deviation(torch.tensor([value]), torch.tensor([value])) == math.inf
    assert not Result("key", "this", math.inf, 1.0, "").passed
    model = samples.build()
    model.layers.final_norm.register_forward_hook(lambda _module, _args, out: out * math.inf)
    with pytest.raises(ArithmeticError, match="not finite"):
        Case(model, model.text(1, 64)).tolerance("calls")


# where it is broken

_forward, _layers, _prefill = upstream.RotaryEmbedding.forward, upstream.AttentionLayers.forward, runs.prefill


def center_of_all_positions(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    return _forward(self, t)


def keys_before_the_queries_one_off(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    return _forward(self, t - (t < offset).long(), offset, seq_len)


def one_more(*args: Any, **kwargs: Any) -> Any:
    return _prefill(*args, **kwargs)[0] + 1, None


def raises_with_mems(self: Any, *args: Any, mems: Any = None, **kwargs: Any) -> Any:
    if mems is not None:
        raise RuntimeError("no mems\ntoday")
    return _layers(self, *args, **kwargs)


DECODING = {"cached-whole", "cached-new", "chunked", "mems", "scores-cache"}


@pytest.mark.parametrize(
    ("place", "name", "broken", "must_fail", "must_pass"),
    [
        (upstream.RotaryEmbedding, "forward", center_of_all_positions, {"scores-cache"}, {"prefix", "scores"}),
        (upstream.RotaryEmbedding, "forward", keys_before_the_queries_one_off, DECODING, {"prefix", "scores"}),
        (upstream.RotaryEmbedding, "forward", no_decay_before_the_center, {"prefix", "scores", *DECODING}, {"shift"}),
        (upstream.AttentionLayers, "forward", raises_with_mems, {"mems"}, {*KEYS} - {"mems"}),
        # the check measures the one that users call
        (runs, "prefill", one_more, {"chunked"}, {"prefix", "mems"}),
    ],
)
def test_a_broken_package_fails_where_it_is_broken(
    place: Any, name: str, broken: Any, must_fail: set[str], must_pass: set[str], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(place, name, broken)
    monkeypatch.setattr(properties, "ALL", [prop for prop in PROPERTIES if prop.key in must_fail | must_pass])
    report = check_model(OWN_MODELS, max_len=32)
    failed = {each.key: each for each in report.failures}
    assert must_fail <= failed.keys()
    assert not must_pass & failed.keys()
    if broken is raises_with_mems:
        assert (failed["mems"].deviation, failed["mems"].error) == (None, "RuntimeError: no mems today")


def test_the_unpatched_release_is_told_from_the_fork(tmp_path: Path) -> None:
    result = process(tmp_path, *SHORT, path=pristine_tree())
    assert result.returncode == 1, result.stderr
    assert "UNPATCHED RotaryEmbedding.forward takes no seq_len" in result.stdout
    assert "the package is UNPATCHED: it is upstream's, not the fork" in result.stdout
    verdicts = {key: verdict for verdict, key in re.findall(r"^(pass|FAIL) .+?  (\S+): ", result.stdout, re.M)}
    assert {verdicts[key] for key in ("shift", "scores-cache", "range")} == {"FAIL"}
    assert verdicts["prefix"] == "pass"
    limits = process(tmp_path, "limits", path=pristine_tree())
    assert limits.returncode == 2
    assert "install the fork" in limits.stderr


# the process


def test_without_asserts_what_is_one_is_left_out(tmp_path: Path) -> None:
    found = process(tmp_path, *SHORT, python=("-O",))
    assert found.returncode == 0, found.stderr
    assert f"all {len(KEYS) - 1} properties hold" in found.stdout
    assert "left out  refusals: these refusals are assert statements, which python -O removes" in found.stdout


def test_an_interrupt_is_no_traceback(monkeypatch: Patch, capsys: Capture) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checker, "check_model", interrupt)
    assert run(capsys, *SHORT) == (130, "", "\ninterrupted\n")


def test_in_a_checkout_that_is_not_installed_the_reason_is_one_line() -> None:
    # without site-packages, so that nothing is installed; the checkout has no x_transformers/__init__.py
    words = [sys.executable, "-S", "-m", "x_transformers.xpos", "limits"]
    found = subprocess.run(words, cwd=ROOT, env=clean_environment(), text=True, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1), found.stderr
    assert re.search("x_transformers is not installed in this environment.*Run `pip install .`", found.stderr)


@pytest.mark.parametrize("arguments", ["limits", "--help"])
def test_a_standard_output_that_is_closed_is_no_traceback(arguments: str) -> None:
    command = f"'{sys.executable}' -m x_transformers.xpos {arguments}"
    # buffered, so that what is left is written at exit
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    # in the first the reader is gone before anything is written
    for line in (f"({command}; echo $? >&2) | true", f"{command} >&-; echo $? >&2"):
        found = subprocess.run(["bash", "-c", line], env=environment, text=True, capture_output=True)
        assert found.stderr.endswith("0\n"), found.stderr
        assert not re.search("Traceback|Exception", found.stderr)


@pytest.mark.parametrize("arguments", [[], ["check"], ["limits"]])
@pytest.mark.parametrize("setting", [("COLUMNS", "40"), ("FORCE_COLOR", "1")])
def test_help_has_examples_and_the_exit_status(
    arguments: list[str], setting: tuple[str, str], capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setenv(*setting)
    status, out, _ = run(capsys, *arguments, "--help")
    assert status == 0
    assert "examples:\n  python -m x_transformers.xpos" in re.sub("\x1b.*?m", "", out)
    assert re.search("exit status:.*130", out, re.S)
    assert max(map(len, out.splitlines())) <= 120
