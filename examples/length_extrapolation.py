"""What happens beyond the length that a model was trained at, upstream beside the fork.

    pip install -c constraints.txt -e ".[examples,plot]"
    python examples/length_extrapolation.py              # README.md beside this file says how long it takes
    python examples/length_extrapolation.py --quick      # half a minute; trained far too little to mean anything

Small byte-level models are trained on windows of N bytes of text, the source of Python's standard library by default,
with no positions, with rotary embeddings, with xPos, and with xPos and memory key / values. What they lose on text that
was held out, in bits per byte, is measured in windows of 1 to 16 N. The table goes to standard output, everything else
to standard error, and both table and figure into the folder `--out`.

It can be interrupted, by Ctrl-C or a kill: the same command goes on from the last checkpoint, and on a CPU ends with
the same weights, bit for bit. Upstream is the release that the fork was made from; pip installs it into `--out`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

FACTORS = (1, 2, 4, 8, 16)
DIM_HEAD, FF_MULT, NUM_MEM_KV = 32, 2, 4
PEAK_LR, WARMUP, WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 3e-3, 0.05, 0.1, (0.9, 0.95), 1.0
# between two checkpoints, so what a kill costs
SAVE_EVERY = 50
# of an evaluation, so that memory does not depend on the length
BYTES_AT_ONCE = 8_192
# how much of the average loss that is shown each step replaces
SMOOTHING = 0.02

HERE = Path(__file__).parent
PAGE, FIGURE = HERE / "README.md", HERE / "length_extrapolation.svg"
BEGIN, END = "<!-- made by length_extrapolation.py -->\n", "<!-- end -->\n"
INSTALL = 'pip install -c constraints.txt -e ".[examples,plot]"'


class ExampleError(Exception):
    """What cannot be done; the message names the argument or file and the way out."""


class RunInterruptedError(Exception):
    """A signal asked for an end, and all that has to be kept is on disk."""


# what is compared


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


MODELS: Mapping[str, str] = {
    "none": "no positions",
    "rotary": "rotary",
    "xpos": "xPos",
    "xpos-mem": "xPos, mem_kv",
}


def positions(kind: str, length: int) -> dict[str, Any]:
    """Options of `Decoder`. The scale base is the training length: at the default of 512 little decays within it."""
    if kind == "none":
        return {}
    if kind == "rotary":
        return {"rotary_pos_emb": True, "rotary_emb_dim": DIM_HEAD}
    xpos = {"rotary_xpos": True, "rotary_emb_dim": DIM_HEAD, "rotary_xpos_scale_base": length}
    return {**xpos, "attn_num_mem_kv": NUM_MEM_KV} if kind == "xpos-mem" else xpos


@dataclass(frozen=True)
class Line:
    """A line of the tables: the model, the package that it runs in, the one it was trained in, and under what name."""

    kind: str
    package: str
    trained_in: str
    label: str
    fold: bool = False


def lines(*, upstream: bool, same: Sequence[str] = ()) -> list[Line]:
    """Kinds in `same` give the same bits in both packages, and have one line.

    Trained in the fork serves both, but for memory key / values, which upstream centers differently in training too.
    """
    found = []
    for kind, name in MODELS.items():
        if not upstream:
            found.append(Line(kind, "fork", "fork", name))
        elif kind in same:
            found.append(Line(kind, "fork", "fork", f"{name} (upstream = fork)"))
        else:
            found.append(Line(kind, "upstream", "upstream" if kind == "xpos-mem" else "fork", f"{name}: upstream"))
            found.append(Line(kind, "fork", "fork", f"{name}: fork"))
    if upstream:
        label = f"{MODELS['xpos-mem']}: upstream's weights, folded, in the fork"
        found.append(Line("xpos-mem", "fork", "upstream", label, fold=True))
    return found


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


# the two packages


@dataclass(frozen=True)
class Package:
    """A copy of x_transformers, its version and the hash of its files."""

    root: ModuleType
    version: str
    digest: str

    def model(self, kind: str, settings: Settings, *, windowed: bool = False) -> nn.Module:
        """A language model on the CPU, bytes (b, n) to logits (b, n, 256). The seed decides on its weights."""
        window = {"attn_max_attend_past": settings.length - 1} if windowed else {}
        torch.manual_seed(settings.seed)
        decoder = self.root.Decoder(
            dim=settings.dim,
            depth=settings.depth,
            heads=settings.dim // DIM_HEAD,
            attn_dim_head=DIM_HEAD,
            attn_flash=True,
            ff_mult=FF_MULT,
            verbose=False,
            **positions(kind, settings.length),
            **window,
        )
        model: nn.Module = self.root.TransformerWrapper(
            num_tokens=256,
            max_seq_len=max(FACTORS) * settings.length,
            use_abs_pos_emb=False,
            attn_layers=decoder,
        )
        return model


def _package(root: ModuleType, version: str) -> Package:
    files = sorted(Path(str(root.__file__)).parent.glob("*.py"))
    return Package(root, version, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())


def load_fork() -> Package:
    import x_transformers

    try:
        from x_transformers.xpos import package
    except ImportError:
        raise ExampleError(
            f"x_transformers in {x_transformers.__file__} is not the fork; install it: {INSTALL}"
        ) from None
    found = package.describe()
    if found.unpatched:
        raise ExampleError(
            f"x_transformers in {found.path} is not the fork: {found.unpatched[0]}; install it: {INSTALL}"
        )
    return _package(x_transformers, found.release)


def load_upstream(tree: Path) -> Package:
    """The unpatched release that the fork was made from, from the folder `tree`; `import` goes on giving the fork.

    Raises ExampleError if it is not there, not that release or not unpatched.
    """
    from x_transformers.xpos import provenance

    record = provenance.read_record()
    release = record.upstream_version if record else ""
    make = f"make it with: pip install --no-deps --target {tree} x-transformers=={release}"
    if not (tree / "x_transformers" / "__init__.py").is_file():
        raise ExampleError(f"argument --upstream: there is no x_transformers in {tree}; {make}")
    versions = [found.version for found in metadata.distributions(name="x-transformers", path=[str(tree)])]
    if [version.partition("+")[0] for version in versions] != [release]:
        named = ", ".join(versions) or "an unknown version"
        raise ExampleError(f"argument --upstream: {tree} has x-transformers {named}, not {release}; {make}")

    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "x_transformers"}
    sys.path.insert(0, str(tree))
    try:
        importlib.invalidate_caches()
        upstream = importlib.import_module("x_transformers")
        rotary = sys.modules["x_transformers.x_transformers"].RotaryEmbedding
    except ImportError as error:
        raise ExampleError(f"argument --upstream: cannot import x_transformers from {tree}: {error}; {make}") from None
    finally:
        sys.path.remove(str(tree))
        for name in [name for name in sys.modules if name.partition(".")[0] == "x_transformers"]:
            del sys.modules[name]
        sys.modules.update(ours)
    if "seq_len" in inspect.signature(rotary.forward).parameters:
        raise ExampleError(f"argument --upstream: the x_transformers in {tree} is patched; {make}")
    return _package(upstream, versions[0])


def install_upstream(out: Path) -> Path:
    """Have pip install the release, checked against the hash that the fork was built from, into a folder of `out`."""
    from x_transformers.xpos import provenance

    record = provenance.read_record()
    assert record is not None
    requirement = f"{record.upstream_name}=={record.upstream_version}"
    tree = out / f"upstream-{record.upstream_version}"
    if tree.is_dir():
        return tree
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        pinned = Path(temporary, "requirements.txt")
        pinned.write_text(f"{requirement} --hash=sha256:{record.upstream_sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--target", str(Path(temporary, "tree")), "-r", str(pinned)]
        result = subprocess.run(command, text=True, capture_output=True, check=False)
        if result.returncode:
            reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            reason = (reasons or result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExampleError(
                f"pip cannot install {requirement}: {reason}; name a folder that has it with --upstream DIR, "
                "or leave it out with --no-upstream"
            )
        Path(temporary, "tree").rename(tree)
    return tree


# the text


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, the last tenth, as (n,) tensors of uint8."""

    name: str
    digest: str
    train: Tensor
    held_out: Tensor


def read_text(path: str | None, settings: Settings) -> Text:
    """The file, or all modules at the top of the standard library. Raises ExampleError if there is too little."""
    try:
        if path is None:
            name = "the source of Python's standard library"
            sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
            content = b"".join(source.read_bytes() for source in sources)
        else:
            name, content = Path(path).name, Path(path).read_bytes()
    except OSError as error:
        raise ExampleError(f"argument --data: cannot read {error.filename}: {error.strerror}") from None
    cut = len(content) * 9 // 10
    longest = max(FACTORS) * settings.length
    if len(content) - cut <= longest:
        raise ExampleError(
            f"argument --data: {name} has {len(content):,} bytes, and a tenth of it is held out for windows of "
            f"{longest:,}; give a file of more than {10 * longest + 10:,} bytes or a smaller --length"
        )
    parts = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (content[:cut], content[cut:]))
    return Text(name, hashlib.sha256(content).hexdigest(), *parts)


# signals and progress


class Signals:
    """Whether an end was asked for. Looked at between steps, since half a step can be neither kept nor repeated.

    The second signal ends at once.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def progress(description: str, total: int, done: int, unit: str) -> Any:
    from tqdm import tqdm

    # a terminal is redrawn, a file gets a line now and then
    every = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        mininterval=every,
        file=sys.stderr,
    )


# checkpoints


def write_bytes(path: Path, content: bytes) -> None:
    """All of it or nothing: whoever reads the file, whenever this is killed, finds one state or the next."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


STATE = ("made_with", "step", "loss", "seconds", "model", "optimizer", "data_order", "random")
# what has an option to give it by, and others that the weights follow from
OPTIONS = ("length", "steps", "seed", "device", "threads")


def _damaged(path: Path, error: Exception) -> ExampleError:
    reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return ExampleError(f"checkpoint {path} is damaged ({reason}); delete it, and that model is trained anew")


def load_checkpoint(path: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in the file, None where there is none. Raises ExampleError if it is damaged or of another run."""
    try:
        # torch does not look at the checksums
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        missing = [name for name in STATE if name not in state]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
    except FileNotFoundError:
        return None
    except Exception as error:  # torch and pickle raise whatever they stumble over
        raise _damaged(path, error) from None

    for name, value in made_with.items():
        found = state["made_with"].get(name)
        if found != value:
            there = f"--{name} {found}" if name in OPTIONS else f"{name} {str(found)[:16]}"
            here = f"--{name} {value}" if name in OPTIONS else str(value)[:16]
            way_out = f"give {there} again, or " if name in OPTIONS else ""
            raise ExampleError(f"checkpoint {path} was made with {there}, not {here}; {way_out}give another --out")
    return state


# training


@dataclass(frozen=True)
class Trained:
    model: nn.Module
    # bits per byte on what it was trained on, averaged over the last steps, and CPU seconds
    loss: float
    seconds: float


def train(
    package: Package, name: str, kind: str, settings: Settings, text: Text, folder: Path, signals: Signals
) -> Trained:
    """Train a model, or what is left of it to be trained, and leave its checkpoint in the folder."""
    path = folder / f"{kind}-{name}.pt"
    made_with = {
        **asdict(settings),
        "text": text.digest,
        "package": package.digest,
        "torch": str(torch.__version__),
        "model_options": str(positions(kind, settings.length)),
    }
    del made_with["held_out"]

    device = torch.device(settings.device)
    model = package.model(kind, settings).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    order = torch.Generator().manual_seed(settings.seed)
    step, loss, seconds = 0, math.log(256), 0.0

    state = load_checkpoint(path, made_with)
    if state is not None:
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            order.set_state(state["data_order"])
            torch.set_rng_state(state["random"])
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise _damaged(path, error) from None
        step, loss, seconds = state["step"], state["loss"], state["seconds"]

    def save() -> None:
        save_checkpoint(
            path,
            {
                "made_with": made_with,
                "step": step,
                "loss": loss,
                "seconds": seconds + time.process_time() - started,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "data_order": order.get_state(),
                "random": torch.get_rng_state(),
            },
        )

    started = time.process_time()
    model.train()
    description = f"train {MODELS[kind]}, {name}"
    with progress(description, settings.steps, step, "step") as bar:
        while step < settings.steps:
            starts = torch.randint(len(text.train) - settings.length, (settings.batch, 1), generator=order)
            x = text.train[starts + torch.arange(settings.length + 1)].long().to(device)
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * learning_rate(step, settings.steps)
            found = F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:])
            found.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            loss += (found.item() - loss) * max(SMOOTHING, 1 / step)
            bar.set_postfix_str(f"{loss / math.log(2):.3f} bits/B", refresh=False)
            bar.update()
            if signals.asked or step % SAVE_EVERY == 0 or step == settings.steps:
                save()
            if signals.asked:
                raise RunInterruptedError
    return Trained(model.eval(), loss / math.log(2), seconds + time.process_time() - started)


def learning_rate(step: int, steps: int) -> float:
    """As a part of the peak: linear up, then linear down."""
    return min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps))


# evaluation


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, text: Text, length: int, settings: Settings, signals: Signals, mode: Mode
) -> float | None:
    """The loss in windows of `length`, over the same bytes for every length; None where it is not finite."""
    longest = max(FACTORS) * settings.length
    total = max(min(len(text.held_out) - 1, settings.held_out) // longest, 1) * longest
    inputs, targets = (t.view(-1, length).long() for t in (text.held_out[:total], text.held_out[1 : total + 1]))
    summed = 0.0
    rows = max(BYTES_AT_ONCE // length, 1)
    for row in range(0, len(inputs), rows):
        x, y = inputs[row : row + rows], targets[row : row + rows]
        if signals.asked:
            raise RunInterruptedError
        cache, logits = None, []
        chunk = settings.length if mode.chunked else length
        for start in range(0, length, chunk):
            part = x[:, start : start + chunk].to(settings.device)
            if mode.chunked:
                out, cache = model(
                    part,
                    cache=cache,
                    cache_age=part.shape[1],
                    input_not_include_cache=True,
                    return_intermediates=True,
                )
            else:
                out = model(part)
            logits.append(out.float().cpu())
        found = F.cross_entropy(torch.cat(logits, dim=1).transpose(1, 2), y, reduction="none")
        summed += found.double().sum().item()
    return summed / total / math.log(2) if math.isfinite(summed) else None


@dataclass(frozen=True)
class Measured:
    """Of one line in one mode: bits per byte for each of FACTORS, None where it is not finite."""

    line: Line
    mode: Mode
    bits: tuple[float | None, ...]


def same_bits(kind: str, packages: Mapping[str, Package], trained: nn.Module, settings: Settings, text: Text) -> bool:
    """Whether the packages give the same bits in a window of the largest length in one call, in every dtype."""
    x = text.held_out[None, : max(FACTORS) * settings.length].long().to(settings.device)
    for mode in MODES:
        found = []
        for package in packages.values():
            model = evaluated(package, kind, trained, settings, mode)
            with torch.no_grad():
                found.append(model(x))
        if not all(torch.equal(found[0], other) for other in found[1:]):
            return False
    return True


def evaluated(
    package: Package, kind: str, trained: nn.Module, settings: Settings, mode: Mode, *, fold: bool = False
) -> nn.Module:
    model = package.model(kind, settings, windowed=mode.windowed).to(settings.device)
    model.load_state_dict(trained.state_dict())
    if fold:
        from x_transformers.xpos import fold_mem_kv_

        fold_mem_kv_(model, settings.length)
    return copy.deepcopy(model).to(mode.dtype).eval()


def measure(
    found: Sequence[Line],
    packages: Mapping[str, Package],
    trained: Mapping[tuple[str, str], Trained],
    settings: Settings,
    text: Text,
    signals: Signals,
) -> list[Measured]:
    results = []
    with progress("evaluate", len(found) * len(MODES) * len(FACTORS), 0, "window lengths") as bar:
        for line in found:
            weights = trained[line.kind, line.trained_in].model
            for mode in MODES:
                model = evaluated(packages[line.package], line.kind, weights, settings, mode, fold=line.fold)
                bits: list[float | None] = []
                for factor in FACTORS:
                    bar.set_postfix_str(f"{line.label}, {mode.key}", refresh=False)
                    bits.append(bits_per_byte(model, text, factor * settings.length, settings, signals, mode))
                    bar.update()
                results.append(Measured(line, mode, tuple(bits)))
    return results


# output


def table(results: Sequence[Measured], settings: Settings) -> str:
    """Markdown: for each mode a table, lines by model and package, columns by length."""
    blocks = []
    for mode in MODES:
        lengths = [f"{factor * settings.length:,}" for factor in FACTORS]
        head = f"| bits per byte in windows of | {' | '.join(lengths)} |"
        rows = [
            f"| {result.line.label} | {' | '.join('NaN' if b is None else f'{b:.3f}' for b in result.bits)} |"
            for result in results
            if result.mode == mode
        ]
        rule = f"|---|{'---:|' * len(lengths)}"
        blocks.append("\n".join([f"### {mode.title}, N = {settings.length}", "", head, rule, *rows]))
    return "\n\n".join(blocks) + "\n"


def document(results: Sequence[Measured], run: Mapping[str, Any], settings: Settings) -> str:
    fields = {
        "run": dict(run),
        "results": [
            {
                "line": result.line.label,
                **{name: value for name, value in asdict(result.line).items() if name != "label"},
                "mode": result.mode.key,
                "bits_per_byte": {str(factor * settings.length): bits for factor, bits in zip(FACTORS, result.bits)},
            }
            for result in results
        ],
    }
    return json.dumps(fields, indent=2, allow_nan=False) + "\n"


# told apart by lightness and marker as well as by hue
LOOKS: Mapping[str, tuple[str, str]] = {
    "none": ("#9a9a9a", "o"),
    "rotary": ("#e08214", "s"),
    "xpos": ("#2b83ba", "^"),
    "xpos-mem": ("#000000", "D"),
}


def draw(results: Sequence[Measured], settings: Settings) -> bytes:
    """An SVG: loss against length, a panel for each mode; the fork solid and filled, upstream dashed and hollow."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    lengths = [factor * settings.length for factor in FACTORS]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, mode in zip(panels.flat, MODES):
        for result in (result for result in results if result.mode == mode):
            line = result.line
            color, marker = LOOKS[line.kind]
            hollow = line.package == "upstream"
            axes.plot(
                lengths,
                [math.nan if bits is None else bits for bits in result.bits],
                linestyle=":" if line.fold else "--" if hollow else "-",
                color=color,
                marker="x" if line.fold else marker,
                markersize=8 if hollow else 5,
                markerfacecolor="none" if hollow else color,
                label=line.label,
            )
        not_finite: dict[int, list[str]] = {}
        for result in results:
            for length, bits in zip(lengths, result.bits):
                if result.mode == mode and bits is None:
                    not_finite.setdefault(length, []).append(result.line.label)
        for length, labels in not_finite.items():
            note = "NaN:\n" + "\n".join(labels)
            axes.text(length, 0.4, note, transform=axes.get_xaxis_transform(), ha="right", va="center", fontsize=8)
        axes.axvline(settings.length, color="gray", linewidth=1, linestyle=(0, (1, 3)))
        axes.set_title(mode.title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel(f"length of the windows in bytes (dotted: N = {settings.length:,}, trained at)")
    figure.supylabel("loss on text held out, bits per byte (lower is better)", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    buffer = io.BytesIO()
    # the same picture is the same file
    with mpl.rc_context({"svg.hashsalt": "length_extrapolation"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def page_around() -> tuple[str, str]:
    """What is before and after the recorded run in README.md beside this file."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ExampleError(f"{PAGE} lacks {BEGIN.strip()} and {END.strip()}, between which the tables go")
    return before, after


def write_page(content: str) -> None:
    before, after = page_around()
    write_bytes(PAGE, f"{before}{BEGIN}\n{content}\n{END}{after}".encode())


def describe(run: Mapping[str, Any], settings: Settings) -> str:
    threads = "1 thread" if settings.threads == 1 else f"{settings.threads} threads"
    return (
        f"x-transformers {run['fork']} beside {run['upstream'] or 'no upstream'}, torch {run['torch']}, Python "
        f"{run['python']}, "
        f"{settings.device}, {threads}, seed {settings.seed}. Decoder of dim {settings.dim}, "
        f"depth {settings.depth}, {settings.dim // DIM_HEAD} heads of {DIM_HEAD}; {settings.steps:,} steps of "
        f"{settings.batch} windows of {settings.length} bytes of {run['text']} (sha256 {run['text_sha256'][:12]}); "
        f"scale base of xPos {settings.length}, {NUM_MEM_KV} memory key / values. Held out: {run['held_out']:,} bytes. "
        f"CPU time {run['train_seconds'] / 60:.0f} minutes of training and {run['evaluate_seconds'] / 60:.0f} of "
        "evaluation."
    )


# the command line


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _number(lowest: int) -> Any:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None
        if number < lowest:
            raise argparse.ArgumentTypeError(f"{number} is too small; give {lowest} or more")
        return number

    return parse


DEFAULTS = {"length": 128, "steps": 800}
QUICK: Mapping[str, Any] = {"length": 16, "steps": 60, "dim": 32, "depth": 2, "batch": 8, "held_out": 4_096}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=Path(__file__).name,
        allow_abbrev=False,
        description="Train small models at one length, evaluate them at up to 16 times that, upstream beside the fork.",
        epilog="Exit status: 0 all is done, 2 it cannot be, 130 interrupted; then the same command goes on.",
    )
    of_quick = f"; {QUICK['length']} and {QUICK['steps']} with --quick"
    parser.add_argument(
        "--length", type=_number(2), metavar="N", help=f"bytes in a window of training (default: 128{of_quick})"
    )
    parser.add_argument("--steps", type=_number(1), help=f"of training (default: {DEFAULTS['steps']}, see --length)")
    parser.add_argument("--seed", type=_number(0), default=0, help="of the weights and the windows (default: 0)")
    parser.add_argument("--device", default="cpu", help="where to run, as torch names it (default: cpu)")
    parser.add_argument("--threads", type=_number(1), help="of the CPU (default: as torch chooses)")
    parser.add_argument("--data", metavar="FILE", help="the text (default: the source of Python's standard library)")
    parser.add_argument("--upstream", type=Path, metavar="DIR", help="where upstream is (default: pip installs it)")
    parser.add_argument("--no-upstream", action="store_true", help="leave upstream out")
    parser.add_argument(
        "--out", type=Path, default=Path("length_extrapolation"), help="folder for all files (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, hardly trained: a trial of the command")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output instead of tables")
    parser.add_argument("--write", action="store_true", help="record the run in examples/README.md as well")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    try:
        device = torch.device(options.device)
        ones = torch.ones(2, 2, device=device)
        (ones @ ones).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ExampleError(
            f"argument --device: cannot use {options.device!r}: {reason}; give a device of this machine, as cpu"
        ) from None
    if options.upstream is not None and options.no_upstream:
        raise ExampleError("argument --no-upstream: not allowed with --upstream; give one of them")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    given = {name: getattr(options, name) for name in DEFAULTS if getattr(options, name) is not None}
    chosen = {**DEFAULTS, **(QUICK if options.quick else {}), **given}
    return Settings(**chosen, seed=options.seed, device=options.device, threads=torch.get_num_threads())


def _require_libraries() -> None:
    for name in ("tqdm", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise ExampleError(f"needs {name}, which is not installed: {INSTALL}") from None


def run(options: argparse.Namespace, signals: Signals) -> None:
    started = time.monotonic()
    _require_libraries()
    settings = _settings(options)
    text = read_text(options.data, settings)
    if options.write:
        page_around()
    folder = options.out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)

    packages = {"fork": load_fork()}
    if not options.no_upstream:
        packages["upstream"] = load_upstream(options.upstream or install_upstream(options.out))

    trained = {}
    for kind, name in dict.fromkeys((line.kind, line.trained_in) for line in lines(upstream="upstream" in packages)):
        trained[kind, name] = train(packages[name], name, kind, settings, text, folder, signals)

    before = time.process_time()
    same = [kind for kind in MODELS if same_bits(kind, packages, trained[kind, "fork"].model, settings, text)]
    found = lines(upstream="upstream" in packages, same=same)
    results = measure(found, packages, trained, settings, text, signals)
    longest = max(FACTORS) * settings.length
    facts = {
        **asdict(settings),
        "fork": packages["fork"].version,
        "upstream": packages["upstream"].version if "upstream" in packages else None,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "text": text.name,
        "text_sha256": text.digest,
        "held_out": max(min(len(text.held_out) - 1, settings.held_out) // longest, 1) * longest,
        "train_loss": {f"{kind}, {name}": weights.loss for (kind, name), weights in trained.items()},
        "train_seconds": round(sum(weights.seconds for weights in trained.values()), 1),
        "evaluate_seconds": round(time.process_time() - before, 1),
    }

    shown, picture = table(results, settings), draw(results, settings)
    as_json = document(results, facts, settings)
    write_bytes(options.out / "length_extrapolation.md", shown.encode())
    write_bytes(options.out / "length_extrapolation.json", as_json.encode())
    write_bytes(options.out / "length_extrapolation.svg", picture)
    if options.write:
        write_page(f"{describe(facts, settings)}\n\n{shown}")
        write_bytes(FIGURE, picture)
    sys.stdout.write(as_json if options.json else shown)
    sys.stdout.flush()
    print(describe(facts, settings), file=sys.stderr)
    print(f"{options.out} has the table and the figure; {time.monotonic() - started:.0f} s", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    try:
        with Signals() as signals:
            run(options, signals)
    except ExampleError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: error: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
        return 2
    except RunInterruptedError:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
