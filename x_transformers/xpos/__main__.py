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
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from . import checkpoint, limits, migration, model_properties, models, package, properties, report, text, user_model
from .subject import MIN_LEN, Subject

PROG = "python -m x_transformers.xpos"
DEFAULT_MAX_LEN = 4_096
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

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


class Progress:
    """Tells where a run is: on a terminal one line that is rewritten, elsewhere a line per property."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self.stream, self.total, self.count = stream, total, 0
        self.terminal = stream.isatty()

    def __call__(self, name: str, step: str) -> None:
        if not step:
            self.count += 1
        line = f"[{self.count}/{self.total}] {name}"
        if self.terminal:
            self._write(f"\r\x1b[K{line}{', ' if step else ''}{step}")
        elif not step:
            self._write(f"{line}\n")

    def clear(self) -> None:
        if self.terminal:
            self._write("\r\x1b[K")

    def _write(self, output: str) -> None:
        _write(self.stream, output)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # a command may be left out, and options given all the same
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "check")
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (UsageError, text.TextError, report.PlotError, user_model.ModelError, checkpoint.CheckpointError) as error:
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

exit status:
  0    all is well
  1    a property fails, or the package is unpatched or modified
  2    usage error: an argument, a file or a model that cannot be used
  130  interrupted""",
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="name", required=True)
    _add_check(commands)
    _add_limits(commands)
    _add_migrate(commands)
    _add_options(commands)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    **texts: Any,
) -> _Parser:
    parser = commands.add_parser(name, allow_abbrev=False, formatter_class=_Help, **texts)
    parser.set_defaults(command=run)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output instead of text")
    return parser


def _add_check(commands: argparse._SubParsersAction[_Parser]) -> None:
    check = _add_command(
        commands,
        "check",
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

exit status: 0 all is well, 1 a property fails or the package is unpatched or modified,
{_USAGE_AND_INTERRUPT}""",
    )
    check.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="check your own model: what FACTORY of MODULE returns, called without arguments",
    )
    check.add_argument(
        "--device", help="where to run, as torch names it (default: cpu; with --model, where the model is)"
    )
    check.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the model (default: float32; with --model, the model's)"
    )
    check.add_argument(
        "--max-len",
        type=_whole_number,
        metavar="N",
        help=f"how much text to read in one call, at least {MIN_LEN} bytes (default: {DEFAULT_MAX_LEN}); with --model "
        f"at least {model_properties.MIN_LEN} tokens (default: {model_properties.DEFAULT_MAX_LEN}, or all it can read)",
    )
    check.add_argument("--text", metavar="FILE", help="the text to read (default: the topics of Python's own help)")
    check.add_argument("--plot", metavar="FILE", help="draw deviation against length; needs the extra `plot`")


def _add_limits(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(
        commands,
        "limits",
        run_limits,
        help="say how many queries fit into one call, by dtype, and what a longer one needs",
        description="How many queries fit into one call before xPos leaves the range of the dtype, as the package\n"
        "itself refuses it. What is in the KV cache or the mems does not count.",
        epilog=f"""examples:
  {PROG} limits
  {PROG} limits --scale-base 2048 --length 100000

exit status: 0, whether or not the length fits,
{_USAGE_AND_INTERRUPT}""",
    )
    parser.add_argument(
        "--dim",
        type=_whole_number,
        default=32,
        metavar="D",
        help="rotated dims of a head, rotary_emb_dim (default: %(default)s, that of a Decoder with heads of 64)",
    )
    parser.add_argument(
        "--scale-base",
        type=_number,
        default=512.0,
        metavar="S",
        help="rotary_xpos_scale_base (default: 512, that of a Decoder)",
    )
    parser.add_argument(
        "--length", type=_whole_number, metavar="N", help="also say which scale base N queries in one call need"
    )


def _add_migrate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(
        commands,
        "migrate",
        run_migrate,
        help="convert a checkpoint with memory keys (attn_num_mem_kv) that was trained without this fork",
        description="Convert a checkpoint of a model with rotary_xpos=True and attn_num_mem_kv that was trained on\n"
        "upstream's release: at the length trained at it then gives here what it gave there. Any other model\n"
        "needs no conversion. The result is compared with what upstream computes before it is written.",
        epilog=f"""examples:
  {PROG} migrate old.pt --model train:build_model --length 2048 --output new.pt
  {PROG} migrate step9.pt --key model --model train:build_model --length 2048 --output new.pt
  {PROG} migrate a.safetensors --model train:build_model --length 2048 --output b.safetensors

exit status: 0 converted, 1 the answers are not those of before, and nothing was written,
{_USAGE_AND_INTERRUPT}""",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a state dict of torch.save, alone or in a dict, or a .safetensors file; never written to",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FACTORY",
        help="what FACTORY of MODULE returns, called without arguments, is the model that the checkpoint is of",
    )
    parser.add_argument(
        "--length",
        required=True,
        type=_whole_number,
        metavar="N",
        help="the length trained at, in positions: tokens, memory tokens and whatever was prepended",
    )
    parser.add_argument("--output", required=True, metavar="OUT", help="the file to write; it must not exist yet")
    parser.add_argument("--key", metavar="KEY", help="where in a dict the state dict is, as in model or state.model")
    parser.add_argument("--dry-run", action="store_true", help="convert and compare, and write nothing")


def _add_options(commands: argparse._SubParsersAction[_Parser]) -> None:
    _add_command(
        commands,
        "options",
        run_options,
        help="compare xPos with plain rotary with every option of a decoder turned on",
        description="Turn on every option of a decoder, and say where xPos lacks what plain rotary has with it. Takes\n"
        "about half a minute.",
        epilog=f"""examples:
  {PROG} options
  {PROG} options --json

exit status: 0 xPos keeps all that plain rotary has, 1 it does not or an option is unclassified,
{_USAGE_AND_INTERRUPT}""",
    )


def run_options(options: argparse.Namespace) -> int:
    if not models.accepts("pos"):
        raise UsageError(f"the survey is about the options of x-transformers 2.x, not of {package.describe().release}")
    # not at the top: it imports what a release like that lacks
    from . import survey

    progress = Progress(sys.stderr, len(survey.ENTRIES))
    rows = survey.survey(lambda option: progress(option, ""))
    progress.clear()
    _write(sys.stdout, (survey.document(rows) if options.json else survey.format_table(rows)) + "\n")
    return 0 if all(row.passed for row in rows) and not survey.unclassified() else 1


def run_check(options: argparse.Namespace) -> int:
    if options.model is not None:
        return run_check_of_model(options)
    started = time.monotonic()
    dtype_name = options.dtype or "float32"
    dtype = DTYPES[dtype_name]
    max_len = _max_len(DEFAULT_MAX_LEN if options.max_len is None else options.max_len, dtype_name)
    device = _device(options.device or "cpu", dtype)
    content = text.read(options.text, max_len)
    if options.plot is not None:
        report.prepare_plot(options.plot)

    found = package.describe()
    left_out = properties.left_out()
    progress = Progress(sys.stderr, len(properties.PROPERTIES) - len(left_out))
    subject = Subject(torch.tensor(list(content)), max_len, device=device, dtype=dtype)
    results = properties.check(subject, progress)
    progress.clear()

    outcome = report.Report(
        package=found,
        run={
            "device": str(device),
            "dtype": dtype_name,
            "max_len": max_len,
            "text": options.text or text.DEFAULT_NAME,
            "model": models.SUMMARY,
            "seed": models.SEED,
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - started, 1),
        },
        results=results,
        logit_factor=subject.logit_factor,
        left_out=left_out,
    )
    return _report(outcome, options)


def run_check_of_model(options: argparse.Namespace) -> int:
    started = time.monotonic()
    if options.text is not None:
        raise UsageError("argument --text: with --model the texts are random token ids or hidden states; leave it out")
    dtype = DTYPES[options.dtype] if options.dtype is not None else None
    device = _device(options.device, dtype or torch.float32) if options.device is not None else None
    if options.plot is not None:
        report.prepare_plot(options.plot)

    results: list[properties.Result] = []
    left_out: list[properties.LeftOut] = []
    tested, notes, subjects = [], [], []
    with user_model.undisturbed():
        model = user_model.build(options.model)
        targets = user_model.find(options.model, model)
        # all of them before any work is done
        for target in targets:
            net, note = user_model.open_net(options.model, target, dtype, device)
            subject = model_properties.ModelSubject(net, _max_len_of_model(options.max_len, net))
            kind = "token ids" if net.reads_tokens else "hidden states"
            subjects.append(subject)
            tested.append(f"{target.summary}; {subject.max_len:,} random {kind}")
            notes += [note] if note else []

        progress = Progress(sys.stderr, len(model_properties.PROPERTIES) * len(targets))
        for target, subject in zip(targets, subjects):
            prefix = f"{target.path or type(target.module).__name__}: " if len(targets) > 1 else ""
            of_target, not_of_target = model_properties.check(
                subject,
                lambda name, step, prefix=prefix: progress(prefix + name, step),  # type: ignore[misc]
            )
            results += [replace(each, key=prefix + each.key, name=prefix + each.name) for each in of_target]
            left_out += [replace(each, key=prefix + each.key, name=prefix + each.name) for each in not_of_target]
            if not subject.positions_matter():
                notes.append(
                    f"{prefix}without positions the output is the same, so that little can be said about them: "
                    "are the weights those of training?"
                )
        progress.clear()

    net = subjects[0].net
    outcome = report.Report(
        package=package.describe(),
        run={
            "device": str(net.device),
            "dtype": str(net.dtype).removeprefix("torch."),
            "max_len": max(subject.max_len for subject in subjects),
            "text": "random",
            "model": f"{options.model}, {user_model.kind_of(model)}",
            "seed": models.SEED,
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - started, 1),
        },
        results=tuple(results),
        logit_factor=max(subject.logit_factor for subject in subjects),
        left_out=tuple(left_out),
        tested=tuple(tested),
        notes=tuple(notes),
    )
    return _report(outcome, options)


def _report(outcome: report.Report, options: argparse.Namespace) -> int:
    _write(sys.stdout, (report.document(outcome) if options.json else report.table(outcome)) + "\n")
    if options.plot is not None:
        report.plot(outcome, options.plot)
    return 0 if outcome.passed else 1


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
    with user_model.undisturbed():
        loaded = checkpoint.read(source, options.key)
        model = user_model.build(options.model)
        user_model.find(options.model, model)
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


def _whole_number(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None


def _max_len_of_model(asked: int | None, net: user_model.Net) -> int:
    longest, reason = model_properties.longest(net)
    shortest = model_properties.MIN_LEN
    if longest < shortest:
        raise UsageError(
            f"argument --model: it can read {longest} positions in one call, and {shortest} are needed: {reason}"
        )
    if asked is None:
        return min(model_properties.DEFAULT_MAX_LEN, longest)
    if asked < shortest:
        raise UsageError(f"argument --max-len: {asked} is too small; give {shortest} or more")
    if asked > longest:
        raise UsageError(
            f"argument --max-len: {asked} is too large for this model, as {reason}; give {longest} or fewer"
        )
    return asked


def _max_len(value: int, dtype: str) -> int:
    if value < MIN_LEN:
        raise UsageError(f"argument --max-len: {value} is too small; give {MIN_LEN} or more")
    longest = models.longest_window(DTYPES[dtype], masked=True)
    if value > longest:
        raise UsageError(
            f"argument --max-len: {value} queries in one call leave the range of {dtype}; give {longest} or fewer, "
            "or a --dtype of wider range"
        )
    return value


def _device(name: str, dtype: torch.dtype) -> torch.device:
    try:
        device = torch.device(name)
        ones = torch.ones(2, 2, device=device, dtype=dtype)
        (ones @ ones).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"argument --device: cannot use {name!r} with --dtype {str(dtype).removeprefix('torch.')}: "
            f"{reason.rstrip('.')}; give a device of this machine, as cpu"
        ) from None
    return device


def _write(stream: TextIO, output: str) -> None:
    try:
        stream.write(output)
        stream.flush()
    except BrokenPipeError:
        # the reader has had enough, and the verdict stands; nothing more must be written, not at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
