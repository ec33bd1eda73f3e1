"""The properties on the oldest Python and torch that upstream works with, and on the newest torch that there is."""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from trees import ROOT, output, patched_tree

from patches.try_release import PROPERTIES

pytestmark = pytest.mark.slow

# upstream claims Python 3.9, where importing it is a TypeError; torch-einops-utils, a dependency of it, wants torch 2.5
OLDEST, NEWEST = ("3.10", "torch==2.5.0"), (f"3.{sys.version_info.minor}", "torch")
TESTS = [*PROPERTIES, "tests/xpos/test_cache.py", "tests/xpos/test_prefill.py"]
NEEDED_BY_TESTS = ["hatchling", "hypothesis", "pip", "pytest", "pytest-xdist", "tqdm"]


def interpreter(version: str) -> str:
    """One of that version: pyenv's, or what uv finds or downloads."""
    found = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(found[-1]) if found else version


@pytest.mark.parametrize(("version", "torch"), [OLDEST, NEWEST], ids=["oldest", "newest"])
def test_properties_hold(version: str, torch: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "quick"}
    run = partial(output, cwd=ROOT, env=environment)
    # not in tmp_path, which pytest keeps: torch with CUDA takes 5 GB
    with tempfile.TemporaryDirectory() as venv:
        python = Path(venv, "bin", "python")
        run(uv, "venv", "--python", interpreter(version), venv)
        run(uv, "pip", "install", "--python", python, "-r", "pyproject.toml", torch, *NEEDED_BY_TESTS)
        found = run(python, "-c", "import platform, torch; print(platform.python_version(), torch.__version__)")
        assert found.startswith(f"{version}.")
        assert f" {torch.partition('==')[2]}" in found
        passed = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--package={patched_tree()}", *TESTS)
    print(f"Python and torch {found.strip()}: {passed.splitlines()[-1]}")
