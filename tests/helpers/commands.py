"""`python -m x_transformers.xpos` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = ("--max-len", "32")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Finished = subprocess.CompletedProcess[str]


def process(cwd: Path, *arguments: str, path: Path | None = None, python: tuple[str, ...] = ()) -> Finished:
    """The command, or the code that `python` passes; imports are from `path` first, or from the tree that is tested."""
    paths = [*([] if path is None else [str(path)]), os.environ["PYTHONPATH"]]
    words = [sys.executable, *python, *([] if "-c" in python else ["-m", "x_transformers.xpos"]), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(words, cwd=cwd, env=environment, text=True, capture_output=True, check=False)
