"""The command line: `python -m x_transformers.xpos [COMMAND] [OPTIONS]`, where COMMAND is `check` if it is left out.

Exit status: 0 if all is well, 1 if a property fails or the package is unpatched or modified, 2 for a usage
error, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from . import judge, limits, migrate, ours, report, theirs
from .limits import DTYPES
from .net import SEED, Net, UsageError, name_of
from .subject import MIN_LEN, ROWS, Subject, length_of

PROG = "python -m x_transformers.xpos"
MAX_LEN, MAX_LEN_OF_MODEL = 1_024, 512

_NO_POSITIONS = (
    "without positions the output is the same, so that little can be said about them: "
    "are the weights those of training?"
)
_EPILOG = f"""examples:
  {PROG}
  {PROG} --dtype bfloat16 --device cuda --plot check.png
  {PROG} --model train:build_model
  {PROG} limits --scale-base 2048 --length 100000
  {PROG} migrate old.pt --model train:build_model --length 2048 --output new.pt
  {PROG} migrate old.pt --key model --model train:build_model --length 2048 --output new.pt
  {PROG} COMMAND --help

train:build_model is a function without arguments of train.py in the current directory. It returns a TransformerWrapper,
a Decoder, or any torch.nn.Module with one in it.

exit status: 0 all is well, 1 a property fails, the package is unpatched or modified, or the answers of a converted
checkpoint are not those of before, so that nothing was written, 2 usage error: an argument, a file or a model that
cannot be used, in one line on standard error, 130 interrupted."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


# keeps the lines of an epilog, where the examples are, and wraps all else
_Help = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=100)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # a command may be left out, and options given all the same
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "check")
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except UsageError as error:
        print(f"{PROG} {options.name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    common: Any = {"allow_abbrev": False, "formatter_class": _Help, "epilog": _EPILOG}
    description = "Tools for xPos (rotary_xpos=True). Without a command: check."
    parser = _Parser(prog=PROG, description=description, **common)
    commands = parser.add_subparsers(metavar="COMMAND", dest="name", required=True)

    def command(run: Callable[[argparse.Namespace], int], help: str, description: str) -> Callable[..., Any]:
        added = commands.add_parser(run.__name__.removeprefix("run_"), help=help, description=description, **common)
        added.set_defaults(command=run)
        return added.add_argument

    add = command(
        run_check,
        "say whether xPos is right here, on small models or on your own (the default)",
        "Run models with rotary_xpos=True over whole texts and compare what must be the same: prefixes,\n"
        "the KV cache, chunks, mems, shifted positions, generated text, and the scores of the paper's formula.\n"
        "With --model, run yours: a copy of it in eval mode, with its weights, in its dtype, on its device.",
    )
    max_len_help = (
        f"how much text to read in one call, at least {MIN_LEN} (default: {MAX_LEN} bytes; with --model "
        f"{MAX_LEN_OF_MODEL} tokens, or all that it can read)"
    )
    add("--json", action="store_true", help="one JSON document on standard output instead of text")
    add("--model", metavar="MODULE:FACTORY", help="your own model: what FACTORY of MODULE returns, without arguments")
    add("--device", help="where to run, as torch names it (default: cpu; with --model, where the model is)")
    add("--dtype", choices=tuple(DTYPES), help="of the model (default: float32; with --model, the model's)")
    add("--max-len", type=int, metavar="N", help=max_len_help)
    add("--text", metavar="FILE", help="the text to read (default: the topics of Python's own help)")
    add("--plot", metavar="FILE", help="draw deviation against length; needs the extra `plot`")

    add = command(
        run_limits,
        "say how many queries fit into one call, by dtype, and what a longer one needs",
        "How many queries fit into one call before xPos leaves the range of the dtype, as the package\n"
        "itself refuses it. What is in the KV cache or the mems does not count.",
    )
    dim_help = "rotated dims of a head, rotary_emb_dim (default: %(default)s, that of a Decoder with heads of 64)"
    base_help = "rotary_xpos_scale_base (default: 512, that of a Decoder)"
    add("--dim", type=int, default=32, metavar="D", help=dim_help)
    add("--scale-base", type=float, default=512.0, metavar="S", help=base_help)
    add("--length", type=int, metavar="N", help="also say which scale base N queries in one call need")

    add = command(
        run_migrate,
        "convert a checkpoint with memory keys (attn_num_mem_kv) that was trained without this fork",
        "Convert a checkpoint of a model with rotary_xpos=True and attn_num_mem_kv that was trained on\n"
        "upstream's release: at the length trained at it then gives here what it gave there. Any other model\n"
        "needs no conversion. The result is compared with what upstream computes before it is written.",
    )
    source_help = "a state dict of torch.save, alone or in a dict, or a .safetensors file; never written to"
    length_help = "the length trained at, in positions: tokens, memory tokens and whatever was prepended"
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=source_help)
    add("--model", required=True, metavar="MODULE:FACTORY", help="the model that the checkpoint is of")
    add("--length", required=True, type=int, metavar="N", help=length_help)
    add("--output", required=True, type=Path, metavar="OUT", help="the file to write; it must not exist yet")
    add("--key", metavar="KEY", help="where in a dict the state dict is, as in model or state.model")
    return parser


def run_check(options: argparse.Namespace) -> int:
    started = time.monotonic()
    dtype = DTYPES[options.dtype] if options.dtype is not None else None
    device = _device(options.device, dtype or torch.float32) if options.device is not None else None
    subjects: dict[str, Subject] = {}
    tested: list[str] = []
    notes, results, left_out = list[str](), list[judge.Result](), list[judge.LeftOut]()
    with theirs.undisturbed():
        if options.model is None:
            model, text = ours.SUMMARY, options.text or ours.TEXT
            max_len = length_of(Net(ours.build().module.to(dtype=dtype)), options.max_len, MAX_LEN)
            read = ours.read_text(options.text, max_len)
            subjects[""] = ours.Ours(read, device or torch.device("cpu"), dtype or torch.float32)
        else:
            if options.text is not None:
                reason = "with --model the texts are random token ids or hidden states; leave it out"
                raise UsageError(f"argument --text: {reason}")
            built = theirs.build(options.model)
            model, text = f"{options.model}, {type(built).__name__}", "random"
            for path, target in theirs.find(options.model, built).items():
                net, note = theirs.open_net(options.model, target, dtype, device)
                max_len = length_of(net, options.max_len, MAX_LEN_OF_MODEL)
                subjects[path or type(target.module).__name__] = Subject(net, net.inputs(ROWS, max_len))
                reads = "token ids" if net.reads_tokens else "hidden states"
                tested.append(f"{theirs.summary(path, target)}; {max_len:,} random {reads}")
                notes += [note] if note else []
        if options.plot is not None:
            report.prepare_plot(options.plot)

        for name, subject in subjects.items():
            prefix = f"{name}: " if len(subjects) > 1 else ""
            of_subject, lacking = judge.check(subject, partial(print, file=sys.stderr), prefix)
            results += of_subject
            left_out += lacking
            if not subject.positions_matter():
                notes.append(f"{prefix}{_NO_POSITIONS}")

    first, *_ = subjects.values()
    run = {
        "device": str(first.net.device),
        "dtype": name_of(first.net.dtype),
        "max_len": max(subject.max_len for subject in subjects.values()),
        "text": text,
        "model": model,
        "seed": SEED,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started, 1),
    }
    factor = max(subject.logit_factor for subject in subjects.values())
    found = report.outcome(results, left_out, run, logit_factor=factor, tested=tested, notes=notes)
    _write(sys.stdout, (report.document(found) if options.json else report.table(found)) + "\n")
    if options.plot is not None:
        report.plot(found, options.plot)
    return 0 if found["passed"] else 1


def _device(name: str, dtype: torch.dtype) -> torch.device:
    try:
        device = torch.device(name)
        ones = torch.ones(2, 2, device=device, dtype=dtype)
        (ones @ ones).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UsageError(
            f"argument --device: cannot use {name!r} with --dtype {name_of(dtype)}: {reason}; "
            "give a device of this machine, as cpu"
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
    _write(sys.stdout, limits.table(options.dim, options.scale_base, options.length) + "\n")
    return 0


def run_migrate(options: argparse.Namespace) -> int:
    with theirs.undisturbed():
        passed, done = migrate.migrate(options.model, options.checkpoint, options.output, options.length, options.key)
    _write(sys.stdout, done + "\n")
    return 0 if passed else 1


def _write(stream: TextIO, output: str) -> None:
    try:
        stream.write(output)
        stream.flush()
    except BrokenPipeError:
        # the reader has had enough, and the verdict stands; nothing more must be written, not at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
