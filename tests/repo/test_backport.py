"""The line 1.27.x: its tests and the check, on the package that its build gives and on the pristine release.

What a build gives and refuses is in test_build.py, for both lines; test_documents.py installs it as README says.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import process
from outcomes import run
from trees import BACKPORT, ROOT, patched_tree, pristine_tree

TESTS = "tests/xpos/line_1_27"
NAME_ERROR = "NameError: name 'seq_len' is not defined"
HALF = ("bfloat16", "float16")
LEFT_OUT = {"cached-new", "shift"}


def test_its_tests_pass(tmp_path: Path) -> None:
    outcomes = run(tmp_path, f"--package={patched_tree(BACKPORT)}", TESTS, HYPOTHESIS_PROFILE="quick")
    assert len(outcomes) > 50
    assert [outcome for outcome in outcomes if outcome.failure is not None] == []


def test_regression_tests_fail_on_the_pristine_release(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """With the NameError alone: until that is out of the way nothing else can be wrong."""
    outcomes = run(tmp_path, f"--package={pristine_tree(BACKPORT)}", TESTS, HYPOTHESIS_PROFILE="pristine")
    assert len([outcome for outcome in outcomes if outcome.reason]) > 40
    for name, reason, failure in outcomes:
        with subtests.test(name):
            assert failure == (NAME_ERROR if reason else None)


@pytest.mark.parametrize("dtype", ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in HALF)])
def test_check_passes_and_names_what_the_release_has_no_argument_for(dtype: str, tmp_path: Path) -> None:
    result = process(tmp_path, "--max-len", "128", "--json", "--dtype", dtype, path=patched_tree(BACKPORT))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["passed"]
    assert (found["package"]["version"], found["package"]["line"]) == ("1.27.5+xpos.1", BACKPORT.name)
    assert {"mems", "scores-cache", "mem-kv", "range", "refusals"} < {row["key"] for row in found["results"]}
    assert {row["key"] for row in found["left_out"]} == LEFT_OUT


def test_check_of_the_pristine_release(tmp_path: Path) -> None:
    result = process(tmp_path, "--max-len", "128", path=pristine_tree(BACKPORT))
    assert result.returncode == 1, result.stderr
    assert "UNPATCHED RotaryEmbedding.forward takes no seq_len" in result.stdout
    assert "13 of 13 properties FAIL; the package is UNPATCHED" in result.stdout
    assert "left out  cached-new: this release of x-transformers lacks the argument" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(ROOT) not in line) <= 100
