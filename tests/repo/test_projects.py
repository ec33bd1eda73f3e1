"""The swap in projects that depend on upstream's package: the fork takes its place, and their models do not notice.

In a virtual environment of its own, with the projects from the index, as a user would do it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from trees import LINE, ROOT

pytestmark = pytest.mark.slow

UPSTREAM = (ROOT / LINE / "upstream.txt").read_text(encoding="utf-8").split()[0]
VERSION = UPSTREAM.partition("==")[2]
FORK = f"{VERSION}+xpos.1"

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
show(loss, *gradients(model, loss), *model.generate(tokens[:, :5], seq_len=12))
""",
    "coconut-pytorch==0.0.32": """
from coconut_pytorch import Coconut

model = Coconut(num_reasoning_steps=3, num_latents_per_step=1, transformer=dict(num_tokens=64, dim=32, depth=2))
tokens = torch.randint(0, 64, (2, 24))
show(model(tokens[:, :16], tokens[:, 16:]), model.generate(tokens[:, :16], max_length=8))
""",
}
# Projects that call RotaryEmbedding, apply_rotary_pos_emb, Attention or the KV cache themselves, and need packages for
# audio, meshes and text that are too much here. Only parts of them run, installed with what those need. `only` passes
# over the package's `__init__`, which imports its trainer, and has empty modules for what else is imported.
PARTS = {
    # its three backbones
    "f5-tts==1.1.22": """
only("f5_tts.model", without="torchaudio librosa librosa.filters rjieba pypinyin")
from f5_tts.model.backbones.dit import DiT
from f5_tts.model.backbones.mmdit import MMDiT
from f5_tts.model.backbones.unett import UNetT

sound, text, time = torch.randn(2, 2, 24, 12), torch.randint(0, 30, (2, 9)), torch.rand(2)
for backbone in (DiT, MMDiT, UNetT):
    model = backbone(dim=64, depth=2, heads=2, dim_head=32, mel_dim=12, text_num_embeds=30, dropout=0.0)
    out = random_(model)(*sound, text, time)
    show(out, *gradients(model, out.square().sum()))
""",
    # the transformer of text and sound, without the integration of its flow
    "e2-tts-pytorch==2.2.2 hl-gauss-pytorch==0.3.0 hyper-connections==0.4.11": """
only("e2_tts_pytorch", without="torchaudio torchaudio.functional torchdiffeq vocos g2p_en")
from e2_tts_pytorch.e2_tts import Transformer

model = Transformer(dim=64, depth=2, heads=2, dim_head=32, dim_text=32, text_dim_head=16, dropout=0.0)
out = random_(model)(torch.randn(2, 24, 64), times=torch.rand(2), text_embed=torch.randn(2, 24, 32))
show(out, *gradients(model, out.square().sum()))
""",
    # the transformer of codes, without the autoencoder that makes them of a mesh and without text
    "meshgpt-pytorch==1.8.1 gateloop-transformer==0.2.5 rotary-embedding-torch==0.9.1 pytorch-custom-utils==0.0.21 "
    "pytorch-warmup==0.2.0 environs==15.2.0 marshmallow==4.4.0 python-dotenv==1.2.4": """
only(
    "meshgpt_pytorch",
    without="classifier_free_guidance_pytorch local_attention taylor_series_linear_attention torch_geometric "
    "torch_geometric.nn torch_geometric.nn.conv vector_quantize_pytorch",
)
sys.modules["classifier_free_guidance_pytorch"].classifier_free_guidance = lambda function: function
from meshgpt_pytorch.meshgpt_pytorch import MeshTransformer

autoencoder = torch.nn.Module()
autoencoder.num_vertices_per_face, autoencoder.num_quantizers = 3, 2
autoencoder.codebook_size, autoencoder.pad_id = 20, -1
sizes = dict(dim=32, attn_depth=2, fine_attn_depth=2, attn_dim_head=16, attn_heads=2, max_seq_len=48, flash_attn=False)
model = MeshTransformer(autoencoder, **sizes, attn_kwargs=dict(rotary_pos_emb=True, attn_num_mem_kv=2)).eval()
codes, cache = torch.randint(0, 20, (2, 24)), None
loss = random_(model).forward_on_codes(codes)
show(loss, *gradients(model, loss))
for n in range(1, 20):
    how = dict(return_loss=False, return_cache=True, append_eos=False)
    logits, cache = model.forward_on_codes(codes[:, :n], cache=cache, **how)
    show(logits)
""",
}
PARTS_NEED = "beartype==0.23.1 jaxtyping==0.3.11 wadler-lindig==0.1.8"

SHOW = """
import hashlib, importlib.util, sys, torch, types, x_transformers
from unittest.mock import MagicMock

torch.manual_seed(0)
torch.set_num_threads(1)

def show(*values):
    for value in values:
        assert torch.isfinite(value).all()
        print(hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest())

def gradients(model, loss):
    loss.backward()
    return [param.grad for param in model.parameters() if param.grad is not None]

def random_(model):
    for param in model.parameters():  # some start at zero, which hides what they multiply
        torch.nn.init.normal_(param, std=0.1)
    return model

def only(package, without):
    sys.modules.update((name, MagicMock()) for name in without.split())
    module = types.ModuleType(package)
    module.__path__ = importlib.util.find_spec(package).submodule_search_locations
    sys.modules[package] = module
"""


class Environment:
    """A virtual environment of its own, that sees the packages of the one that runs the tests, torch above all."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.parts = directory, directory / "parts"
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        self.python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        (site,) = self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.splitlines()
        Path(site, "outer.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")

    def run(self, *command: str, check: bool = True, path: str = "") -> subprocess.CompletedProcess[str]:
        # without the PYTHONPATH that would give the package that is tested
        environment = {**os.environ, "PYTHONPATH": path}
        result = subprocess.run(
            [str(self.python), *command], cwd=self.directory, env=environment, text=True, capture_output=True
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    def run_project(self, code: str) -> list[str]:
        return self.run("-c", code, path=str(self.parts)).stdout.splitlines()

    def pip(self, *arguments: str) -> str:
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments).stdout

    def uv(self, *arguments: str) -> str:
        # it does not see the packages of the other environment
        return self.run("-m", "uv", "pip", *arguments, "--no-deps", "--python", str(self.python)).stdout

    def version(self) -> str:
        return self.run_project("from importlib import metadata; print(metadata.version('x-transformers'))")[0]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """With the projects and upstream's package."""
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "-q", *PROJECTS)
    parts = " ".join([*PARTS, PARTS_NEED]).split()
    environment.pip("install", "-q", "--no-deps", "--target", str(environment.parts), *parts)
    # not the one of the other environment
    environment.pip("install", "-q", "--no-deps", "--ignore-installed", UPSTREAM)
    return environment


def bits(environment: Environment) -> dict[str, list[str]]:
    return {name: environment.run_project(SHOW + use) for name, use in {**PROJECTS, **PARTS}.items()}


def test_a_project_does_not_notice_the_swap(environment: Environment, project: Path) -> None:
    assert environment.version() == VERSION
    before = bits(environment)
    assert [len(lines) for lines in before.values()] == [12, 2, 154, 163, 89]
    for packages in before:
        name = packages.partition("==")[0]
        lines = environment.run_project(
            f"from importlib import metadata; print(*metadata.requires({name!r}), sep='\\n')"
        )
        (required,) = (r for r in map(Requirement, lines) if r.name.replace("_", "-") == "x-transformers")
        assert required.specifier.contains(FORK)

    # over upstream's package, with pip; back again; and with uv
    for install, no_deps in ((environment.pip, ["--no-deps"]), (environment.uv, [])):
        install("install", "-q", str(project))
        assert environment.version() == FORK
        # the release that it is made of is older than it, so that an upgrade leaves it
        environment.pip("install", "-q", "--upgrade", "--no-deps", f"x-transformers<={VERSION}")
        assert environment.version() == FORK
        if install == environment.pip:  # the files of the other are the same
            assert bits(environment) == before
        # pip's own words
        assert "No broken requirements" in environment.pip("check")
        checked = environment.run("-m", "x_transformers.xpos", "--max-len", "128")
        assert checked.stdout.splitlines()[-1].startswith("all ")

        # the fork satisfies `==` too, so going back has to be forced
        install("install", "-q", "--force-reinstall", UPSTREAM, *no_deps)
        assert environment.version() == VERSION
        assert "No module named x_transformers.xpos" in environment.run("-m", "x_transformers.xpos", check=False).stderr
