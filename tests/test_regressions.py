"""That each test marked `regression` fails on the unpatched release, and for the reason that it gives."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging_support import ROOT

# What a failure says, by the reason in the mark. A TypeError, a missing name or a shape that does not fit would make a
# test fail as well, but would not show what is wrong with the answers.
_APART = r"\w+: \S+ apart"
_ARGUMENT = r"unexpected keyword argument '(rotary_window|seq_len)'"
REASONS = {
    "differs": rf"(AssertionError: )?(Tensor-likes are not close|Scalars are not close|assert |([^:]*: )?{_APART})",
    "not refused": r"Failed: DID NOT RAISE|AssertionError: (\S+: not refused with xPos|assert 'broken' == 'refused')",
    "no argument": rf"(AssertionError: .*: )?TypeError: \S+ got an {_ARGUMENT}",
}


class Outcome(NamedTuple):
    name: str
    # of its mark `regression`, empty if it has none
    reason: str
    # the first line of what it failed with, None if it passed
    failure: str | None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """The tests marked `regression`, run on the unpatched release."""
    report = tmp_path_factory.mktemp("pristine") / "report.xml"
    command = [sys.executable, "-m", "pytest", "--pristine", "-m", "regression", "--tb=no", f"--junitxml={report}"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    return read(report)


def read(report: Path) -> list[Outcome]:
    found = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        properties = {prop.get("name"): prop.get("value", "") for prop in case.iter("property")}
        failure = case.find("failure")
        message = None if failure is None else failure.get("message", "").splitlines()[0]
        found.append(Outcome(f"{case.get('classname')}::{case.get('name')}", properties.get("regression", ""), message))
    return found


def test_every_regression_test_fails_on_the_unpatched_release(
    outcomes: list[Outcome], subtests: pytest.Subtests
) -> None:
    for name, reason, failure in outcomes:
        with subtests.test(name):
            assert failure is not None, "passes on the unpatched release, so it proves nothing"
            assert re.match(REASONS[reason], failure), f"not {reason!r}: {failure}"


def test_every_part_of_the_suite_about_xpos_has_regressions(outcomes: list[Outcome]) -> None:
    modules = {outcome.name.split("::")[0].removeprefix("tests.") for outcome in outcomes}
    assert modules == {"test_features", "test_properties", "test_rotary", "test_survey", "test_wrappers"}
