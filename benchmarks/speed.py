"""What xPos costs: prefill, a training step, decoding, the rotation alone and memory, upstream beside the fork.

    pip install -c constraints.txt -e ".[test,benchmark]" && pip install --no-deps torchscale==0.3.0
    python benchmarks/speed.py                           # everything, an hour or two on two cores
    python benchmarks/speed.py decode --contexts 256     # a part of it
    python benchmarks/speed.py --write                   # and put it into benchmarks/README.md

Upstream's pinned release is built by the same hook with an empty series, and imported beside the fork. Everything that
is compared runs interleaved in one process, round by round; medians are shown, and ratios of medians. Memory is the
median of the peaks of processes of their own, which take turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))

from packaging_support import pristine_tree  # noqa: E402

DIM, DEPTH, HEADS, DIM_HEAD, ROTARY_DIM = 512, 6, 8, 64, 32
CONTEXTS = (256, 1_024, 4_096, 16_384)
LONG_CONTEXTS = (256, 1_024, 4_096, 16_384, 65_536)
POSITIONS: Mapping[str, dict[str, Any]] = {
    "none": {},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_xpos": True},
}
TREES = ("upstream", "fork")
# at least so many rounds of each, and more until so many seconds have passed
MIN_ROUNDS, SECONDS = 3, 20.0
# what takes less than so many seconds runs once more in each round
SHORT = 0.3
# what takes more than so many is not slower for being the first
LONG = 5.0
# processes whose median is the peak memory of a case, where a few hundred kB show; one from this context on
PROCESSES, MANY = 5, 10_000

PAGE = HERE / "README.md"
BEGIN, END = "<!-- made by speed.py -->\n", "<!-- end -->\n"


class Package(NamedTuple):
    """A copy of x_transformers: the package, its main module and the one with the intermediates."""

    root: ModuleType
    layers: ModuleType
    attend: ModuleType


def load(tree: Path | None) -> Package:
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
    return Package(x_transformers, sys.modules["x_transformers.x_transformers"], sys.modules["x_transformers.attend"])


def trees() -> dict[str, Path | None]:
    return {"upstream": pristine_tree(), "fork": None}


@dataclass(frozen=True)
class Setup:
    device: torch.device
    dtype: torch.dtype
    seconds: float

    def model(self, package: Package, positions: str) -> nn.Module:
        torch.manual_seed(0)
        decoder = package.root.Decoder(
            dim=DIM, depth=DEPTH, heads=HEADS, attn_dim_head=DIM_HEAD, attn_flash=True, **POSITIONS[positions]
        )
        model = package.root.TransformerWrapper(
            num_tokens=256, max_seq_len=2**20, use_abs_pos_emb=False, attn_layers=decoder
        )
        return model.to(self.device, self.dtype).eval()

    def tokens(self, seq_len: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (1, seq_len), generator=generator).to(self.device)

    def cache(self, package: Package, length: int) -> Any:
        """As if so many tokens had been decoded: random keys and values."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, HEADS, length, DIM_HEAD)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)

        layers = [package.attend.Intermediates(cached_kv=(normal(), normal()), layer_type="a") for _ in range(DEPTH)]
        return package.layers.LayerIntermediates(attn_intermediates=layers, cache_length=length)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Case = tuple[str, ...]


def interleaved(setup: Setup, calls: Mapping[Case, Callable[[], object]]) -> dict[Case, float]:
    """The median time of each, in seconds.

    Round by round, in an order drawn anew for each, so that what else the machine does hits all of them, and none is
    always the one after another. A short one runs once untimed in each round, since what the one before it left in the
    caches and in the allocator is not its own.
    """
    order = random.Random(0)
    times: dict[Case, list[float]] = {case: [] for case in calls}

    def timed(call: Callable[[], object]) -> float:
        setup.wait()
        before = time.perf_counter()
        call()
        setup.wait()
        return time.perf_counter() - before

    # the first call of each may set up what the others find
    short = {case for case, call in calls.items() if timed(call) < LONG and timed(call) < SHORT}
    started = time.perf_counter()
    while len(times[next(iter(calls))]) < MIN_ROUNDS or time.perf_counter() - started < setup.seconds:
        for case in order.sample(list(calls), len(calls)):
            if case in short:
                calls[case]()
            times[case].append(timed(calls[case]))
    return {case: statistics.median(found) for case, found in times.items()}


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [f"| {' | '.join(self.head)} |", f"|{'---|' * len(self.head)}"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return f"### {self.title}\n\n" + "\n".join(lines) + "\n"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def ratio_table(title: str, first: str, medians: Mapping[Any, dict[Case, float]], fork_name: str = "fork") -> Table:
    """Rows by context, columns by positions and tree; times of `none`, and the others in times of it."""
    head = (first, "no positions", *(f"{p}, {t}" for p in ("rotary", "xPos") for t in TREES), f"xPos {fork_name}")
    rows = []
    for context, found in medians.items():
        none = found["upstream", "none"]
        cells = [f"{found[tree, kind] / none:.2f}" for kind in ("rotary", "xpos") for tree in TREES]
        # against the mean of the two models without positions, which are the same code: what is between them is noise
        both = (none + found["fork", "none"]) / 2
        rows.append((f"{context:,}", milliseconds(none), *cells, f"{found['fork', 'xpos'] / both:.3f} of no positions"))
    return Table(title, head, tuple(rows))


# what is measured


def cases(packages: Mapping[str, Package]) -> list[tuple[str, str]]:
    return [(tree, kind) for kind in POSITIONS for tree in packages]


@torch.no_grad()
def prefill(setup: Setup, packages: Mapping[str, Package], contexts: Sequence[int]) -> list[Table]:
    models = {case: setup.model(packages[case[0]], case[1]) for case in cases(packages)}
    medians = {}
    for context in contexts:
        x = setup.tokens(context)
        medians[context] = interleaved(setup, {case: partial(model, x) for case, model in models.items()})
    return [ratio_table("Prefill", "tokens", medians)]


def train_step(model: nn.Module, x: Tensor) -> None:
    model(x).float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def train(setup: Setup, packages: Mapping[str, Package], contexts: Sequence[int]) -> list[Table]:
    models = {case: setup.model(packages[case[0]], case[1]).train() for case in cases(packages)}
    medians = {}
    for context in contexts:
        x = setup.tokens(context)
        medians[context] = interleaved(setup, {case: partial(train_step, model, x) for case, model in models.items()})
    return [ratio_table("Training step, forward and backward", "tokens", medians)]


class Decoding:
    """One step after another, each from the cache that the last one gave; or all from the first one."""

    def __init__(self, setup: Setup, package: Package, kind: str, context: int, *, advance: bool) -> None:
        self.model, self.cache = setup.model(package, kind), setup.cache(package, context)
        self.token, self.advance = setup.tokens(1), advance

    def __call__(self) -> None:
        _, cache = self.model(self.token, cache=self.cache, input_not_include_cache=True, return_intermediates=True)
        if self.advance:
            self.cache = cache


@torch.no_grad()
def decode(setup: Setup, packages: Mapping[str, Package], contexts: Sequence[int]) -> list[Table]:
    tables = []
    for advance in (True, False):
        medians = {}
        for context in contexts:
            calls = {
                case: Decoding(setup, packages[case[0]], case[1], context, advance=advance) for case in cases(packages)
            }
            medians[context] = interleaved(setup, calls)
            del calls
            gc.collect()
        how = "each from the cache of the last" if advance else "each from the same cache"
        tables.append(ratio_table(f"A step of decoding, {how}", "context", medians))
    return tables


@torch.no_grad()
def curve(setup: Setup, packages: Mapping[str, Package], contexts: Sequence[int]) -> dict[str, list[float]]:
    """What positions add to a decoded token, in milliseconds, by tree and kind."""
    found: dict[str, list[float]] = {}
    for context in contexts:
        calls = {case: Decoding(setup, packages[case[0]], case[1], context, advance=True) for case in cases(packages)}
        medians = interleaved(setup, calls)
        del calls
        gc.collect()
        for tree, kind in medians:
            if kind != "none":
                added = medians[tree, kind] - medians[tree, "none"]
                found.setdefault(f"{kind}, {tree}", []).append(added * 1e3)
    return found


@torch.no_grad()
def rotation(setup: Setup, packages: Mapping[str, Package], contexts: Sequence[int] = (4_096,)) -> list[Table]:
    rows = []
    for length in contexts:
        q, k = (torch.randn(1, HEADS, length, DIM_HEAD, device=setup.device, dtype=setup.dtype) for _ in range(2))
        old, new = packages["upstream"].layers, packages["fork"].layers
        freqs, scale = old.RotaryEmbedding(ROTARY_DIM, use_xpos=True).to(setup.device).forward_from_seq_len(length)
        rotary = new.RotaryEmbedding(ROTARY_DIM, use_xpos=True).to(setup.device)
        table = new.XPosTable(*rotary.forward_from_seq_len(length)).with_factors(length, DIM_HEAD)
        q_factor, k_factor = table.factors
        calls: dict[Case, Callable[[], object]] = {
            ("clone of both",): both(torch.clone, (q,), (k,)),
            ("upstream, xPos",): both(old.apply_rotary_pos_emb, (q, freqs, scale), (k, freqs, scale**-1.0)),
            ("fork, xPos",): both(new.multiply_pairs, (q, q_factor), (k, k_factor)),
        }
        calls.update(others(setup, q, k))

        medians = interleaved(setup, calls)
        floor = medians["clone of both",]
        rows += [
            (f"{length:,}", case[0], milliseconds(median), f"{median / floor:.2f}") for case, median in medians.items()
        ]
    head = ("positions", "what", "median", "in clones")
    title = f"The rotation of q and k alone, (1, {HEADS}, n, {DIM_HEAD}) with {ROTARY_DIM} dims rotated, tables given"
    return [Table(title, head, tuple(rows))]


def both(function: Callable[..., Tensor], of_q: tuple[Any, ...], of_k: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: (function(*of_q), function(*of_k))


def others(setup: Setup, q: Tensor, k: Tensor) -> dict[Case, Callable[[], object]]:
    """The rotation of other libraries, where they are installed."""
    found: dict[Case, Callable[[], object]] = {}
    length = q.shape[-2]
    try:
        import rotary_embedding_torch

        embedding = rotary_embedding_torch.RotaryEmbedding(ROTARY_DIM, use_xpos=True).to(setup.device)
        embedding.rotate_queries_and_keys(q, k)  # which keeps its tables
        found["rotary-embedding-torch, xPos",] = lambda: embedding.rotate_queries_and_keys(q, k)
    except ImportError:
        warnings.warn("rotary-embedding-torch is not installed, and is left out", stacklevel=1)
    try:
        from torchscale.component import xpos_relative_position as torchscale

        xpos = torchscale.XPOS(ROTARY_DIM).to(setup.device)
        power = torch.arange(-length // 2, length - length // 2, device=setup.device).to(xpos.scale)
        scale = xpos.scale ** power.div(xpos.scale_base)[:, None]
        sin, cos = torchscale.fixed_pos_embedding(scale)

        def rotate(t: Tensor, s: Tensor) -> Tensor:
            rotated = torchscale.apply_rotary_pos_emb(t[0, ..., :ROTARY_DIM], sin, cos, s)
            return torch.cat((rotated[None], t[..., ROTARY_DIM:]), dim=-1)

        found["torchscale, xPos",] = lambda: (rotate(q, scale), rotate(k, 1 / scale))
    except ImportError:
        warnings.warn("torchscale is not installed, and is left out", stacklevel=1)
    if setup.device.type == "cuda":
        try:
            from flash_attn.layers.rotary import apply_rotary_emb

            angles = torch.rand(length, ROTARY_DIM // 2, device=setup.device)
            cos_, sin_ = angles.cos().to(setup.dtype), angles.sin().to(setup.dtype)
            seq_first = [t.transpose(1, 2).contiguous() for t in (q, k)]
            found["flash-attn, rotary without xPos",] = lambda: [
                apply_rotary_emb(t, cos_, sin_, interleaved=True) for t in seq_first
            ]
        except ImportError:
            warnings.warn("flash-attn is not installed, and is left out", stacklevel=1)
    return found


def compiled(setup: Setup, packages: Mapping[str, Package], contexts: Sequence[int]) -> list[Table]:
    """torch.compile(fullgraph=True, dynamic=True): prefill and a training step, in times of no positions compiled."""
    kinds = [("upstream", "none"), ("upstream", "xpos"), ("fork", "xpos")]
    rows = []
    for what in ("prefill", "training step"):
        calls = {}
        for case in kinds:
            model = setup.model(packages[case[0]], case[1]).train(what == "training step")
            with torch.set_grad_enabled(what == "training step"):
                model(setup.tokens(8))  # lets einops register its backend
            calls[case] = torch.compile(model, fullgraph=True, dynamic=True)
        for context in contexts:
            x = setup.tokens(context)
            if what == "prefill":
                with torch.no_grad():
                    medians = interleaved(setup, {case: partial(call, x) for case, call in calls.items()})
            else:
                medians = interleaved(setup, {case: partial(train_step, call, x) for case, call in calls.items()})
            none = medians["upstream", "none"]
            rows.append(
                (
                    what,
                    f"{context:,}",
                    milliseconds(none),
                    f"{medians['upstream', 'xpos'] / none:.3f}",
                    f"{medians['fork', 'xpos'] / none:.3f}",
                )
            )
    head = ("what", "tokens", "no positions", "xPos, upstream", "xPos, fork")
    return [Table("torch.compile, one graph for all lengths", head, tuple(rows))]


# memory, in a process of its own


def memory(setup: Setup, _packages: Mapping[str, Package], contexts: Sequence[int]) -> list[Table]:
    # glibc gives memory back when it is freed, whatever its size: else what it keeps is 3 % of noise
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    rows = []
    shown = (("upstream", "none"), ("upstream", "xpos"), ("fork", "xpos"))
    for what in ("prefill", "train", "decode"):
        for context in contexts:
            peaks: dict[Case, list[float]] = {case: [] for case in shown}
            for _ in range(PROCESSES if context < MANY else 1):
                for (tree, kind), found in peaks.items():
                    command = [sys.executable, __file__, "peak", what, tree, kind, str(context)]
                    command += [f"--device={setup.device}", f"--dtype={str(setup.dtype)[6:]}"]
                    result = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
                    found.append(float(result.stdout))
            medians = {case: statistics.median(found) for case, found in peaks.items()}
            cells = [f"{medians[case]:,.1f} MB" for case in shown]
            ratio = medians["fork", "xpos"] / medians["upstream", "xpos"]
            rows.append((what, f"{context:,}", *cells, f"{ratio:.4f}"))
    head = ("what", "tokens or context", "no positions", "xPos, upstream", "xPos, fork", "fork / upstream")
    return [Table("Peak memory of the process", head, tuple(rows))]


def peak(setup: Setup, what: str, tree: str, kind: str, context: int) -> float:
    """The peak memory of this process, or of the device, in MB, after some rounds of one case."""
    package = load(trees()[tree])
    if what == "decode":
        with torch.no_grad():
            step = Decoding(setup, package, kind, context, advance=True)
            for _ in range(40):
                step()
    else:
        model, x = setup.model(package, kind).train(what == "train"), setup.tokens(context)
        for _ in range(3 if context < MANY else 1):
            if what == "train":
                train_step(model, x)
            else:
                with torch.no_grad():
                    model(x)
    if setup.device.type == "cuda":
        return torch.cuda.max_memory_allocated(setup.device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# output


def describe(setup: Setup) -> str:
    name = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else platform.machine()
    threads = "" if setup.device.type == "cuda" else f", {torch.get_num_threads()} threads"
    model = f"dim {DIM}, depth {DEPTH}, {HEADS} heads of {DIM_HEAD}, {ROTARY_DIM} dims rotated, flash, batch 1"
    return f"{setup.device.type} ({name}{threads}), {str(setup.dtype)[6:]}, torch {torch.__version__}; {model}"


def draw(found: Mapping[str, Sequence[float]], contexts: Sequence[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in found.items():
        style = "--" if name.endswith("upstream") else "-"
        axes.plot(contexts, values, style, marker="o", markersize=4, label=name)
    axes.axhline(0, color="gray", linewidth=1)
    axes.set(xscale="log", yscale="symlog", xlabel="context", ylabel="ms per token more than no positions")
    axes.set_xticks(list(contexts), [f"{context:,}" for context in contexts])
    axes.set_title("What positions add to a decoded token", fontsize=11)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def curve_table(found: Mapping[str, Sequence[float]], contexts: Sequence[int]) -> Table:
    rows = tuple(
        (f"{context:,}", *(f"{values[i]:+.2f} ms" for values in found.values())) for i, context in enumerate(contexts)
    )
    return Table("What positions add to a decoded token", ("context", *found), rows)


def write_page(setup: Setup, tables: Sequence[Table]) -> None:
    """Put the tables between the marks, each in place of the one of its title; those of other parts stay."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: {PAGE.name} lacks {BEGIN.strip()} and {END.strip()}, between which the tables go")
    sections = {part.partition("\n")[0]: part.strip() for part in old.split("\n### ")[1:]}
    sections.update({table.title: table.markdown().removeprefix("### ").strip() for table in tables})
    text = "\n\n".join([f"{describe(setup)}.", *(f"### {section}" for section in sections.values())])
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")


PARTS: Mapping[str, Callable[..., list[Table]]] = {
    "decode": decode,
    "prefill": prefill,
    "train": train,
    "rotation": rotation,
    "compile": compiled,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What xPos costs, upstream beside the fork.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join((*PARTS, 'curve'))}; all by default")
    parser.add_argument("--contexts", nargs="+", type=int, help=f"default: {' '.join(map(str, CONTEXTS))}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of rounds per comparison (default: 20)")
    parser.add_argument("--figure", type=Path, default=HERE / "decode.svg", help="where the curve is drawn")
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the tables into benchmarks/README.md, in place of those of the same parts",
    )
    parser.add_argument("--json", type=Path, help="and all tables into this file")
    options = parser.parse_args()
    setup = Setup(torch.device(options.device), getattr(torch, options.dtype), options.seconds)
    if options.parts[:1] == ["peak"]:
        what, tree, kind, context = options.parts[1:]
        print(peak(setup, what, tree, kind, int(context)))
        return
    unknown = sorted({*options.parts} - {*PARTS, "curve"})
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; the parts are {', '.join((*PARTS, 'curve'))}")

    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    packages = {name: load(tree) for name, tree in trees().items()}
    tables: list[Table] = []
    print(f"{describe(setup)}.\n", flush=True)
    for part in options.parts or (*PARTS, "curve"):
        if part == "curve":
            contexts = options.contexts or LONG_CONTEXTS
            found = curve(setup, packages, contexts)
            made = [curve_table(found, contexts)]
            draw(found, contexts, options.figure)
        elif part in ("rotation", "compile"):
            made = PARTS[part](setup, packages, options.contexts or ((4_096,) if part == "rotation" else (256, 1_024)))
        else:
            made = PARTS[part](setup, packages, options.contexts or CONTEXTS)
        for table in made:
            print(table.markdown(), flush=True)
        tables += made
    if options.json:
        options.json.write_text(json.dumps([vars(table) for table in tables], indent=2), encoding="utf-8")
    if options.write:
        write_page(setup, tables)


if __name__ == "__main__":
    main()
