"""A model that is checked, ours or the user's: what is passed to it, one way to call it, and its twin without xPos."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from x_transformers import Attention, TransformerWrapper
from x_transformers.x_transformers import AttentionLayers, RotaryEmbedding, ShiftTokens, rotate_half

from . import formula

SEED = 0
_CONTEXT_LEN = 24


class UsageError(ValueError):
    """What was asked for cannot be done; the message names the argument, the value, the limit and the way out."""


# the release of upstream


def is_patched() -> bool:
    """Whether `RotaryEmbedding.forward` knows the window of the queries, as upstream's does not."""
    return "seq_len" in inspect.signature(RotaryEmbedding.forward).parameters


def accepts(argument: str) -> bool:
    """Whether this release of upstream has an argument of `AttentionLayers.forward`; 1.27.5 lacks some."""
    return argument in inspect.signature(AttentionLayers.forward).parameters


def rotates_neighbors() -> bool:
    """Whether the dims 2d and 2d + 1 are rotated together, as in 2.x, and not d and d + dim / 2, as in 1.27.5."""
    return bool(rotate_half(torch.arange(4))[0] == -1)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# what is passed


@dataclass(frozen=True)
class Inputs:
    """`main` is token ids `(b, n)` or hidden states `(b, n, d)`; the rest goes with it, by name.

    `per_row` has a first dimension of b, and `constant` is the same for all.
    """

    main: Tensor
    per_row: Mapping[str, Tensor] = field(default_factory=dict)
    constant: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.main.shape[1]

    def part(self, start: int | None, stop: int | None, rows: slice = slice(None)) -> Inputs:
        """The positions from `start` to `stop` of some rows."""
        per_row = {name: value[rows] for name, value in self.per_row.items()}
        return Inputs(self.main[rows, start:stop], per_row, self.constant)

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """On a device and, what is of floating point, in a dtype."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        return Inputs(*(tree_map(move, each) for each in (self.main, self.per_row, self.constant)))


# the model


def first_attention(layers: nn.Module) -> Any:
    return next(module for module in layers.modules() if isinstance(module, Attention))


class Net:
    """A wrapper or a stack of layers that is called in one way, whichever it is.

    It gives outputs `(b, n, d)`, one per position, and the intermediates. Raises UsageError if it gives others.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.layers: Any = module if isinstance(module, AttentionLayers) else module.attn_layers
        self.is_wrapper = self.module is not self.layers
        self.reads_tokens = isinstance(module, TransformerWrapper)

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(iter(self.module.parameters()))
        return parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """That of queries and keys."""
        return first_attention(self.layers).to_q.weight.dtype  # type: ignore[no-any-return]

    @property
    def min_keys(self) -> int:
        """How many keys a query needs: `attn_sparse_topk` cannot choose among fewer."""
        functions = (module.attend.attn_fn for module in self.layers.modules() if isinstance(module, Attention))
        return max(int(getattr(function, "keywords", {}).get("sparse_topk", 1)) for function in functions)

    @property
    def is_flash(self) -> bool:
        return all(module.attend.flash for module in self.module.modules() if isinstance(module, Attention))

    @property
    def is_plain(self) -> bool:
        return isinstance(self.layers.rotary_pos_emb, PlainRotary)

    @property
    def no_cache(self) -> str:
        """Why it cannot be run with a KV cache, empty if it can."""
        if not (getattr(self.module, "can_cache_kv", True) and getattr(self.layers, "can_cache_kv", True)):
            return "it cannot cache keys and values (memory tokens, recycling or attn_selective)"
        return self.shifts_tokens

    @property
    def shifts_tokens(self) -> str:
        """Why neither a KV cache nor mems give what one call gives, empty if they can."""
        reason = "shift_tokens is wrong with a KV cache or mems in upstream, for every kind of positions"
        return reason if any(isinstance(part, ShiftTokens) for part in self.layers.modules()) else ""

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
        memory_tokens = getattr(self.module, "memory_tokens", None) if self.is_wrapper else None
        count = 0 if memory_tokens is None else int(memory_tokens.shape[0])
        every = getattr(self.module, "memory_tokens_interspersed_every", None)
        if every is None:
            return length + count
        return math.ceil(length / int(every)) * (int(every) + count)

    def longest(self, positions: int) -> int:
        """The longest text of which the layers see no more than `positions`."""
        return next((length for length in range(positions, 0, -1) if self.positions(length) <= positions), 0)

    def duplicate(self) -> Net:
        return Net(duplicate(self.module))

    def with_plain_rotary(self, dtype: torch.dtype) -> Net:
        """The same weights, rounded to the model's dtype if they are not yet, and plain rotary, in `dtype`."""
        twin = Net(duplicate(self.module).to(dtype=dtype))
        if not twin.is_plain:
            twin.layers.rotary_pos_emb = PlainRotary(2 * twin.layers.rotary_pos_emb.inv_freq.shape[0], dtype)
        return twin

    def as_float64(self) -> Net:
        """A copy with the same, already rounded, weights that computes in float64, where that can be had."""
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        return Net(duplicate(self.module).to(device).double())

    def inputs(self, batch: int, length: int) -> Inputs:
        """Random token ids, or unit-normal hidden states, and what else has to be passed with them."""
        generator = torch.Generator().manual_seed(SEED)
        normal = partial(torch.randn, generator=generator, dtype=torch.float32)
        if self.reads_tokens:
            main = torch.randint(int(self.module.num_tokens), (batch, length), generator=generator)
        else:
            # a wrapper may project it to the width of the layers
            projection = getattr(self.module, "project_in", None) or nn.Identity()
            widths = [part.in_features for part in projection.modules() if isinstance(part, nn.Linear)]
            main = normal((batch, length, widths[0] if widths else self.layers.dim))
        per_row = {}
        if self.layers.cross_attend:
            cross = next(layer[1] for kind, layer in zip(self.layers.layer_types, self.layers.layers) if kind == "c")
            projection = getattr(cross, "to_latent_kv", None) or cross.to_k
            per_row["context"] = normal((batch, _CONTEXT_LEN, getattr(projection, "in_features", self.layers.dim)))
        if getattr(self.layers, "need_condition", False):
            per_row["condition"] = normal((batch, self.layers.dim_condition))
        return Inputs(main, per_row).to(self.device, self.dtype)

    def __call__(self, inputs: Inputs, **options: Any) -> tuple[Tensor, Any]:
        """Outputs, and the intermediates. `options` are further ones of the call."""
        returned = "return_intermediates" if self.is_wrapper else "return_hiddens"
        # for attention that draws at random
        torch.manual_seed(SEED)
        passed = {**inputs.per_row, **inputs.constant, **options}
        out, intermediates = self.module(inputs.main, **{returned: True}, **passed)
        new = options.get("cache_age", 1) if options.get("cache") is not None else inputs.length
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if len(shape) != 3 or shape[:2] != (len(inputs.main), new):
            raise UsageError(f"it gives {shape} for {len(inputs.main)} texts of {new}, not one output per position")
        return out, intermediates


class PlainRotary(nn.Module):
    """Plain rotary in place of a `RotaryEmbedding`, with tables in float64, so that what rounds is the model alone."""

    like: Tensor

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.dim = None, dim
        # of the dtype that the model is in, also after it was cast
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, t: Tensor, offset: object = 0, seq_len: object = None) -> tuple[Tensor, Tensor | float]:
        """Angles `(1, n, dim)` or `(b, n, dim)` of positions `t`, `(n,)` or `(b, n)`, and a scale of 1."""
        dtype = torch.float64 if t.device.type != "mps" else torch.float32
        angle = t[..., None].to(dtype) * formula.angles(self.dim).to(t.device, dtype)
        if rotates_neighbors():
            angle = angle.repeat_interleave(2, dim=-1)
            return angle[None] if t.ndim == 1 else angle, 1.0
        # 1.27.5 has angles (n, dim), computes in their dtype, and brings back to the model's only what it scales by a
        # tensor, unpatched not even that
        angle = torch.cat((angle, angle), dim=-1).remainder(2 * math.pi)
        angle = angle.to(torch.promote_types(self.like.dtype, torch.float32))
        return angle, torch.ones_like(angle)


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
                found = [cell.cell_contents for cell in value.__closure__]
                cells = tuple(CellType(memo.get(id(each), each)) for each in found)
                bound = FunctionType(value.__code__, value.__globals__, name, value.__defaults__, cells)
                bound.__kwdefaults__ = value.__kwdefaults__
                setattr(part, name, bound)
    return copied.eval().requires_grad_(False)
