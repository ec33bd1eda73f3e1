"""What xPos costs, upstream beside the fork: prefill, a training step, decoding, the rotation alone, compiled.

    pip install -c constraints.txt ".[test]"
    python benchmarks/speed.py                                       # half an hour on two cores
    python benchmarks/speed.py decode --lengths 256 1024             # a part of it
    python benchmarks/speed.py --device cuda --dtype bfloat16        # also what is replayed as a CUDA graph
    python benchmarks/speed.py train --device cuda --dtype bfloat16 --autocast

Upstream's pinned release is built by the same hook with an empty series, and imported beside the fork. What is compared
runs interleaved in one process, in an order drawn anew for each round, so that what else the machine does hits all of
it. Medians are shown, in times of the same model with no positions.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from packaging_support import pristine_tree

DIM, DEPTH, HEADS, DIM_HEAD, ROTARY_DIM = 512, 6, 8, 64, 32
POSITIONS: Mapping[str, dict[str, Any]] = {
    "none": {},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_xpos": True},
}
MIN_ROUNDS = 3

Case = tuple[str, str]  # the package and the positions
Calls = Mapping[Case, Callable[[], object]]


def load(tree: Path | None) -> ModuleType:
    """`x_transformers` from the tree, or the one that is installed; several can be loaded, one after another."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "x_transformers"]:
        del sys.modules[name]
    if tree is not None:
        sys.path.insert(0, str(tree))
    try:
        import x_transformers
    finally:
        if tree is not None:
            sys.path.remove(str(tree))
    return x_transformers


@dataclass(frozen=True)
class Setup:
    packages: Mapping[str, ModuleType]
    device: torch.device
    dtype: torch.dtype
    autocast: bool
    seconds: float

    def models(self, *, train: bool = False) -> dict[Case, nn.Module]:
        return {(name, kind): self.model(name, kind).train(train) for kind in POSITIONS for name in self.packages}

    def model(self, name: str, kind: str) -> nn.Module:
        torch.manual_seed(0)
        sizes = dict(dim=DIM, depth=DEPTH, heads=HEADS, attn_dim_head=DIM_HEAD)
        decoder = self.packages[name].Decoder(**sizes, attn_flash=True, **POSITIONS[kind])
        outer = dict(num_tokens=256, max_seq_len=2**20, use_abs_pos_emb=False)
        model = self.packages[name].TransformerWrapper(**outer, attn_layers=decoder)
        return model.to(self.device, torch.float32 if self.autocast else self.dtype).eval()

    def tokens(self, seq_len: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (1, seq_len), generator=generator).to(self.device)

    def cache(self, name: str, length: int) -> Any:
        """As if so many tokens had been decoded: random keys and values."""
        layers = self.packages[name].x_transformers
        torch.manual_seed(0)
        kvs = [torch.randn(2, 1, HEADS, length, DIM_HEAD).to(self.device, self.dtype).unbind() for _ in range(DEPTH)]
        intermediates = [layers.Intermediates(cached_kv=kv, layer_type="a") for kv in kvs]
        return layers.LayerIntermediates(attn_intermediates=intermediates, cache_length=length)

    def medians(self, calls: Calls) -> dict[Case, float]:
        """The median time of each, in seconds; `Timer` runs each untimed first, and waits for the device."""
        order, found = random.Random(0), {case: [] for case in calls}
        timers = {
            case: Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
            for case, call in calls.items()
        }
        started = time.perf_counter()
        while any(len(times) < MIN_ROUNDS for times in found.values()) or time.perf_counter() - started < self.seconds:
            for case in order.sample(list(calls), len(calls)):
                found[case].append(timers[case].timeit(1).median)
        return {case: statistics.median(times) for case, times in found.items()}


def row(length: int, found: Mapping[Case, float]) -> str:
    """The time with no positions, and all others in times of it; it is the same code in both packages."""
    none = statistics.mean(time for (_, kind), time in found.items() if kind == "none")
    cells = [f"{time / none:.3f}" for (_, kind), time in found.items() if kind != "none"]
    return f"| {length:,} | {none * 1e3:.3g} ms | {' | '.join(cells)} |"


def train_step(model: nn.Module, x: Tensor) -> None:
    model(x).float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def prefill(setup: Setup, length: int) -> str:
    x = setup.tokens(length)
    with torch.no_grad():
        return row(length, setup.medians({case: partial(model, x) for case, model in setup.models().items()}))


def train(setup: Setup, length: int) -> str:
    x, models = setup.tokens(length), setup.models(train=True)
    return row(length, setup.medians({case: partial(train_step, model, x) for case, model in models.items()}))


def compiled(setup: Setup, length: int) -> str:
    """A training step of one graph for all lengths."""
    x = setup.tokens(length)
    models = {case: model for case, model in setup.models(train=True).items() if "rotary" not in case}
    for model in models.values():
        model(setup.tokens(8))  # lets einops register its backend
        model.compile(fullgraph=True, dynamic=True)
    return row(length, setup.medians({case: partial(train_step, model, x) for case, model in models.items()}))


def step_from(cache: Any, model: nn.Module, x: Tensor) -> Any:
    return model(x, cache=cache, input_not_include_cache=True, return_intermediates=True)[1]


def decode(setup: Setup, length: int) -> str:
    """One step after another, each from the cache that the last one gave."""

    def step(model: nn.Module, state: list[Any]) -> None:
        state[0] = step_from(state[0], model, x)

    x, models = setup.tokens(1), setup.models()
    with torch.no_grad():
        calls = {case: partial(step, model, [setup.cache(case[0], length)]) for case, model in models.items()}
        found = setup.medians(calls)
    del calls
    gc.collect()
    return row(length, found)


def replayed(setup: Setup, length: int) -> str:
    """A step of decoding from a cache of `length`, captured as a CUDA graph."""

    def capture(call: Callable[[], object]) -> Callable[[], None]:
        call()  # what is done once is not captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    x, models = setup.tokens(1), setup.models()
    with torch.no_grad():
        calls = {case: partial(step_from, setup.cache(case[0], length), model, x) for case, model in models.items()}
        return row(length, setup.medians({case: capture(call) for case, call in calls.items()}))


def rotation(setup: Setup, length: int) -> str:
    """Of q and k (1, 8, n, 64) with 32 dims rotated, tables given, beside a copy, and flash-attention's kernel."""
    q, k = torch.randn(2, 1, HEADS, length, DIM_HEAD).to(setup.device, setup.dtype).unbind()
    old, new = (setup.packages[name].x_transformers for name in ("upstream", "fork"))
    freqs, scale = old.RotaryEmbedding(ROTARY_DIM, use_xpos=True).to(setup.device).forward_from_seq_len(length)
    rotary = new.RotaryEmbedding(ROTARY_DIM, use_xpos=True).to(setup.device)
    factors = new.XPosTable(*rotary.forward_from_seq_len(length)).with_factors(length, DIM_HEAD).factors

    def upstream() -> object:
        return old.apply_rotary_pos_emb(q, freqs, scale), old.apply_rotary_pos_emb(k, freqs, scale**-1.0)

    calls: dict[Case, Callable[[], object]] = {
        ("both", "none"): lambda: (q.clone(), k.clone()),
        ("upstream", "xpos"): upstream,
        ("fork", "xpos"): lambda: tuple(map(new.multiply_pairs, (q, k), factors)),
    }
    if setup.device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        apply_rotary = importlib.import_module("flash_attn.ops.triton.rotary").apply_rotary
        halves = [factor[0, 0, :, : ROTARY_DIM // 2] for factor in factors]
        tables = [(half.real.to(setup.dtype).contiguous(), half.imag.to(setup.dtype).contiguous()) for half in halves]
        calls["flash-attention", "xpos"] = lambda: [
            apply_rotary(t.transpose(1, 2), *table, interleaved=True) for t, table in zip((q, k), tables)
        ]
    with torch.no_grad():
        return row(length, setup.medians(calls))


HEAD = "no positions | rotary, upstream | rotary, fork | xPos, upstream | xPos, fork"
PARTS: Mapping[str, tuple[Callable[[Setup, int], str], str, Sequence[int]]] = {
    "prefill": (prefill, HEAD, (1_024,)),
    "train": (train, HEAD, (1_024,)),
    "decode": (decode, HEAD, (256, 1_024, 4_096, 16_384)),
    "rotation": (rotation, "copy | xPos, upstream | xPos, fork | fused, if installed", (1_024,)),
    "compiled": (compiled, "no positions | xPos, upstream | xPos, fork", (256, 1_024)),
    "replayed": (replayed, HEAD, (256, 1_024, 4_096, 16_384)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What xPos costs, upstream beside the fork.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="tokens, or tokens in the cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--autocast", action="store_true", help="to the dtype, from models in float32")
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds per line (default: 60)")
    options = parser.parse_args()
    if unknown := sorted({*options.parts} - {*PARTS}):
        parser.error(f"there is no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")

    packages = {"upstream": load(pristine_tree()), "fork": load(None)}
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    setup = Setup(packages, device, dtype, options.autocast, options.seconds)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    dtypes = f"{options.dtype} autocast" if options.autocast else options.dtype
    sizes = f"dim {DIM}, depth {DEPTH}, {HEADS} heads of {DIM_HEAD}, {ROTARY_DIM} dims rotated, flash, batch 1"
    print(f"{options.device} ({where}), {dtypes}, torch {torch.__version__}; {sizes}.", flush=True)
    for name in options.parts or [name for name in PARTS if name != "replayed" or device.type == "cuda"]:
        part, head, lengths = PARTS[name]
        print(f"\n### {name}\n\n| n | {head} |\n{'|---' * (head.count('|') + 2)}|", flush=True)
        for length in options.lengths or lengths:
            with torch.autocast(device.type, dtype, enabled=options.autocast):
                print(part(setup, length), flush=True)


if __name__ == "__main__":
    main()
