"""What goes upstream: tests beside the series, the text of the pull requests, and upstream's own tests as they were."""

from __future__ import annotations

import contextlib
import io
import os
import re
import textwrap
from pathlib import Path

import pytest
import torch
from packaging_support import ROOT, hatch_build, pristine_tree
from pristine import pristine_imports
from test_patches import TESTS_PATCH
from test_regressions import run

import x_transformers

FORK = Path(x_transformers.__file__).parent.parent


def outcomes(tests: Path, tree: Path, directory: Path) -> dict[str, bool]:
    """Whether each test of a folder passes on the package in a tree."""
    # not from the repository itself, whose own package would be found first
    alone = ("-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tests}", str(tests))
    return {name: failure is None for name, _, failure in run(directory, *alone, cwd=directory, PYTHONPATH=str(tree))}


def test_the_patch_with_tests_adds_those_that_fail_without_the_series_and_pass_with_it(tmp_path: Path) -> None:
    said = hatch_build.git_apply(TESTS_PATCH.read_bytes(), tmp_path, "--apply", "--summary", "--whitespace=warn")
    assert said == (0, " create mode 100644 tests/test_xpos.py\n")
    patched, pristine = (outcomes(tmp_path / "tests", tree, tmp_path) for tree in (FORK, pristine_tree()))

    assert patched.keys() == pristine.keys()
    assert {*patched.values()} == {True}
    assert {*pristine.values()} == {False}
    assert f"All {len(patched)} fail without" in TESTS_PATCH.read_text(encoding="utf-8")


# the code of each reproduction in the text of the pull request
TEXT = (ROOT / "patches" / "README.md").read_text(encoding="utf-8").partition("### The text of the pull request")[2]
QUOTED = re.sub(r"^> ?", "", TEXT, flags=re.MULTILINE)
REPRODUCTIONS = [textwrap.dedent(c) for c in re.findall(r"^ *```python\n(.*?)^ *```", QUOTED, re.DOTALL | re.MULTILINE)]


def prints(code: str) -> str:
    """Its last line, or the error that it ends with."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(code, {})
        except Exception as error:
            print(type(error).__name__)
    return printed.getvalue().splitlines()[-1]


def test_all_patches_but_those_on_speed_and_shards_have_a_reproduction() -> None:
    names = re.findall(r"^\d\. .*\((\d{4})\)$", QUOTED, re.MULTILINE)
    assert names == ["0001", "0001", "0001", "0002", "0003", "0004", "0005", "0006", "0007"]
    assert len(REPRODUCTIONS) == len(names)


@pytest.mark.parametrize("code", REPRODUCTIONS, ids=range(len(REPRODUCTIONS)))
def test_a_reproduction_prints_what_it_says_before_the_series_and_after(code: str) -> None:
    assert len(code.splitlines()) <= 10
    with pristine_imports():
        before = prints(code)
    for says, printed in zip(code.rpartition(" # ")[2].strip().split(" -> "), (before, prints(code)), strict=True):
        if says == "nan" or says.endswith("Error"):
            assert printed == says
        elif float(says) > 1e-2:
            # by how much depends on the random numbers, which are not the same for every version of torch
            assert float(printed) > 1e-2
        else:
            # outputs are below 8, where a rounding error of float32 is 5e-7, and some are added up
            assert float(printed) < 1e-5


@pytest.mark.slow
def test_upstreams_own_tests_give_what_they_give_on_the_unpatched_release(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    clone = request.config.getoption("upstream")
    if clone is None:
        pytest.skip("needs a clone of upstream's repository, which no release contains: --upstream DIR")
    patched = outcomes(clone / "tests", FORK, tmp_path)

    assert len(patched) > 100
    assert patched == outcomes(clone / "tests", pristine_tree(), tmp_path)
