"""The command line: `python -m x_transformers.xpos [check | limits] [OPTIONS]`; without a command, `check`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import x_transformers

from .limits import DTYPES, limits

PROG = "python -m x_transformers.xpos"
_EPILOG = f"""examples:
  {PROG}
  {PROG} --dtype bfloat16 --device cuda
  {PROG} --model train:build_model
  {PROG} limits --scale-base 2048 --length 100000

train:build_model is a function without arguments of train.py in the current directory. It returns a TransformerWrapper,
a Decoder, or any torch.nn.Module that contains one. From Python: x_transformers.xpos.check(model).

exit status: 0 all is well; 1 a property fails, or the package is unpatched or modified; 2 an argument or a model cannot
be used, in one line on standard error; 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    """Raises ValueError, which `main` says in one line without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # a command may be left out, and options given all the same
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "check")
    try:
        options = _parser().parse_args(arguments)
        status, output = options.run(options)
        _write(f"{output}\n")
        return int(status)
    except SystemExit:  # after the help
        _write("")
        raise
    except ValueError as error:
        print(f"{PROG} {arguments[0]}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    # keeps the lines of the epilog, where the examples are, and wraps all else
    wrap = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=100)
    common: Any = {"allow_abbrev": False, "formatter_class": wrap, "epilog": _EPILOG}
    parser = _Parser(prog=PROG, description="Tools for xPos (rotary_xpos = True). Without a command: check.", **common)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    help = "say whether xPos is right here, in small models or in your own (the default)"
    description = (
        "Run a model with rotary_xpos = True in every way that must give the same, and compare. With --model it\n"
        "is a copy of yours, in eval mode, with its weights, in its dtype, on its device, and 9 of the 16\n"
        "properties are measured: the others are of attention scores, or of models built with other options."
    )
    add = commands.add_parser("check", help=help, description=description, **common)
    add.set_defaults(run=run_check)
    add.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add.add_argument("--model", metavar="MODULE:FACTORY", help="your model: what FACTORY of MODULE returns")
    add.add_argument("--device", help="where to run, as torch names it (default: cpu, or where your model is)")
    add.add_argument("--dtype", choices=tuple(DTYPES), help="of the model (default: float32, or that of your model)")
    help = "how many tokens to read in one call, at least 32 (default: 1024, or up to 512 with --model)"
    add.add_argument("--max-len", type=int, metavar="N", help=help)

    help = "say how many queries fit into one call, by dtype, and what a longer sequence needs"
    add = commands.add_parser("limits", help=help, description=f"{help.capitalize()}.", **common)
    add.set_defaults(run=lambda options: (0, str(limits(options.scale_base, options.length, dim=options.dim))))
    help = "rotated dims of a head, rotary_emb_dim (default: %(default)s, that of a Decoder with heads of 64)"
    add.add_argument("--dim", type=int, default=32, metavar="D", help=help)
    help = "rotary_xpos_scale_base (default: 512, that of a Decoder)"
    add.add_argument("--scale-base", type=float, default=512.0, metavar="S", help=help)
    add.add_argument("--length", type=int, metavar="N", help="also say what N queries need")
    return parser


def run_check(options: argparse.Namespace) -> tuple[int, str]:
    from .checker import OWN_MODELS, check_model

    module = OWN_MODELS if options.model is None else build(options.model)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    found = check_model(module, dtype=dtype, device=options.device, max_len=options.max_len, progress=True)
    return 0 if found.passed else 1, found.to_json() if options.json else str(found)


def build(spec: str) -> object:
    """What the factory of `MODULE:FACTORY` returns; ValueError, in one line, for whatever it or the import raises."""
    module_name, _, attribute = spec.partition(":")
    if not (module_name and attribute) or module_name.endswith(".py") or "/" in module_name:
        raise ValueError(f"--model is {spec}: give MODULE:FACTORY, as train:build_model for a function in train.py")
    doing = f"importing {module_name}"
    try:
        factory: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            factory = getattr(factory, name)
        doing = f"calling {attribute} without arguments"
        return factory()
    except (Exception, SystemExit) as error:
        raise ValueError(" ".join(f"--model is {spec}: {doing} failed: {_reason(error)}".split())) from error


def _reason(error: BaseException) -> str:
    """What was raised, and the last line of the user's own code that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    others = ("<frozen", "site-packages", os.path.dirname(os.__file__), *x_transformers.__path__)
    own = [frame for frame in frames if not any(name in frame.filename for name in others)]
    places = [f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in own]
    # an assertion of x-transformers without a message is its own
    return f"{type(error).__name__}: {str(error) or frames[-1].line}{''.join(places[-1:])}"


def _write(output: str) -> None:
    try:
        print(output, end="", flush=True)
    except BrokenPipeError:
        # the reader has had enough, and the verdict stands; nothing more must be written, not at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
