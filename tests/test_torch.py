"""The properties on the oldest torch that the dependencies allow, and on the newest that there is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from packaging_support import ROOT, clean_environment, patched_tree

pytestmark = pytest.mark.slow

# torch-einops-utils, a dependency of upstream, wants 2.5
RELEASES = ["torch==2.5.0", "torch"]
TESTS = ["test_properties.py", "test_rotary.py", "test_cache.py", "test_chunks.py"]
NEEDED_BY_TESTS = ["hatchling", "hypothesis", "pip", "pytest", "pytest-xdist", "tqdm"]


@pytest.mark.parametrize("torch", RELEASES)
def test_properties_hold(torch: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    environment = {**clean_environment(), "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "quick"}

    def run(*command: str | Path) -> str:
        result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
        return result.stdout

    # not in tmp_path, which pytest keeps: torch with CUDA takes 5 GB
    with tempfile.TemporaryDirectory() as venv:
        python = Path(venv, "bin", "python")
        run(uv, "venv", "--python", sys.executable, venv)
        run(uv, "pip", "install", "--python", python, "-r", "pyproject.toml", torch, *NEEDED_BY_TESTS)
        version = run(python, "-c", "import torch; print(torch.__version__)")
        assert version.startswith(torch.partition("==")[2])
        tests = [f"tests/{name}" for name in TESTS]
        passed = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--package={patched_tree()}", *tests)
    print(f"torch {version.strip()}: {passed.splitlines()[-1]}")
