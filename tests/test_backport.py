"""The line 1.27.x, a package root in its own folder: how it installs, and its tests on what its build gives.

What a build gives and refuses is in test_build.py, for both lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging_support import (
    BACKPORT,
    ROOT,
    copy_project,
    git,
    patched_tree,
    pristine_tree,
    provenance,
)
from test_regressions import Outcome, read

VERSION = "1.27.5+xpos.1"
TESTS = ROOT / "tests" / "line_1_27"
NAME_ERROR = "NameError: name 'seq_len' is not defined"


# as README says; isolated, so the build's own requirements come from wherever the user's settings say
@pytest.mark.slow
@pytest.mark.parametrize(
    ("installer", "source"),
    [
        (["pip", "install"], "git+file://{checkout}#subdirectory=patches/1.27.x"),
        (["uv", "pip", "install", "--python", sys.executable], "{checkout}/patches/1.27.x"),
    ],
    ids=["pip, from git", "uv, from a folder"],
)
def test_install(installer: list[str], source: str, tmp_path: Path) -> None:
    checkout, target = copy_project(tmp_path / "checkout"), tmp_path / "target"
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        git(checkout, *command)
    arguments = ["--quiet", "--no-deps", "--target", str(target), source.format(checkout=checkout)]
    subprocess.run([sys.executable, "-m", *installer, *arguments], cwd=tmp_path, check=True)

    assert (target / f"x_transformers-{VERSION}.dist-info").is_dir()
    record = provenance.read_record(target / "x_transformers")
    assert record is not None
    assert record.line == BACKPORT.name
    assert provenance.modified_files(target / "x_transformers") == ()
    assert git(checkout, "status", "--short", "--ignored").stdout == ""


# its tests, on the line and on the pristine release


def run_tests(tree: Path, report: Path, **variables: str) -> tuple[int, list[Outcome]]:
    command = [sys.executable, "-m", "pytest", f"--package={tree}", "--tb=no", "-q", f"--junitxml={report}", str(TESTS)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert result.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), result.stdout + result.stderr
    return result.returncode, read(report)


def test_its_tests_pass(tmp_path: Path) -> None:
    status, outcomes = run_tests(patched_tree(BACKPORT), tmp_path / "report.xml")
    assert [(outcome.name, outcome.failure) for outcome in outcomes if outcome.failure is not None] == []
    assert status == pytest.ExitCode.OK
    assert len(outcomes) > 50


@pytest.mark.slow
def test_regression_tests_fail_on_the_pristine_release(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """With the NameError alone: until that is out of the way nothing else can be wrong."""
    _, outcomes = run_tests(pristine_tree(BACKPORT), tmp_path / "report.xml", HYPOTHESIS_PROFILE="pristine")
    assert len([outcome for outcome in outcomes if outcome.reason]) > 50
    for name, reason, failure in outcomes:
        with subtests.test(name):
            assert (failure == NAME_ERROR) if reason else (failure is None)


@pytest.mark.slow
def test_without_xpos_every_bit_is_upstreams_and_checkpoints_load_both_ways(tmp_path: Path) -> None:
    script = TESTS / "plain_outputs.py"
    trees = {"pristine": pristine_tree(BACKPORT), "patched": patched_tree(BACKPORT)}

    def run(tree: str, *arguments: str) -> None:
        path = os.pathsep.join([str(trees[tree]), str(ROOT / "tests")])
        command = [sys.executable, str(script), *arguments]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True)

    run("pristine", "0", "of pristine")
    run("patched", "1", "of patched", "of pristine", "patched given pristine")
    run("pristine", "2", "of neither", "of patched", "pristine given patched")

    for ours, theirs in (("pristine", "patched"), ("patched", "pristine")):
        expected = torch.load(tmp_path / f"of {ours}")["outputs"]
        found = torch.load(tmp_path / f"{theirs} given {ours}")
        assert found.keys() == expected.keys()
        for net in expected:
            assert found[net].keys() == expected[net].keys()
            differ = [name for name in expected[net] if not torch.equal(found[net][name], expected[net][name])]
            assert (net, differ) == (net, [])
            assert all(value.isfinite().all() for value in expected[net].values())


# the check


def run_check(tree: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "x_transformers.xpos", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=False)


LEFT_OUT = {"cached-new", "shift", "scores-shards", "added-kv", "context-pos"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_passes_and_names_what_the_release_has_no_argument_for(dtype: str, tmp_path: Path) -> None:
    result = run_check(patched_tree(BACKPORT), tmp_path, "--max-len", "128", "--json", "--dtype", dtype)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["passed"]
    assert (found["package"]["version"], found["package"]["line"]) == (VERSION, BACKPORT.name)
    assert {"mems", "greedy", "scores-cache", "mem-kv", "range", "refusals"} < {row["key"] for row in found["results"]}
    assert {row["key"] for row in found["left_out"]} == LEFT_OUT
    assert result.stderr.splitlines()[-1].startswith(f"[{len(found['results'])}/{len(found['results'])}]")


def test_check_of_the_pristine_release(tmp_path: Path) -> None:
    result = run_check(pristine_tree(BACKPORT), tmp_path, "--max-len", "128")
    assert result.returncode == 1, result.stderr
    assert "UNPATCHED there is no record of patches" in result.stdout
    assert "UNPATCHED RotaryEmbedding.forward takes no seq_len" in result.stdout
    assert "15 of 15 properties FAIL, and the package is UNPATCHED" in result.stdout
    assert "left out  cached decode, new token (input_not_include_cache); shift of positions (pos)" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(ROOT) not in line) <= 100
