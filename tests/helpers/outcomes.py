"""What tests give that are run by tests: on another package, or other tests than these."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest
from trees import ROOT


class Outcome(NamedTuple):
    name: str
    # of its mark `regression`, empty if it has none
    reason: str
    # the first line of what it failed with, None if it passed
    failure: str | None = None


def run(directory: Path, *arguments: str, cwd: Path = ROOT, **variables: str) -> list[Outcome]:
    """The tests of another package; in one process, as others run beside it and most of the time goes into imports."""
    report = directory / "report.xml"
    # without the cache, in which the run that started it keeps what failed last
    command = [sys.executable, "-m", "pytest", "-n0", "--tb=no", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {**os.environ, **variables}
    result = subprocess.run([*command, *arguments], cwd=cwd, env=environment, text=True, capture_output=True)
    assert result.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), result.stdout + result.stderr
    found = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        reason = "".join(prop.get("value", "") for prop in case.iter("property") if prop.get("name") == "regression")
        failures = [child.get("message", "").splitlines()[0] for child in case if child.tag in ("failure", "error")]
        found.append(Outcome(f"{case.get('classname')}::{case.get('name')}", reason, *failures[:1]))
    return found
