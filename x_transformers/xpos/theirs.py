"""The user's model, as `--model MODULE:FACTORY` names it: built, searched for xPos, and copied to be checked."""

from __future__ import annotations

import importlib
import random
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import x_transformers
from x_transformers import ContinuousTransformerWrapper, TransformerWrapper
from x_transformers.x_transformers import AttentionLayers, RotaryEmbedding

from .limits import longest_window
from .net import Net, UsageError, first_attention
from .subject import MIN_LEN

_PACKAGE = Path(x_transformers.__file__).parent


# building it


@contextmanager
def undisturbed() -> Iterator[None]:
    """While open, the current directory can be imported from; after it, the random state is what it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    state, here = random.getstate(), str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        if here in sys.path:
            sys.path.remove(here)


def build(spec: str) -> nn.Module:
    """What the factory of `MODULE:FACTORY` returns, called without arguments.

    To be called, as the model is, while `undisturbed` is open. Raises UsageError, in one line, for whatever the import
    or the factory raises, and for what is no module.
    """
    module_name, _, attribute = spec.partition(":")
    if not (module_name and attribute) or module_name.endswith(".py") or "/" in module_name:
        raise _error(spec, "it must be MODULE:FACTORY, as in train:build_model for the function in train.py")
    doing = f"importing {module_name}"
    try:
        factory: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            factory = getattr(factory, name)
        doing = f"calling {attribute} without arguments"
        model = factory()
    except (Exception, SystemExit) as error:
        raise _error(spec, f"{doing} failed: {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        way_out = "return the TransformerWrapper, the Decoder or a module that holds one"
        raise _error(spec, f"it returned a {type(model).__name__}; {way_out}")
    return model


def _error(spec: str, message: str) -> UsageError:
    return UsageError(f"argument --model: {spec}: " + " ".join(message.split()))


def _reason(error: BaseException) -> str:
    """What was raised, and the last line of the user's own code that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    # an assertion of x-transformers without a message is its own
    reason = f"{type(error).__name__}: {str(error) or frames[-1].line}"
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.suffix == ".py" and "site-packages" not in path.parts and _PACKAGE not in path.parents:
            return f"{reason} ({path.name}, line {frame.lineno})"
    return reason


# finding xPos in it


def find(spec: str, model: nn.Module) -> dict[str, Net]:
    """Every stack of layers with xPos in `model`, in the outermost wrapper that has it, by where that is.

    Raises UsageError if there is none.
    """
    kind = type(model).__name__
    stacks = [(path, module) for path, module in model.named_modules() if isinstance(module, AttentionLayers)]
    if not stacks:
        raise _error(spec, f"{kind} has no Decoder of x-transformers in it; return a model that is built on one")
    found = {}
    for path, layers in stacks:
        rotary: Any = getattr(layers, "rotary_pos_emb", None)
        if isinstance(rotary, RotaryEmbedding) and getattr(rotary, "scale", None) is not None:
            outermost = (
                each
                for each in model.named_modules()
                if isinstance(each[1], (TransformerWrapper, ContinuousTransformerWrapper))
                and each[1].attn_layers is layers
            )
            path, module = next(outermost, (path, layers))
            found[path] = Net(module)
    if not found:
        kinds = ", ".join(dict.fromkeys(type(layers).__name__ for _, layers in stacks))
        way_out = "pass it, as rotary_xpos_scale_base alone does nothing"
        raise _error(spec, f"{kind} has no xPos: its {kinds} was built without rotary_xpos=True; {way_out}")
    return found


def summary(path: str, net: Net) -> str:
    """One line that says what it is, and its size."""
    layers, rotary, attention = net.layers, net.layers.rotary_pos_emb, first_attention(net.layers)
    of = f" of a {type(layers).__name__}" if net.is_wrapper else ""
    return (
        f"{f'{path}, ' if path else ''}{type(net.module).__name__}{of}: "
        f"{layers.layer_types.count('a')} attention layers, {attention.heads} heads of "
        f"{attention.to_q.weight.shape[0] // attention.heads} dims, {2 * rotary.inv_freq.shape[0]} rotated, "
        f"scale base {rotary.scale_base:g}"
    )


# copying it


@torch.no_grad()
def open_net(
    spec: str, target: Net, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[Net, str]:
    """A copy of the target that can be called, cast and moved if asked, and a note on it, empty if there is nothing.

    Where the wrapper cannot be called with what is known, or gives no output per position, it is the layers in it,
    given hidden states.
    """
    try:
        copied = target.duplicate()
    except Exception as error:
        raise _error(spec, f"the model cannot be copied: {type(error).__name__}: {error}") from error
    note = reason = ""
    for part in dict.fromkeys((copied.module, copied.layers)):
        try:
            net = Net(part.to(device=device, dtype=dtype))
            if net.device.type == "meta":
                raise UsageError("its parameters are on the meta device, and have no values")
            if not net.dtype.is_floating_point:
                raise UsageError(f"its queries are projected in {net.dtype}, not in floating point")
            # as long as a check needs, as far as it can be: some options need a number of keys
            room = net.longest(longest_window(net.dtype, net.layers.rotary_pos_emb.scale_base))
            net(net.inputs(2, max(1, min(MIN_LEN, room, net.max_seq_len or MIN_LEN))))
            return net, note
        except Exception as error:
            said = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            reason, (whole, part_of_it) = " ".join(said.split()), (type(copied.module), type(copied.layers))
            tested = f"tested is the {part_of_it.__name__} in it, on hidden states"
            note = f"{tested}, as the {whole.__name__} cannot be: {reason}"
    raise _error(spec, f"the model cannot be called: {reason}")
