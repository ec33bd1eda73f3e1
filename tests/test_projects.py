"""The swap in projects that depend on upstream's package: the fork takes its place, and their models do not notice.

In a virtual environment of its own, with the projects from the index, as a user would do it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging_support import LINE, ROOT, copy_project

pytestmark = pytest.mark.slow

UPSTREAM = (ROOT / LINE / "upstream.txt").read_text(encoding="utf-8").split()[0]
VERSION = UPSTREAM.partition("==")[2]
FORK = f"{VERSION}+xpos.1"

# Projects whose models are made of x_transformers' modules and run without a download, with how to run them. What is
# printed stands for every bit of the outputs, the loss and the gradients (those of the second differ from run to run,
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
grads = [param.grad for param in model.parameters() if param.grad is not None]
show(loss, *grads, *model.generate(tokens[:, :5], seq_len=12))
""",
    "coconut-pytorch==0.0.32": """
from coconut_pytorch import Coconut

model = Coconut(num_reasoning_steps=3, num_latents_per_step=1, transformer=dict(num_tokens=64, dim=32, depth=2))
tokens = torch.randint(0, 64, (2, 24))
show(model(tokens[:, :16], tokens[:, 16:]), model.generate(tokens[:, :16], max_length=8))
""",
}

SHOW = """
import hashlib, torch, x_transformers

torch.manual_seed(0)
torch.set_num_threads(1)

def show(*values):
    for value in values:
        assert torch.isfinite(value).all()
        print(hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest())
"""


class Environment:
    """A virtual environment of its own; it may see the packages of the one that runs the tests, torch above all."""

    def __init__(self, directory: Path, *, sees_outer: bool) -> None:
        self.directory = directory
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        self.python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not sees_outer:
            return
        (site,) = self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.splitlines()
        Path(site, "outer.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        # without PYTHONPATH, which would give the package that is tested
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(
            [str(self.python), *command], cwd=self.directory, env=environment, text=True, capture_output=True
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    def pip(self, *arguments: str) -> str:
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments).stdout

    def uv(self, *arguments: str) -> str:
        # it does not see the packages of the other environment
        return self.run("-m", "uv", "pip", *arguments, "--no-deps", "--python", str(self.python)).stdout

    def version(self) -> str:
        return self.run(
            "-c", "from importlib import metadata; print(metadata.version('x-transformers'))"
        ).stdout.strip()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With the projects and upstream's package."""
    environment = Environment(tmp_path_factory.mktemp("projects") / "venv", sees_outer=True)
    environment.pip("install", "-q", *PROJECTS)
    # not the one of the other environment
    environment.pip("install", "-q", "--no-deps", "--ignore-installed", UPSTREAM)
    return environment


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("checkout") / "fork")


def bits(environment: Environment) -> dict[str, list[str]]:
    return {name: environment.run("-c", SHOW + use).stdout.splitlines() for name, use in PROJECTS.items()}


def test_a_project_does_not_notice_the_swap(environment: Environment, checkout: Path) -> None:
    assert environment.version() == VERSION
    before = bits(environment)
    assert [len(lines) for lines in before.values()] == [12, 2]
    for project in PROJECTS:
        name = project.partition("==")[0]
        lines = environment.run("-c", f"from importlib import metadata; print(*metadata.requires({name!r}), sep='\\n')")
        requirements = map(Requirement, lines.stdout.splitlines())
        (required,) = (each for each in requirements if each.name.replace("_", "-") == "x-transformers")
        assert required.specifier.contains(FORK)

    # over upstream's package, with pip; back again; and with uv
    for install, no_deps in ((environment.pip, ["--no-deps"]), (environment.uv, [])):
        install("install", "-q", str(checkout))
        assert environment.version() == FORK
        assert bits(environment) == before
        # pip's own words
        assert "No broken requirements" in environment.pip("check")
        checked = environment.run("-m", "x_transformers.xpos", "--max-len", "128")
        assert checked.stdout.splitlines()[-1].startswith("all ")

        # the fork satisfies `==` too, so going back has to be forced
        install("install", "-q", "--force-reinstall", UPSTREAM, *no_deps)
        assert environment.version() == VERSION
        assert "No module named x_transformers.xpos" in environment.run("-m", "x_transformers.xpos", check=False).stderr
    assert bits(environment) == before


# kept from being replaced


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheelhouse with an upstream release that is newer than the fork, without a line of code."""
    wheelhouse = tmp_path_factory.mktemp("newer")
    info = "x_transformers-99.0.0.dist-info"
    files = {
        "x_transformers/__init__.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: x-transformers\nVersion: 99.0.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheelhouse / "x_transformers-99.0.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheelhouse


def test_an_upgrade_leaves_the_fork_where_it_is_pinned(
    environment: Environment, checkout: Path, newer: Path, tmp_path: Path
) -> None:
    upgrade = ("install", "-q", "--upgrade", "--no-index", "--find-links", str(newer), "x-transformers")
    environment.pip("install", "-q", "--no-deps", "--force-reinstall", str(checkout))
    pin = tmp_path / "constraints.txt"
    pin.write_text(f"x-transformers=={FORK}\n", encoding="utf-8")

    # the release that it is made of is older than the fork
    environment.pip("install", "-q", "--upgrade", "--no-deps", f"x-transformers<={VERSION}")
    assert environment.version() == FORK
    # pip and uv both keep what is there if a constraint names it
    environment.pip(*upgrade, "--no-deps", "-c", str(pin))
    environment.uv(*upgrade, "-c", str(pin))
    environment.uv(*upgrade, "--override", str(pin))
    assert environment.version() == FORK

    # else a newer release replaces it, and the check says so
    environment.pip(*upgrade, "--no-deps")
    assert environment.version() == "99.0.0"
    checked = environment.run("-m", "x_transformers.xpos", check=False)
    assert checked.returncode == 1
    assert "No module named x_transformers.xpos" in checked.stderr
