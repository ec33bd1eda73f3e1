"""`python -m x_transformers.xpos`, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import x_transformers
from x_transformers.x_transformers import RotaryEmbedding
from x_transformers.xpos import __main__ as command

PACKAGE = Path(x_transformers.__file__).parent
SHORT = ("--max-len", "32")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def process(
    cwd: Path, *arguments: str, path: Path = PACKAGE.parent, python: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which imports from `path` first."""
    # models this small gain nothing from threads, and lose much where other tests run beside them
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, *python, *([] if "-c" in python else ["-m", "x_transformers.xpos"]), *arguments]
    return subprocess.run(words, cwd=cwd, env=environment, text=True, capture_output=True, check=False)


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """The exit status of the command in this process, and what it prints on either output."""
    try:
        status = command.main(arguments)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    return (status, *capsys.readouterr())


_forward = RotaryEmbedding.forward


def no_decay_before_the_center(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    freqs, scale = _forward(self, t, offset, seq_len)
    return freqs, scale.clamp(max=1)
