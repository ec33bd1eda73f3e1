"""The command line: `python -m x_transformers.xpos [COMMAND] [OPTIONS]`, where COMMAND is `check` if it is left out.

Exit status: 0 if all is well, 1 if a property fails or the package is unpatched, modified or stale, 2 for a usage
error, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

import torch

from . import models, package, properties, report, text
from .subject import MIN_LEN, Subject

PROG = "python -m x_transformers.xpos"
DEFAULT_MAX_LEN = 4_096
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UsageError(Exception):
    """A request that cannot be met; the message names the argument and the way out."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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
    except (UsageError, text.TextError, report.PlotError) as error:
        print(f"{PROG} {options.name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG, allow_abbrev=False, description="Tools for xPos (rotary_xpos=True). Without a command: check."
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="name", required=True)

    check = commands.add_parser(
        "check",
        allow_abbrev=False,
        help="run models over text and say whether xPos is right here (the default)",
        description="Run models with rotary_xpos=True over real text and compare what must be the same: prefixes, the "
        "KV cache, chunks, mems, shifted positions, generated text, and the scores of the paper's formula.",
        epilog="Exit status: 0 all is well, 1 a property fails or the package is unpatched, modified or stale, "
        "2 usage error.",
    )
    check.set_defaults(command=run_check)
    check.add_argument("--device", default="cpu", help="where to run, as torch names it (default: cpu)")
    check.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the model (default: float32)")
    check.add_argument(
        "--max-len",
        type=_whole_number,
        default=DEFAULT_MAX_LEN,
        metavar="N",
        help=f"how much text to read in one call, in bytes, at least {MIN_LEN} (default: {DEFAULT_MAX_LEN})",
    )
    check.add_argument("--text", metavar="FILE", help="the text to read (default: the topics of Python's own help)")
    check.add_argument("--json", action="store_true", help="one JSON document on standard output instead of a table")
    check.add_argument("--plot", metavar="FILE", help="draw deviation against length; needs the extra `plot`")

    options = commands.add_parser(
        "options",
        allow_abbrev=False,
        help="compare xPos with plain rotary with every option of a decoder turned on",
        description="Turn on every option of a decoder, and say where xPos lacks what plain rotary has with it. Takes "
        "about half a minute.",
        epilog="Exit status: 0 xPos keeps all that plain rotary has, 1 it does not or an option is unclassified, "
        "2 usage error.",
    )
    options.set_defaults(command=run_options)
    options.add_argument("--json", action="store_true", help="one JSON document on standard output instead of a table")
    return parser


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
    started = time.monotonic()
    dtype = DTYPES[options.dtype]
    max_len = _max_len(options.max_len, options.dtype)
    device = _device(options.device, dtype)
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
            "dtype": options.dtype,
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
    _write(sys.stdout, (report.document(outcome) if options.json else report.table(outcome)) + "\n")
    if options.plot is not None:
        report.plot(outcome, options.plot)
    return 0 if outcome.passed else 1


def _whole_number(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None


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
