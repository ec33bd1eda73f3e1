"""What xPos costs, upstream beside the fork: prefill, a training step, decoding, the rotation alone, compiled.

    pip install -c constraints.txt ".[test]"
    python benchmarks/speed.py                                       # half an hour on two cores
    python benchmarks/speed.py decode --lengths 256 1024             # a part of it
    python benchmarks/speed.py --device cuda --dtype bfloat16        # also what is replayed as a CUDA graph
    python benchmarks/speed.py train --device cuda --dtype bfloat16 --autocast

Upstream's pinned release is built by the same hook with an empty series, and imported beside the fork. What is compared
runs interleaved in one process, in an order drawn anew for each round, so that what else the machine does hits all of
it. Medians are shown, in times of the same model with no positions. Decoding is `generate()` with its defaults.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))

from trees import pristine_tree

DIM, DEPTH, HEADS, DIM_HEAD, ROTARY_DIM = 512, 6, 8, 64, 32
POSITIONS = {"none": {}, "rotary": {"rotary_pos_emb": True}, "xpos": {"rotary_xpos": True}}
MIN_ROUNDS = 3
WARM_UP, TOKENS = 3, 8  # of a call of `generate()`: not counted, and counted

Case = tuple[str, str]  # the package and the positions
Samples = Mapping[Case, Callable[[], list[float]]]  # seconds of one or more runs


def load(*paths: str) -> ModuleType:
    """`x_transformers`, looked for in `paths` first; several can be loaded, one after another."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "x_transformers"]:
        del sys.modules[name]
    sys.path[:0] = paths
    package = importlib.import_module("x_transformers")
    del sys.path[: len(paths)]
    return package


@dataclass(frozen=True)
class Setup:
    packages: Mapping[str, ModuleType]
    device: torch.device
    dtype: torch.dtype
    autocast: bool
    seconds: float

    def models(self, *, train: bool = False) -> dict[Case, nn.Module]:
        found = {}
        for (kind, options), (name, package) in itertools.product(POSITIONS.items(), self.packages.items()):
            torch.manual_seed(0)
            sizes = dict(dim=DIM, depth=DEPTH, heads=HEADS, attn_dim_head=DIM_HEAD)
            decoder = package.Decoder(**sizes, attn_flash=True, **options)
            outer = dict(num_tokens=256, max_seq_len=2**20, use_abs_pos_emb=False)
            model = package.TransformerWrapper(**outer, attn_layers=decoder)
            found[name, kind] = model.to(self.device, torch.float32 if self.autocast else self.dtype).train(train)
        return found

    def tokens(self, length: int) -> Tensor:
        return torch.randint(0, 256, (1, length), device=self.device)

    def prompted(self, models: Mapping[Case, nn.Module], length: int) -> dict[Case, tuple[Tensor, Any]]:
        """What each returns for a prompt: the last logits, and the cache without the hidden states."""
        found = {}
        for case, model in models.items():
            logits, cache = model(self.tokens(length), return_intermediates=True)
            found[case] = logits[:, -1:], replace(cache, hiddens=None, layer_hiddens=None, block_hiddens=None)
        return found

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, run: Callable[..., object], what: Mapping[Case, Any], *arguments: Any) -> Samples:
        """Of `run(what, *arguments)`, after once untimed."""

        def sample(case: Case) -> list[float]:
            run(what[case], *arguments)
            started = self.now()
            run(what[case], *arguments)
            return [self.now() - started]

        return {case: partial(sample, case) for case in what}

    def medians(self, samples: Samples) -> dict[Case, float]:
        order, found = random.Random(0), {case: list[float]() for case in samples}
        started, rounds = time.perf_counter(), 0
        while rounds < MIN_ROUNDS or time.perf_counter() - started < self.seconds:
            for case in order.sample(list(samples), len(samples)):
                found[case] += samples[case]()
            rounds += 1
        return {case: statistics.median(times) for case, times in found.items()}


def row(length: int, found: Mapping[Case, float]) -> str:
    """The time with no positions, and all others in times of it; it is the same code in both packages."""
    none = statistics.mean(time for (_, kind), time in found.items() if kind == "none")
    cells = [f"{time / none:.3f}" for (_, kind), time in found.items() if kind != "none"]
    return f"| {length:,} | {none * 1e3:.3g} ms | {' | '.join(cells)} |"


def train_step(model: nn.Module, x: Tensor) -> None:
    model(x).float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def prefill(setup: Setup, length: int) -> Samples:
    return setup.timed(nn.Module.__call__, setup.models(), setup.tokens(length))


def train(setup: Setup, length: int) -> Samples:
    return setup.timed(train_step, setup.models(train=True), setup.tokens(length))


def compiled(setup: Setup, length: int) -> Samples:
    """A training step of one graph for all lengths."""
    models = {case: model for case, model in setup.models(train=True).items() if "rotary" not in case}
    for model in models.values():
        model(setup.tokens(8))  # lets einops register its backend
        model.compile(fullgraph=True, dynamic=True)
    return setup.timed(train_step, models, setup.tokens(length))


def decode(setup: Setup, length: int) -> Samples:
    """A token of `generate()`, from one call of its filter to the next, sampling included."""
    x, models = setup.tokens(length), setup.models()
    prompted = setup.prompted(models, length)

    def sample(case: Case) -> list[float]:
        wrapper, model, times = setup.packages[case[0]].autoregressive_wrapper, models[case], []

        def forward(*args: Any, cache: Any = None, **options: Any) -> Any:
            return prompted[case] if cache is None else type(model).forward(model, *args, cache=cache, **options)

        def top_k(logits: Tensor) -> Tensor:
            times.append(setup.now())
            return wrapper.top_k(logits)

        model.forward = forward  # so a prompt is computed once, not for each round
        wrapper.AutoregressiveWrapper(model).generate(x, 1 + WARM_UP + TOKENS, filter_logits_fn=top_k)
        return [after - before for before, after in zip(times, times[1:])][WARM_UP:]

    return {case: partial(sample, case) for case in models}


def replayed(setup: Setup, length: int) -> Samples:
    """A step of decoding after a prompt, captured as a CUDA graph."""
    x, models, captured = setup.tokens(1), setup.models(), {}
    for case, (_, cache) in setup.prompted(models, length).items():
        call = partial(models[case], x, cache=cache, input_not_include_cache=True, return_intermediates=True)
        call()  # what is done once is not captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        captured[case] = graph, call  # it reads the memory of the call
    return setup.timed(lambda pair: pair[0].replay(), captured)


def rotation(setup: Setup, length: int) -> Samples:
    """Of q and k (1, 8, n, 64) with 32 dims rotated, tables given, beside a copy of both."""
    q, k = torch.randn(2, 1, HEADS, length, DIM_HEAD).to(setup.device, setup.dtype).unbind()
    old, new = (setup.packages[name].x_transformers for name in ("upstream", "fork"))
    freqs, scale = old.RotaryEmbedding(ROTARY_DIM, use_xpos=True).to(setup.device).forward_from_seq_len(length)
    rotary = new.RotaryEmbedding(ROTARY_DIM, use_xpos=True).to(setup.device)
    # with a row in front, that of keys without a position
    table = new.XPosTable(*(t[:, 1 - at :] for at, t in enumerate(rotary.forward_from_seq_len(length + 1))))
    table.query_len, table.dim = length, DIM_HEAD
    rotate = old.apply_rotary_pos_emb
    calls = {
        ("both", "none"): lambda: (q.clone(), k.clone()),
        ("upstream", "xpos"): lambda: (rotate(q, freqs, scale), rotate(k, freqs, scale**-1.0)),
        ("fork", "xpos"): lambda: tuple(map(new.multiply_pairs, (q, k), table.factors)),
    }
    return setup.timed(lambda call: call(), calls)


HEAD = "no positions | rotary, upstream | rotary, fork | xPos, upstream | xPos, fork"
PARTS: Mapping[str, tuple[Callable[[Setup, int], Samples], str, Sequence[int]]] = {
    "prefill": (prefill, HEAD, (1_024,)),
    "train": (train, HEAD, (1_024,)),
    "decode": (decode, HEAD, (256, 1_024, 4_096, 16_384)),
    "rotation": (rotation, "copy | xPos, upstream | xPos, fork", (1_024,)),
    "compiled": (compiled, "no positions | xPos, upstream | xPos, fork", (256, 1_024)),
    "replayed": (replayed, HEAD, (256, 1_024, 4_096, 16_384)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What xPos costs, upstream beside the fork.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="tokens, or those of the prompt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--autocast", action="store_true", help="to the dtype, from models in float32")
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds per line (default: 60)")
    options = parser.parse_args()
    if unknown := sorted({*options.parts} - {*PARTS}):
        parser.error(f"there is no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")

    packages = {"upstream": load(str(pristine_tree())), "fork": load()}
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
            grad = torch.set_grad_enabled(part in (train, compiled))
            with grad, torch.autocast(device.type, dtype, enabled=options.autocast):
                print(row(length, setup.medians(part(setup, length))), flush=True)
            gc.collect()  # models of `decode` refer to themselves


if __name__ == "__main__":
    main()
