"""The command line: `python -m x_transformers.xpos [COMMAND] [OPTIONS]`, where COMMAND is `check` if it is left out.

Exit status: 0 if all is well, 1 if a property fails or the package is unpatched or modified, 2 for a usage
error, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from . import checkpoint, judge, limits, migration, ours, package, report, theirs
from .net import SEED, ModelError, Net
from .subject import MIN_LEN, ROWS, Subject, longest

PROG = "python -m x_transformers.xpos"
DEFAULT_MAX_LEN = 1_024
DEFAULT_MAX_LEN_OF_MODEL = 512
DTYPES = limits.DTYPES

_NO_POSITIONS = (
    "without positions the output is the same, so that little can be said about them: "
    "are the weights those of training?"
)
_USAGE_AND_INTERRUPT = (
    "2 usage error: an argument, a file or a model that cannot be used, in one line on standard error, 130 interrupted."
)


class UsageError(Exception):
    """A request that cannot be met; the message names the argument and the way out."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of an epilog, where the examples are, and wraps all else."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # a command may be left out, and options given all the same
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "check")
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (UsageError, ours.TextError, report.PlotError, ModelError, checkpoint.CheckpointError) as error:
        print(f"{PROG} {options.name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        allow_abbrev=False,
        formatter_class=_Help,
        description="Tools for xPos (rotary_xpos=True). Without a command: check.",
        epilog=f"""examples:
  {PROG}
  {PROG} --model train:build_model
  {PROG} limits --length 100000
  {PROG} migrate old.pt --model train:build_model --length 2048 --output new.pt
  {PROG} COMMAND --help

exit status: 0 all is well, 1 a property fails, or the package is unpatched or modified,
{_USAGE_AND_INTERRUPT}""",
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="name", required=True)
    _add_check(commands)
    _add_limits(commands)
    _add_migrate(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser], run: Callable[[argparse.Namespace], int], **texts: Any
) -> Callable[..., argparse.Action]:
    """What adds the arguments of the command that `run` is named after."""
    name = run.__name__.removeprefix("run_")
    texts["epilog"] += f",\n{_USAGE_AND_INTERRUPT}"
    parser = commands.add_parser(name, allow_abbrev=False, formatter_class=_Help, **texts)
    parser.set_defaults(command=run)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output instead of text")
    return parser.add_argument


def _add_check(commands: argparse._SubParsersAction[_Parser]) -> None:
    add = _command(
        commands,
        run_check,
        help="say whether xPos is right here, on small models or on your own (the default)",
        description="Run models with rotary_xpos=True over whole texts and compare what must be the same: prefixes,\n"
        "the KV cache, chunks, mems, shifted positions, generated text, and the scores of the paper's formula.\n"
        "With --model, run yours: a copy of it in eval mode, with its weights, in its dtype, on its device.",
        epilog=f"""examples:
  {PROG}
  {PROG} check --dtype bfloat16 --device cuda --plot check.png
  {PROG} check --model train:build_model
      where train.py, in the current directory, has a function build_model() without arguments that returns
      a TransformerWrapper, a Decoder, or any torch.nn.Module with one in it

exit status: 0 all is well, 1 a property fails or the package is unpatched or modified""",
    )
    add("--model", metavar="MODULE:FACTORY", help="your own model: what FACTORY of MODULE returns, without arguments")
    add("--device", help="where to run, as torch names it (default: cpu; with --model, where the model is)")
    add("--dtype", choices=tuple(DTYPES), help="of the model (default: float32; with --model, the model's)")
    add(
        "--max-len",
        type=int,
        metavar="N",
        help=f"how much text to read in one call, at least {MIN_LEN} (default: {DEFAULT_MAX_LEN} bytes; with --model "
        f"{DEFAULT_MAX_LEN_OF_MODEL} tokens, or all that it can read)",
    )
    add("--text", metavar="FILE", help="the text to read (default: the topics of Python's own help)")
    add("--plot", metavar="FILE", help="draw deviation against length; needs the extra `plot`")


def _add_limits(commands: argparse._SubParsersAction[_Parser]) -> None:
    add = _command(
        commands,
        run_limits,
        help="say how many queries fit into one call, by dtype, and what a longer one needs",
        description="How many queries fit into one call before xPos leaves the range of the dtype, as the package\n"
        "itself refuses it. What is in the KV cache or the mems does not count.",
        epilog=f"""examples:
  {PROG} limits
  {PROG} limits --scale-base 2048 --length 100000

exit status: 0, whether or not the length fits""",
    )
    dim_help = "rotated dims of a head, rotary_emb_dim (default: %(default)s, that of a Decoder with heads of 64)"
    base_help = "rotary_xpos_scale_base (default: 512, that of a Decoder)"
    add("--dim", type=int, default=32, metavar="D", help=dim_help)
    add("--scale-base", type=float, default=512.0, metavar="S", help=base_help)
    add("--length", type=int, metavar="N", help="also say which scale base N queries in one call need")


def _add_migrate(commands: argparse._SubParsersAction[_Parser]) -> None:
    add = _command(
        commands,
        run_migrate,
        help="convert a checkpoint with memory keys (attn_num_mem_kv) that was trained without this fork",
        description="Convert a checkpoint of a model with rotary_xpos=True and attn_num_mem_kv that was trained on\n"
        "upstream's release: at the length trained at it then gives here what it gave there. Any other model\n"
        "needs no conversion. The result is compared with what upstream computes before it is written.",
        epilog=f"""examples:
  {PROG} migrate old.pt --model train:build_model --length 2048 --output new.pt
  {PROG} migrate step9.pt --key model --model train:build_model --length 2048 --output new.pt
  {PROG} migrate a.safetensors --model train:build_model --length 2048 --output b.safetensors

exit status: 0 converted, 1 the answers are not those of before, and nothing was written""",
    )
    source_help = "a state dict of torch.save, alone or in a dict, or a .safetensors file; never written to"
    model_help = "the model that the checkpoint is of: what FACTORY of MODULE returns, without arguments"
    length_help = "the length trained at, in positions: tokens, memory tokens and whatever was prepended"
    add("checkpoint", metavar="CHECKPOINT", help=source_help)
    add("--model", required=True, metavar="MODULE:FACTORY", help=model_help)
    add("--length", required=True, type=int, metavar="N", help=length_help)
    add("--output", required=True, metavar="OUT", help="the file to write; it must not exist yet")
    add("--key", metavar="KEY", help="where in a dict the state dict is, as in model or state.model")
    add("--dry-run", action="store_true", help="convert and compare, and write nothing")


def run_check(options: argparse.Namespace) -> int:
    started = time.monotonic()
    dtype = DTYPES[options.dtype] if options.dtype is not None else None
    device = _device(options.device, dtype or torch.float32) if options.device is not None else None
    with theirs.undisturbed():
        if options.model is not None:
            checked = _user_model(options, dtype, device)
        else:
            checked = _our_model(options, dtype or torch.float32, device or torch.device("cpu"))
        if options.plot is not None:
            report.prepare_plot(options.plot)

        results, left_out = [], []
        notes = list(checked.notes)
        total = sum(len(judge.plan(subject)[0]) for subject in checked.subjects.values())
        numbers = iter(range(1, total + 1))
        for name, subject in checked.subjects.items():
            prefix = f"{name}: " if len(checked.subjects) > 1 else ""
            found, lacking = judge.check(subject, partial(_progress, numbers, total, prefix))
            results += [replace(each, key=prefix + each.key, name=prefix + each.name) for each in found]
            left_out += [replace(each, key=prefix + each.key, name=prefix + each.name) for each in lacking]
            if not subject.positions_matter():
                notes.append(f"{prefix}{_NO_POSITIONS}")

    subjects = list(checked.subjects.values())
    outcome = report.Report(
        package=package.describe(),
        run={
            "device": str(subjects[0].net.device),
            "dtype": str(subjects[0].net.dtype).removeprefix("torch."),
            "max_len": max(subject.max_len for subject in subjects),
            "text": checked.text,
            "model": checked.model,
            "seed": SEED,
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - started, 1),
        },
        results=tuple(results),
        logit_factor=max(subject.logit_factor for subject in subjects),
        left_out=tuple(left_out),
        tested=checked.tested,
        notes=tuple(notes),
    )
    _write(sys.stdout, (report.document(outcome) if options.json else report.table(outcome)) + "\n")
    if options.plot is not None:
        report.plot(outcome, options.plot)
    return 0 if outcome.passed else 1


@dataclass(frozen=True)
class Checked:
    """What a check is of: subjects by name, what to call the model and the text, and what was tested of a user's."""

    subjects: Mapping[str, Subject]
    model: str
    text: str
    tested: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _our_model(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Checked:
    max_len = _max_len(options.max_len, DEFAULT_MAX_LEN, Net(ours.build().module.to(dtype)))
    subject = ours.Ours(ours.read_text(options.text, max_len), device, dtype)
    return Checked({"": subject}, ours.SUMMARY, options.text or ours.TEXT)


def _user_model(options: argparse.Namespace, dtype: torch.dtype | None, device: torch.device | None) -> Checked:
    if options.text is not None:
        raise UsageError("argument --text: with --model the texts are random token ids or hidden states; leave it out")
    subjects, tested, notes = {}, [], []
    model = theirs.build(options.model)
    for target in theirs.find(options.model, model):
        net, note = theirs.open_net(options.model, target, dtype, device)
        max_len = _max_len(options.max_len, DEFAULT_MAX_LEN_OF_MODEL, net)
        subjects[target.path or type(target.module).__name__] = Subject(net, net.inputs(ROWS, max_len))
        tested.append(f"{target.summary}; {max_len:,} random {'token ids' if net.reads_tokens else 'hidden states'}")
        notes += [note] if note else []
    return Checked(subjects, f"{options.model}, {theirs.kind_of(model)}", "random", tuple(tested), tuple(notes))


def _progress(numbers: Iterator[int], total: int, prefix: str, name: str) -> None:
    print(f"[{next(numbers)}/{total}] {prefix}{name}", file=sys.stderr)


def _max_len(asked: int | None, default: int, net: Net) -> int:
    largest, reason = longest(net)
    if largest < MIN_LEN:
        raise UsageError(
            f"argument --model: it can read {largest} positions in one call, and {MIN_LEN} are needed: {reason}"
        )
    value = min(default, largest) if asked is None else asked
    if value < MIN_LEN:
        raise UsageError(f"argument --max-len: {value} is too small; give {MIN_LEN} or more")
    if value > largest:
        raise UsageError(f"argument --max-len: {value} is too large, as {reason}; give {largest} or fewer")
    return value


def _device(name: str, dtype: torch.dtype) -> torch.device:
    try:
        device = torch.device(name)
        ones = torch.ones(2, 2, device=device, dtype=dtype)
        (ones @ ones).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        of = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"argument --device: cannot use {name!r} with --dtype {of}: {reason}; give a device of this machine, as cpu"
        ) from None
    return device


def run_limits(options: argparse.Namespace) -> int:
    if options.dim < limits.MIN_DIM or options.dim % 2:
        raise UsageError(
            f"argument --dim: {options.dim} dims cannot be rotated in pairs; give an even number from 4 on"
        )
    if not (math.isfinite(options.scale_base) and options.scale_base > 0):
        raise UsageError(f"argument --scale-base: {options.scale_base:g} is no scale base; give a number above 0")
    if options.length is not None and options.length < 1:
        raise UsageError(f"argument --length: {options.length} is no number of queries; give 1 or more")
    shown = limits.document if options.json else limits.table
    _write(sys.stdout, shown(options.dim, options.scale_base, options.length) + "\n")
    return 0


def run_migrate(options: argparse.Namespace) -> int:
    source, output = Path(options.checkpoint), Path(options.output)
    checkpoint.check_paths(source, output)
    with theirs.undisturbed():
        loaded = checkpoint.read(source, options.key)
        model = theirs.build(options.model)
        theirs.find(options.model, model)
        outcome = migration.migrate(options.model, model, loaded, options.length)
    written = outcome.passed and not options.dry_run
    if written:
        checkpoint.write(loaded, output, source)

    fields = {**asdict(outcome), "passed": outcome.passed, "checkpoint": str(source), "output": str(output)}
    fields = {"format": 1, **fields, "written": written}
    if not math.isfinite(outcome.deviation):
        fields["deviation"] = None
    if options.json:
        _write(sys.stdout, json.dumps(fields, indent=2, allow_nan=False) + "\n")
    else:
        _write(sys.stdout, _migrated(outcome, output, written=written))
    return 0 if outcome.passed else 1


def _migrated(outcome: migration.Migration, output: Path, *, written: bool) -> str:
    count, length = len(outcome.parameters), f"{outcome.length:,}"
    by, apart, allowed = f"{outcome.largest_factor:.4g}", f"{outcome.deviation:.1e}", f"{outcome.tolerance:.1e}"
    lines = [
        f"folded    {count} parameter{'' if count == 1 else 's'} in {outcome.dtype}, by up to {by}, for {length}",
        *(f"          {name}" for name in outcome.parameters),
        f"compared  the first {outcome.compared:,} of {length} positions with what upstream gives, in float64",
        f"          {apart} apart, {allowed} allowed, outputs of up to {outcome.size:.2g}",
    ]
    if written:
        lines.append(f"written   {output}")
    elif outcome.passed:
        lines.append(f"written   nothing (--dry-run): {output}")
    else:
        lines.append("FAIL      the answers are not those of before: nothing was written")
    return "\n".join(lines) + "\n"


def _write(stream: TextIO, output: str) -> None:
    try:
        stream.write(output)
        stream.flush()
    except BrokenPipeError:
        # the reader has had enough, and the verdict stands; nothing more must be written, not at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
