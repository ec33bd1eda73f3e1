"""What happens beyond the length that a model was trained at, upstream beside the fork.

    pip install -c constraints.txt ".[examples,plot]"
    python examples/length_extrapolation.py              # ten minutes on two free cores
    python examples/length_extrapolation.py --quick      # half a minute; trained far too little to mean anything

Small byte-level models are trained on windows of N bytes of text, the source of Python's standard library by default,
with no positions, with rotary embeddings, with xPos, and with xPos and memory key / values. What they lose on text that
was held out, in bits per byte, is measured in windows of 1 to 16 N.

Trained models stay in the folder `--out`: stopped, the same command goes on with the next one. Upstream is the release
that the fork is made from; pip installs it into that folder.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import json
import math
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

FACTORS = (1, 2, 4, 8, 16)
DIM_HEAD, FF_MULT, NUM_MEM_KV = 32, 2, 4
PEAK_LR, WARMUP, WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 3e-3, 0.05, 0.1, (0.9, 0.95), 1.0
BYTES_AT_ONCE = 8_192  # of an evaluation, so that memory does not depend on the length
PIN = Path(__file__).resolve().parent.parent / "patches" / "2.x" / "upstream.txt"


@dataclass(frozen=True)
class Settings:
    """What the weights of a run follow from, beside the text and the packages."""

    length: int
    steps: int
    seed: int
    device: str
    threads: int
    dim: int = 128
    depth: int = 4
    batch: int = 16
    held_out: int = 32_768


QUICK: dict[str, Any] = dict(length=16, steps=60, dim=32, depth=2, batch=8, held_out=4_096)

# their names, colours and markers, told apart by lightness as well as by hue
MODELS = {
    "none": ("no positions", "#9a9a9a", "o"),
    "rotary": ("rotary", "#e08214", "s"),
    "xpos": ("xPos", "#2b83ba", "^"),
    "xpos-mem": ("xPos, mem_kv", "#000000", "D"),
}


@dataclass(frozen=True)
class Mode:
    """A way to evaluate. `chunked`: N bytes at a time, with a KV cache; `windowed`: N keys at most for each query."""

    key: str
    title: str
    dtype: torch.dtype = torch.float32
    chunked: bool = False
    windowed: bool = False


MODES = (
    Mode("call", "float32, in one call"),
    Mode("window", "float32, each byte attending to N at most (attn_max_attend_past)", windowed=True),
    Mode("bfloat16", "cast with .bfloat16(), in one call", torch.bfloat16),
    Mode("cache", "cast with .half(), N bytes at a time through the KV cache", torch.float16, chunked=True),
)


@dataclass(frozen=True)
class Line:
    """A line of the tables: the model, the package that it runs in, the one that it was trained in, and its name."""

    kind: str
    package: str
    trained_in: str
    label: str
    fold: bool = False


def lines(same: Sequence[str]) -> list[Line]:
    """Kinds in `same` give the same bits in both packages, and have one line.

    Trained in the fork serves both, but for memory key / values, which upstream centers differently in training too.
    """
    found = []
    for kind, (name, *_) in MODELS.items():
        if kind in same:
            found.append(Line(kind, "fork", "fork", f"{name} (upstream = fork)"))
            continue
        found.append(Line(kind, "upstream", "upstream" if kind == "xpos-mem" else "fork", f"{name}: upstream"))
        found.append(Line(kind, "fork", "fork", f"{name}: fork"))
    label = "xPos, mem_kv: upstream's weights, folded, in the fork"
    return [*found, Line("xpos-mem", "fork", "upstream", label, fold=True)]


# the two packages


def load_upstream(tree: Path) -> ModuleType:
    """The pinned release from the folder `tree`, where pip installs it first; `import` goes on giving the fork."""
    if not (tree / "x_transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--require-hashes"]
        subprocess.run([*command, "--target", str(tree), "-r", str(PIN)], check=True)

    def put_away() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "x_transformers"}

    ours = put_away()
    sys.path.insert(0, str(tree))
    try:
        return importlib.import_module("x_transformers")
    finally:
        sys.path.remove(str(tree))
        put_away()
        sys.modules.update(ours)


def digest(package: ModuleType) -> str:
    files = sorted(Path(str(package.__file__)).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def build(package: ModuleType, kind: str, settings: Settings, *, windowed: bool = False) -> nn.Module:
    """A language model, bytes (b, n) to logits (b, n, 256). The seed decides on its weights."""
    options: dict[str, Any] = {
        "none": {},
        "rotary": dict(rotary_pos_emb=True, rotary_emb_dim=DIM_HEAD),
        # at the default scale base of 512 little would decay within a window
        "xpos": dict(rotary_xpos=True, rotary_emb_dim=DIM_HEAD, rotary_xpos_scale_base=settings.length),
    }[kind.partition("-")[0]]
    if kind == "xpos-mem":
        options["attn_num_mem_kv"] = NUM_MEM_KV
    if windowed:
        options["attn_max_attend_past"] = settings.length - 1
    sizes = dict(dim=settings.dim, depth=settings.depth, heads=settings.dim // DIM_HEAD, attn_dim_head=DIM_HEAD)
    torch.manual_seed(settings.seed)
    decoder = package.Decoder(**sizes, attn_flash=True, ff_mult=FF_MULT, verbose=False, **options)
    longest = max(FACTORS) * settings.length
    model = package.TransformerWrapper(num_tokens=256, max_seq_len=longest, use_abs_pos_emb=False, attn_layers=decoder)
    return model.to(settings.device)


# training


def train(model: nn.Module, name: str, settings: Settings, text: Tensor, path: Path) -> nn.Module:
    """Train it and leave its weights in `path`, or take what an earlier run has left there."""
    if path.is_file():
        model.load_state_dict(torch.load(path, map_location=settings.device, weights_only=True))
        return model.eval()

    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    order = torch.Generator().manual_seed(settings.seed)
    model.train()
    for done in tqdm(range(1, settings.steps + 1), f"train {name}"):
        starts = torch.randint(len(text) - settings.length, (settings.batch, 1), generator=order)
        x = text[starts + torch.arange(settings.length + 1)].long().to(settings.device)
        part = done / settings.steps  # the learning rate goes linearly up, then linearly down
        rate = min(part / WARMUP, (1 - part + 1 / settings.steps) / (1 - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * rate
        F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    # the file is whole, whenever this is killed
    new = path.with_suffix(".new")
    torch.save(model.state_dict(), new)
    new.replace(path)
    return model.eval()


# evaluation


def evaluated(
    package: ModuleType, kind: str, weights: nn.Module, settings: Settings, mode: Mode, *, fold: bool = False
) -> nn.Module:
    model = build(package, kind, settings, windowed=mode.windowed)
    model.load_state_dict(weights.state_dict())
    if fold:
        from x_transformers.xpos import fold_mem_kv_

        fold_mem_kv_(model, settings.length)
    return copy.deepcopy(model).to(mode.dtype).eval()


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, length: int, settings: Settings, mode: Mode) -> float | None:
    """The loss in windows of `length`, over the same bytes for every length; None where it is not finite."""
    longest = max(FACTORS) * settings.length
    total = max(min(len(text) - 1, settings.held_out) // longest, 1) * longest
    inputs, targets = (t.view(-1, length).long() for t in (text[:total], text[1 : total + 1]))
    chunk, rows, summed = settings.length if mode.chunked else length, max(BYTES_AT_ONCE // length, 1), 0.0
    for row in range(0, len(inputs), rows):
        x, y = inputs[row : row + rows], targets[row : row + rows]
        cache, logits = None, []
        for start in range(0, length, chunk):
            part = x[:, start : start + chunk].to(settings.device)
            new = dict(cache=cache, cache_age=chunk, input_not_include_cache=True) if mode.chunked else {}
            out, cache = model(part, **new, return_intermediates=True)
            logits.append(out.float().cpu())
        found = F.cross_entropy(torch.cat(logits, dim=1).transpose(1, 2), y, reduction="none")
        summed += found.double().sum().item()
    return summed / total / math.log(2) if math.isfinite(summed) else None


@torch.no_grad()
def same_bits(kind: str, packages: Mapping[str, ModuleType], weights: nn.Module, settings: Settings, x: Tensor) -> bool:
    """Whether the packages give the same bits in every way to evaluate."""
    models = ([evaluated(package, kind, weights, settings, mode) for package in packages.values()] for mode in MODES)
    return all(torch.equal(ours(x), theirs(x)) for ours, theirs in models)


# output

Results = Mapping[Line, Mapping[Mode, Sequence["float | None"]]]


def table(results: Results, settings: Settings) -> str:
    """Markdown: for each mode a table, lines by model and package, columns by length."""
    blocks = []
    lengths = " | ".join(f"{factor * settings.length:,}" for factor in FACTORS)
    for mode in MODES:
        rows = [f"### {mode.title}, N = {settings.length}\n"]
        rows += [f"| bits per byte in windows of | {lengths} |", f"|---|{'---:|' * len(FACTORS)}"]
        for line, by_mode in results.items():
            cells = ["NaN" if bits is None else f"{bits:.3f}" for bits in by_mode[mode]]
            rows.append(f"| {line.label} | {' | '.join(cells)} |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks) + "\n"


def draw(results: Results, settings: Settings) -> Figure:
    """Loss against length, a panel for each mode; the fork solid and filled, upstream dashed and hollow."""
    lengths = [factor * settings.length for factor in FACTORS]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, mode in zip(panels.flat, MODES):
        lost = []
        for line, by_mode in results.items():
            _, color, marker = MODELS[line.kind]
            hollow = line.package == "upstream"
            axes.plot(
                lengths,
                [math.nan if bits is None else bits for bits in by_mode[mode]],
                linestyle=":" if line.fold else "--" if hollow else "-",
                color=color,
                marker="x" if line.fold else marker,
                markersize=8 if hollow else 5,
                markerfacecolor="none" if hollow else color,
                label=line.label,
            )
            lost += [line.label] if by_mode[mode][-1] is None else []
        if lost:
            note, where = "\n".join(["NaN:", *lost]), axes.get_xaxis_transform()
            axes.text(lengths[-1], 0.4, note, transform=where, ha="right", va="center", fontsize=8)
        axes.axvline(settings.length, color="gray", linewidth=1, linestyle=(0, (1, 3)))
        axes.set_title(mode.title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel(f"length of the windows in bytes (dotted: N = {settings.length:,}, trained at)")
    figure.supylabel("loss on text held out, bits per byte (lower is better)", fontsize=10)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train at one length, evaluate at up to 16 times that.")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="bytes in a window of training")
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the windows")
    parser.add_argument("--device", default="cpu", help="where to run, as torch names it")
    parser.add_argument("--data", type=Path, metavar="FILE", help="the text (default: Python's standard library)")
    parser.add_argument("--upstream", type=Path, metavar="DIR", help="where upstream is (default: pip installs it)")
    parser.add_argument("--out", type=Path, default=Path("length_extrapolation"), help="folder for all files")
    parser.add_argument("--quick", action="store_true", help="a trial: tiny models, 60 steps on windows of 16")
    options = parser.parse_args(argv)
    given = {name: getattr(options, name) for name in ("length", "steps", "seed", "device")}
    settings = Settings(**{**given, **(QUICK if options.quick else {})}, threads=torch.get_num_threads())

    sources = [options.data] if options.data else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    content = b"".join(source.read_bytes() for source in sources)
    needed = 10 * max(FACTORS) * settings.length + 10
    if len(content) <= needed:
        parser.error(f"the text has {len(content):,} bytes, and needs more than {needed:,} for that --length")
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    seen, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

    options.out.mkdir(parents=True, exist_ok=True)
    import x_transformers

    packages = {"fork": x_transformers, "upstream": load_upstream(options.upstream or options.out / "upstream")}
    trained = {}
    for kind, name in dict.fromkeys((line.kind, line.trained_in) for line in lines(())):
        # of what the weights follow from: a run with other settings has other checkpoints
        follows_from = json.dumps([asdict(settings), digest(packages[name]), torch.__version__]).encode() + content
        path = options.out / f"{kind}-{name}-{hashlib.sha256(follows_from).hexdigest()[:12]}.pt"
        model = build(packages[name], kind, settings)
        trained[kind, name] = train(model, f"{MODELS[kind][0]}, {name}", settings, seen, path)

    x = held_out[None, : max(FACTORS) * settings.length].long().to(settings.device)
    found = lines([kind for kind in MODELS if same_bits(kind, packages, trained[kind, "fork"], settings, x)])
    results: dict[Line, dict[Mode, list[float | None]]] = {line: {} for line in found}
    for line, mode in tqdm([(line, mode) for line in found for mode in MODES], "evaluate"):
        weights = trained[line.kind, line.trained_in]
        model = evaluated(packages[line.package], line.kind, weights, settings, mode, fold=line.fold)
        lengths = (factor * settings.length for factor in FACTORS)
        results[line][mode] = [bits_per_byte(model, held_out, length, settings, mode) for length in lengths]

    print(table(results, settings), end="")
    draw(results, settings).savefig(options.out / "length_extrapolation.svg")
    by_key = {line.label: {mode.key: bits for mode, bits in by_mode.items()} for line, by_mode in results.items()}
    (options.out / "length_extrapolation.json").write_text(json.dumps(by_key, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
