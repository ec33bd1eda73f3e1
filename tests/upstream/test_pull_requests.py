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
from outcomes import run
from pristine import pristine_imports
from trees import LINE, PARTS, ROOT, TESTS_PATCHES, built_tree, hatch_build, patched_tree, pristine_tree, tree_up_to


def outcomes(tests: Path, tree: Path, directory: Path) -> dict[str, bool]:
    """Whether each test of a folder passes on the package in a tree."""
    # not from the repository itself, whose own package would be found first
    alone = ("-c", os.devnull, f"--rootdir={tests}", str(tests))
    return {name: failure is None for name, _, failure in run(directory, *alone, cwd=directory, PYTHONPATH=str(tree))}


@pytest.mark.parametrize("part", TESTS_PATCHES)
def test_tests_of_a_pull_request_fail_without_it_and_pass_with_it(part: str, tmp_path: Path) -> None:
    for each, patch in TESTS_PATCHES.items():
        if each <= part:
            assert hatch_build.git_apply(patch.read_bytes(), tmp_path, "--apply", "--whitespace=error") == (0, "")
    before = max((each for each in TESTS_PATCHES if each < part), default="")
    without, with_it = (outcomes(tmp_path / "tests", tree_up_to(last), tmp_path) for last in (before, part))
    assert with_it == dict.fromkeys(without, True)
    message = " ".join(TESTS_PATCHES[part].read_text(encoding="utf-8").partition("---")[0].split())
    failed = [*without.values()].count(False)
    # a cache is a value before it is appended to, and has to stay one
    assert f"All {failed} fail without" in message or f"{failed} of these {failed + 1} fail" in message

    if part == "A":  # its first patch alone gives one center to each row of queries
        alone = outcomes(tmp_path / "tests", built_tree(LINE, PARTS["A"][:1]), tmp_path)
        ended = {name.partition("::test_xpos_")[2] for name in alone if alone[name] > without[name]}
        assert ended == {"decoding_on_a_long_context", "rows_with_their_own_positions"}


# the code of each reproduction in the texts of the pull requests
TEXTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / LINE / "pull-requests").glob("?.md")))
REPRODUCTIONS = [textwrap.dedent(c) for c in re.findall(r"^ *```python\n(.*?)^ *```", TEXTS, re.DOTALL | re.MULTILINE)]


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
    names = re.findall(r"^\d\. .*\((\d{4})\)$", TEXTS, re.MULTILINE)
    assert names == ["0001", "0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0012"]
    assert len(REPRODUCTIONS) == len(names)


@pytest.mark.parametrize("code", REPRODUCTIONS, ids=range(len(REPRODUCTIONS)))
def test_a_reproduction_prints_what_it_says_before_the_series_and_after(code: str) -> None:
    assert len(code.splitlines()) <= 10
    with pristine_imports():
        before = prints(code)
    for says, printed in zip(code.rpartition(" # ")[2].strip().split(" -> "), (before, prints(code)), strict=True):
        if says == "nan" or says.endswith("Error"):
            assert printed == says
        else:
            # By how much it differs depends on the random numbers, which are not the same for every version of torch.
            # Outputs are below 8, where a rounding error of float32 is 5e-7, and some are added up.
            assert float(printed) > 1e-2 if float(says) > 1e-2 else float(printed) < 1e-5


@pytest.mark.slow
def test_upstreams_own_tests_give_what_they_give_on_the_unpatched_release(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    clone = request.config.getoption("upstream")
    if clone is None:
        pytest.skip("needs a clone of upstream's repository, which no release contains: --upstream DIR")
    patched, pristine = (outcomes(clone / "tests", tree, tmp_path) for tree in (patched_tree(), pristine_tree()))
    assert len(patched) > 100
    assert patched == pristine
