"""What goes upstream: the series as commits, tests of its own beside it, and upstream's own tests as they were."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from packaging_support import LINE, ROOT, clean_environment, git, hatch_build, pristine_tree
from pristine import pristine_imports

import x_transformers

FORK = Path(x_transformers.__file__).parent.parent
(TESTS_PATCH,) = (ROOT / LINE / "tests-for-upstream").glob("*.patch")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the pinned release, to which the series and the patch with tests were applied by git am."""
    release = hatch_build.fetch_release(ROOT / LINE / "upstream.txt")
    repository = tmp_path_factory.mktemp("upstream")
    hatch_build.write_files(release.files, repository)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "the pinned release"]):
        assert git(repository, *command).returncode == 0
    patches = [*(ROOT / LINE / name for name in hatch_build.read_series(ROOT / LINE)), TESTS_PATCH]
    result = git(repository, "am", *map(str, patches))
    assert result.returncode == 0, result.stderr
    # not a word about whitespace, a three-way merge or a fuzz
    assert result.stderr == ""
    return repository


def outcomes(tests: Path, tree: Path, directory: Path) -> dict[str, str]:
    """Passed or failed, by test, of a folder of tests on the package in a tree."""
    report = directory / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += [f"--rootdir={tests}", "-c", os.devnull, str(tests)]
    environment = clean_environment(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
    # not from the repository itself, whose own package would be found first
    result = subprocess.run(command, cwd=directory, env=environment, text=True, capture_output=True)
    assert result.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), result.stdout + result.stderr
    return {
        f"{case.get('classname')}::{case.get('name')}": next((child.tag for child in case), "passed")
        for case in xml.etree.ElementTree.parse(report).iter("testcase")
    }


def test_the_patch_with_tests_adds_nothing_but_tests(repository: Path) -> None:
    changed = git(repository, "show", "--numstat", "--format=%s").stdout.splitlines()
    assert changed[0] == "Test that xpos is the same at every length"
    assert [line.split("\t")[1:] for line in changed[1:] if line] == [["0", "tests/test_xpos.py"]]


def test_its_tests_fail_without_the_series_and_pass_with_it(repository: Path, tmp_path: Path) -> None:
    tests = repository / "tests"
    patched = outcomes(tests, repository, tmp_path)
    pristine = outcomes(tests, pristine_tree(), tmp_path)

    assert patched.keys() == pristine.keys()
    assert {*patched.values()} == {"passed"}
    assert {*pristine.values()} == {"failure"}
    stated = re.search(r"All (\d+) fail without", TESTS_PATCH.read_text(encoding="utf-8"))
    assert stated is not None
    assert int(stated[1]) == len(patched)


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
