"""A user's own model, as `--model MODULE:FACTORY` names it: built, searched for xPos, copied and called in one way."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import random
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

import x_transformers
from x_transformers import Attention, ContinuousTransformerWrapper, TransformerWrapper
from x_transformers.x_transformers import AttentionLayers, RotaryEmbedding

from . import models
from .subject import move

_CONTEXT_LEN = 24
_PROBE_LEN = 7
_PACKAGE = Path(x_transformers.__file__).parent


class ModelError(ValueError):
    """A model that cannot be built, or that there is nothing to do for; the message names the way out."""


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

    To be called, as the model is, while `undisturbed` is open. Raises ModelError, in one line, for a spec that is none,
    for whatever the import or the factory raises, and for what is no module.
    """
    module_name, separator, attribute = spec.partition(":")
    if not (module_name and separator and attribute):
        raise _error(spec, "it must be MODULE:FACTORY, as in train:build_model for the function in train.py")
    if module_name.endswith(".py") or "/" in module_name or "\\" in module_name:
        dotted = module_name.removesuffix(".py").replace("\\", ".").replace("/", ".").strip(".")
        raise _error(spec, f"MODULE is a name as in an import, not a path; give {dotted}:{attribute}")

    factory = _attribute(spec, _import(spec, module_name), attribute)
    if not callable(factory):
        kind = type(factory).__name__
        raise _error(spec, f"{attribute} is a {kind}, not a function; give one that builds and returns the model")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise _error(spec, f"it is called without arguments, and {error}; give a function that needs none") from None
    except ValueError:  # has no signature: the call will tell
        pass

    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise _error(spec, _reason(error)) from error
    if not isinstance(model, nn.Module):
        raise _error(
            spec,
            f"it returned {kind_of(model)}; return the TransformerWrapper, the Decoder or a module that holds one",
        )
    return model


def _error(spec: str, message: str) -> ModelError:
    return ModelError(f"argument --model: {spec}: " + " ".join(message.split()))


def _import(spec: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise _error(
                spec,
                f"there is no module {error.name!r} in the current directory or among what is installed; "
                "run this where an import of it works",
            ) from None
        raise _error(spec, f"importing {name} failed: {error}{_where(error)}; install what it imports") from error
    except SystemExit as error:
        raise _error(
            spec,
            f"importing {name} ended the process{_where(error)}; put what a script runs under "
            '`if __name__ == "__main__":`',
        ) from error
    except Exception as error:
        raise _error(spec, f"importing {name} failed: {type(error).__name__}: {error}{_where(error)}") from error


def _attribute(spec: str, module: Any, path: str) -> Any:
    found = module
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            theirs = [
                key
                for key, value in vars(module).items()
                if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
            ]
            has = f"it has {', '.join(theirs[:5])}" if theirs else "it has no functions"
            raise _error(spec, f"module {module.__name__} has no attribute {path!r}; {has}") from None
    return found


def _reason(error: BaseException) -> str:
    message = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, (AssertionError, ValueError)) and frames and Path(frames[-1].filename).parent == _PACKAGE:
        # an assertion without a message is its own
        return (
            f"x-transformers refuses to build this model{_where(error)}: {message or frames[-1].line}; "
            "change the option that this names, and run again"
        )
    return f"it raised {type(error).__name__}{f': {message}' if message else ''}{_where(error)}"


def _where(error: BaseException) -> str:
    """The last line of the user's own code that an error came through."""
    own = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        library = "site-packages" in path.parts or frame.filename.startswith("<")
        if not library and own not in path.parents and _PACKAGE not in path.parents and path.suffix == ".py":
            return f" ({path.name}, line {frame.lineno})"
    return ""


def kind_of(value: Any) -> str:
    """The name of its class, with an article."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


# finding xPos in it


@dataclass(frozen=True)
class Target:
    """What is called: a wrapper that has `layers`, or `layers` itself. `path` is where it is in the user's model."""

    path: str
    module: nn.Module
    layers_path: str
    layers: nn.Module

    @property
    def summary(self) -> str:
        """One line that says what it is, and its size."""
        layers: Any = self.layers
        rotary = layers.rotary_pos_emb
        attention = first_attention(self.layers)
        where = f"{self.path}, " if self.path else ""
        kind = type(self.module).__name__
        of = f" of a {type(self.layers).__name__}" if self.module is not self.layers else ""
        return (
            f"{where}{kind}{of}: {layers.layer_types.count('a')} attention layers, {attention.heads} heads of "
            f"{head_dim(attention)} dims, {2 * rotary.inv_freq.shape[0]} rotated, scale base {rotary.scale_base:g}"
        )


def has_xpos(layers: nn.Module) -> bool:
    rotary: Any = getattr(layers, "rotary_pos_emb", None)
    return isinstance(rotary, RotaryEmbedding) and getattr(rotary, "scale", None) is not None


def first_attention(layers: nn.Module) -> Any:
    return next(module for module in layers.modules() if isinstance(module, Attention))


def head_dim(attention: Any) -> int:
    return int(attention.to_q.weight.shape[0] // attention.heads)


def find(spec: str, model: nn.Module) -> list[Target]:
    """Every stack of layers with xPos in `model`, in the outermost wrapper that has it; ModelError if there is none."""
    stacks = [(path, module) for path, module in model.named_modules() if isinstance(module, AttentionLayers)]
    if not stacks:
        raise _error(
            spec, f"{type(model).__name__} has no Decoder of x-transformers in it; return a model that is built on one"
        )
    with_xpos = [(path, layers) for path, layers in stacks if has_xpos(layers)]
    if not with_xpos:
        kinds = ", ".join(dict.fromkeys(type(layers).__name__ for _, layers in stacks))
        raise _error(
            spec,
            f"{type(model).__name__} has no xPos: its {kinds} was built without rotary_xpos=True; pass it",
        )
    targets = []
    for layers_path, layers in with_xpos:
        wrappers = (
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, (TransformerWrapper, ContinuousTransformerWrapper)) and module.attn_layers is layers
        )
        path, module = next(wrappers, (layers_path, layers))
        targets.append(Target(path, module, layers_path, layers))
    return targets


# copies of it


def duplicate(module: nn.Module) -> nn.Module:
    """A deep copy in eval mode, without gradients, that shares nothing with `module`.

    A function that a module keeps as an attribute, as the output projection of tied embeddings, is bound to what it
    belongs to and `copy.deepcopy` leaves it as it is: here it is bound to the copy.
    """
    memo: dict[int, Any] = {}
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, FunctionType) and value.__closure__:
                setattr(part, name, _rebound(value, memo))
    copied.eval()
    return copied.requires_grad_(False)


def _rebound(function: FunctionType, memo: Mapping[int, Any]) -> FunctionType:
    cells = []
    for cell in function.__closure__ or ():
        try:
            contents = cell.cell_contents
        except ValueError:  # not filled yet
            cells.append(cell)
            continue
        cells.append(CellType(memo[id(contents)]) if id(contents) in memo else cell)
    bound = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound


# calling it


class Net:
    """A wrapper or a stack of layers that is called in one way, whichever it is.

    It gives outputs `(b, n, d)`, one per position, and the intermediates. Raises ModelError if it gives others.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.layers: Any = module if isinstance(module, AttentionLayers) else module.attn_layers

    @property
    def reads_tokens(self) -> bool:
        return isinstance(self.module, TransformerWrapper)

    @property
    def is_wrapper(self) -> bool:
        return self.module is not self.layers

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(iter(self.module.parameters()))
        return parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """That of queries and keys."""
        return first_attention(self.layers).to_q.weight.dtype  # type: ignore[no-any-return]

    @property
    def is_flash(self) -> bool:
        return all(module.attend.flash for module in self.module.modules() if isinstance(module, Attention))

    @property
    def can_cache(self) -> bool:
        return bool(getattr(self.module, "can_cache_kv", True) and getattr(self.layers, "can_cache_kv", True))

    @property
    def has_absolute_positions(self) -> bool:
        return isinstance(getattr(self.module, "pos_emb", None), nn.Module)

    @property
    def max_seq_len(self) -> int | None:
        """The longest text that an absolute position embedding has room for, None where nothing limits it."""
        limit = getattr(getattr(self.module, "pos_emb", None), "max_seq_len", None)
        return None if limit is None else int(limit)

    @property
    def max_mem_len(self) -> int | None:
        """How many hidden states of the past the wrapper keeps, None where it is for the caller to keep them."""
        return int(self.module.max_mem_len) if self.is_wrapper else None

    def positions(self, length: int) -> int:
        """How many positions the layers see of a text of `length`: memory tokens have theirs."""
        if not self.is_wrapper:
            return length
        memory_tokens = getattr(self.module, "memory_tokens", None)
        count = 0 if memory_tokens is None else int(memory_tokens.shape[0])
        every = getattr(self.module, "memory_tokens_interspersed_every", None)
        if every is None:
            return length + count
        blocks = math.ceil(length / every)
        return int(blocks * (every + count))

    def inputs(self, batch: int, length: int, seed: int = models.SEED) -> Inputs:
        """Random token ids, or unit-normal hidden states, and what else has to be passed with them."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32)

        per_position: dict[str, Any] = {}
        per_row: dict[str, Any] = {}
        constant: dict[str, Any] = {}
        if self.reads_tokens:
            ids = torch.randint(int(self.module.num_tokens), (batch, length), generator=generator)
            for name, embed in (getattr(self.module, "embeds", None) or {}).items():
                kinds = embed.weight.shape[0]
                per_position[name.removesuffix("_embed")] = torch.randint(kinds, (batch, length), generator=generator)
            if getattr(self.module, "recycling", False):
                constant["recycle_steps"] = 2
        else:
            ids = normal(batch, length, self._dim_in())
        if self.layers.cross_attend:
            per_row["context"] = normal(batch, _CONTEXT_LEN, self._dim_context())
        if getattr(self.layers, "need_condition", False):
            per_row["condition"] = normal(batch, self.layers.dim_condition)
        return Inputs(ids, per_position, per_row, constant).to(self.device, self.dtype)

    def _dim_in(self) -> int:
        projection = getattr(self.module, "project_in", None)
        linears = [part for part in projection.modules() if isinstance(part, nn.Linear)] if projection else []
        return int(linears[0].in_features if linears else self.layers.dim)

    def _dim_context(self) -> int:
        for kind, layer in zip(self.layers.layer_types, self.layers.layers):
            if kind == "c":
                attention = layer[1]
                projection = getattr(attention, "to_latent_kv", None) or attention.to_k
                return int(getattr(projection, "in_features", self.layers.dim))
        return int(self.layers.dim)

    def __call__(self, inputs: Inputs, **options: Any) -> tuple[Tensor, Any]:
        """Outputs, and the intermediates. `options` are further ones of the call."""
        arguments = {**inputs.arguments, **options}
        # for attention that draws at random
        torch.manual_seed(models.SEED)
        if self.is_wrapper:
            out, intermediates = self.module(inputs.main, return_intermediates=True, **arguments)
        else:
            out, intermediates = self.module(inputs.main, return_hiddens=True, **arguments)
        new = options.get("cache_age", 1) if options.get("cache") is not None else inputs.length
        return self._per_position(out, inputs.main.shape[0], new), intermediates

    def _per_position(self, out: Any, batch: int, length: int) -> Tensor:
        # several heads give a list, a mean and a variance are stacked in front
        if isinstance(out, (list, tuple)):
            return torch.cat([self._per_position(each, batch, length) for each in out], dim=-1)
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape == (batch, length):
            return out[..., None]
        if isinstance(out, Tensor) and out.ndim == 4 and tuple(out.shape[1:3]) == (batch, length):
            return torch.cat(out.unbind(), dim=-1)
        if not isinstance(out, Tensor) or out.ndim != 3 or tuple(out.shape[:2]) != (batch, length):
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ModelError(f"it gives {shape} for {batch} texts of {length}, not one output per position")
        return out


@dataclass(frozen=True)
class Inputs:
    """What is passed: `main` `(b, n)` or `(b, n, d)`, and what has to go with it."""

    main: Tensor
    embed_ids: Mapping[str, Tensor]
    per_row: Mapping[str, Tensor]
    constant: Mapping[str, Any]

    @property
    def length(self) -> int:
        return self.main.shape[1]

    @property
    def arguments(self) -> dict[str, Any]:
        arguments = {**self.per_row, **self.constant}
        if self.embed_ids:
            arguments["embed_ids"] = dict(self.embed_ids)
        return arguments

    def part(self, start: int | None, stop: int | None, rows: slice = slice(None)) -> Inputs:
        """The positions from `start` to `stop` of some rows."""
        return Inputs(
            self.main[rows, start:stop],
            {name: ids[rows, start:stop] for name, ids in self.embed_ids.items()},
            {name: value[rows] for name, value in self.per_row.items()},
            self.constant,
        )

    def to(self, device: torch.device, *dtypes: torch.dtype) -> Inputs:
        """On a device and, what is of floating point, rounded to each dtype in turn."""
        main, embed_ids, per_row = (
            move(each, device, *dtypes) for each in (self.main, dict(self.embed_ids), dict(self.per_row))
        )
        return Inputs(main, embed_ids, per_row, self.constant)


@torch.no_grad()
def open_net(spec: str, target: Target, dtype: torch.dtype | None, device: torch.device | None) -> tuple[Net, str]:
    """A copy of the target that can be called, cast and moved if asked, and a note on it, empty if there is nothing.

    Where the wrapper cannot be called with what is known, or gives no output per position, it is the layers in it,
    given hidden states.
    """
    try:
        parts = [duplicate(target.module)]
    except Exception as error:
        raise _error(spec, f"the model cannot be copied: {type(error).__name__}: {error}") from error
    if target.module is not target.layers:
        parts.append(Net(parts[0]).layers)

    reason = ""
    for part in parts:
        try:
            part.to(device=device, dtype=dtype)
            net = Net(part)
            if net.device.type == "meta":
                raise ModelError("its parameters are on the meta device, and have no values")
            if not net.dtype.is_floating_point:
                raise ModelError(f"its queries are projected in {net.dtype}, not in floating point")
            length = min(_PROBE_LEN, net.max_seq_len or _PROBE_LEN)
            net(net.inputs(2, length))
        except Exception as error:
            message = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
            reason = " ".join(message.split())
            continue
        if part is parts[0]:
            return net, ""
        kind = type(target.module).__name__
        return net, f"tested is the {type(part).__name__} in it, on hidden states, as the {kind} cannot be: {reason}"
    raise _error(spec, f"the model cannot be called: {reason}")
