"""In virtual environments: the swap in projects that depend on upstream's package, and versions of Python and torch."""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from functools import partial
from pathlib import Path

import pytest
from trees import LINE, PINNED, ROOT, output, patched_tree

from patches.try_release import PROPERTIES

pytestmark = pytest.mark.slow

VERSION = PINNED[LINE].partition("==")[2]

# Projects whose models are made of x_transformers' modules and run without a download, with how to run them. What is
# shown stands for every bit of the outputs, the loss and the gradients (those of the second differ from run to run,
# whatever is installed).
PROJECTS = {
    "CALM-pytorch==0.2.2": """
from CALM_pytorch import CALM, AugmentParams
from x_transformers import Decoder, TransformerWrapper

def language_model(dim):
    layers = Decoder(dim=dim, depth=2, heads=4, attn_dim_head=16, rotary_pos_emb=True, verbose=False)
    return TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers)

model = CALM(language_model(32), AugmentParams(model=language_model(48), mask_kwarg="mask"))
tokens = torch.randint(0, 64, (2, 24))
loss = model(tokens, prompt=tokens[:, :5])
loss.backward()
gradients = [param.grad for param in model.parameters() if param.grad is not None]
show(loss, *gradients, *model.generate(tokens[:, :5], seq_len=12))
""",
    "coconut-pytorch==0.0.32": """
from coconut_pytorch import Coconut

model = Coconut(num_reasoning_steps=3, num_latents_per_step=1, transformer=dict(num_tokens=64, dim=32, depth=2))
tokens = torch.randint(0, 64, (2, 24))
show(model(tokens[:, :16], tokens[:, 16:]), model.generate(tokens[:, :16], max_length=8))
""",
}
SHOW = """
import hashlib, torch

torch.manual_seed(0)
torch.set_num_threads(1)

def show(*values):
    for value in values:
        assert torch.isfinite(value).all()
        print(hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest())
"""


def test_a_project_does_not_notice_the_swap(project: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    output(sys.executable, "-m", "venv", venv)
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    # without the PYTHONPATH that would give the package that is tested
    environment = {**os.environ, "PYTHONPATH": "", "UV_PYTHON": str(python)}

    def run(*command: str) -> list[str]:
        return output(python, *command, cwd=venv, env=environment).splitlines()

    pip, uv = partial(run, "-m", "pip", "--disable-pip-version-check"), partial(run, "-m", "uv", "pip")

    def version() -> str:
        return run("-c", "from importlib import metadata; print(metadata.version('x-transformers'))")[0]

    def bits() -> list[list[str]]:
        return [run("-c", SHOW + use) for use in PROJECTS.values()]

    # it sees the packages of the environment that runs the tests, torch above all
    (site,) = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(site, "outer.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip("install", "-q", *PROJECTS)
    # not the one of the other environment
    pip("install", "-q", "--no-deps", "--ignore-installed", PINNED[LINE])
    assert version() == VERSION
    before = bits()
    assert [len(lines) for lines in before] == [12, 2]

    # over upstream's package, with pip; back again; and with uv, which does not see the other environment's packages
    for install, no_deps in ((pip, []), (uv, ["--no-deps"])):
        install("install", "-q", str(project), *no_deps)
        # the release that it is made of is older than it, so that an upgrade leaves it
        pip("install", "-q", "--upgrade", "--no-deps", f"x-transformers<={VERSION}")
        assert version() == f"{VERSION}+xpos.1"
        if install == pip:  # the files of the other are the same
            assert bits() == before
        # pip's own words, which are about what the projects require too
        assert pip("check") == ["No broken requirements found."]
        assert run("-m", "x_transformers.xpos", "--max-len", "128")[-1].startswith("all ")

        # the fork satisfies `==` too, so going back has to be forced
        install("install", "-q", "--force-reinstall", "--no-deps", PINNED[LINE])
        assert version() == VERSION
        with pytest.raises(AssertionError, match=r"No module named x_transformers\.xpos"):
            run("-m", "x_transformers.xpos")


# the oldest Python and torch that upstream works with, and the newest torch that there is

# upstream claims Python 3.9, where importing it is a TypeError; torch-einops-utils, a dependency of it, wants torch 2.5
OLDEST, NEWEST = ("3.10", "torch==2.5.0"), (f"3.{sys.version_info.minor}", "torch")
TESTS = [*PROPERTIES, "tests/xpos/test_cache.py", "tests/xpos/test_prefill.py"]
NEEDED_BY_TESTS = ["hatchling", "hypothesis", "pip", "pytest", "pytest-xdist", "tqdm"]


@pytest.mark.parametrize(("version", "torch"), [OLDEST, NEWEST], ids=["oldest", "newest"])
def test_properties_hold(version: str, torch: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "quick"}
    # pyenv's, or what uv finds or downloads
    interpreters = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    run = partial(output, cwd=ROOT, env=environment)
    # not in tmp_path, which pytest keeps: torch with CUDA takes 5 GB
    with tempfile.TemporaryDirectory() as venv:
        python = Path(venv, "bin", "python")
        run(uv, "venv", "--python", [version, *interpreters][-1], venv)
        run(uv, "pip", "install", "--python", python, "-r", "pyproject.toml", torch, *NEEDED_BY_TESTS)
        found = run(python, "-c", "import platform, torch; print(platform.python_version(), torch.__version__)")
        assert found.startswith(f"{version}.")
        assert f" {torch.partition('==')[2]}" in found
        passed = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--package={patched_tree()}", *TESTS)
    print(f"Python and torch {found.strip()}: {passed.splitlines()[-1]}")
