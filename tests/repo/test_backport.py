"""The line 1.27.x: its tests and the check, on the package that its build gives.

test_build.py, test_regressions.py and test_mutations.py are about both lines; test_documents.py installs this one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import process
from outcomes import run
from trees import BACKPORT, ROOT, patched_tree, pristine_tree

HALF = [pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "float16")]


def test_its_tests_pass(tmp_path: Path) -> None:
    package = f"--package={patched_tree(BACKPORT)}"
    outcomes = run(tmp_path, package, "tests/xpos/every_line", HYPOTHESIS_PROFILE="quick")
    assert [outcome for outcome in outcomes if outcome.failure is not None] == []


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_check_passes_and_names_what_the_release_has_no_argument_for(dtype: str, tmp_path: Path) -> None:
    result = process(tmp_path, "--max-len", "128", "--json", "--dtype", dtype, path=patched_tree(BACKPORT))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["passed"]
    assert (found["package"]["version"], found["package"]["line"]) == ("1.27.5+xpos.1", BACKPORT.name)
    assert {"mems", "scores-cache", "mem-kv", "range", "refusals"} < {row["key"] for row in found["results"]}
    assert {row["key"] for row in found["left_out"]} == {"cached-new", "shift"}


def test_check_of_the_pristine_release(tmp_path: Path) -> None:
    result = process(tmp_path, "--max-len", "128", path=pristine_tree(BACKPORT))
    assert result.returncode == 1, result.stderr
    assert "UNPATCHED RotaryEmbedding.forward takes no seq_len" in result.stdout
    assert "14 of 14 properties FAIL; the package is UNPATCHED" in result.stdout
    assert "left out  cached-new: this release of x-transformers lacks the argument" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(ROOT) not in line) <= 100
