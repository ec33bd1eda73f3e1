"""`python -m x_transformers.xpos`, in this process and in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import x_transformers
from x_transformers.x_transformers import RotaryEmbedding
from x_transformers.xpos import __main__ as command

PACKAGE = Path(x_transformers.__file__).parent


SHORT = ("--max-len", "32")


def process(
    cwd: Path, *arguments: str, path: Path = PACKAGE.parent, python: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which imports from `path` first."""
    # models this small gain nothing from threads, and lose much where other tests run beside them
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, *python, *([] if "-c" in python else ["-m", "x_transformers.xpos"]), *arguments]
    return subprocess.run(words, cwd=cwd, env=environment, text=True, capture_output=True, check=False)


@dataclass
class Tool:
    """The command in this process."""

    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        try:
            status = command.main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = self.capsys.readouterr()
        return status, captured.out, captured.err

    def check(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        status, out, err = self.run("check", "--json", *arguments)
        assert out, err
        return status, json.loads(out)

    def refusal(self, *arguments: str) -> str:
        """The one line that refuses the arguments, with status 2 and nothing on stdout."""
        status, out, err = self.run(*arguments)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1
        return err


def failed(document: dict[str, Any]) -> set[str]:
    return {result["key"] for result in document["results"] if not result["passed"]}


_forward = RotaryEmbedding.forward


def no_decay_before_the_center(self: Any, t: Any, offset: int = 0, seq_len: int | None = None) -> Any:
    freqs, scale = _forward(self, t, offset, seq_len)
    return freqs, scale.clamp(max=1)
