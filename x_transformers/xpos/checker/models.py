"""A model that is checked: its inputs, one way to call it whichever wrapper it is, and its copy with plain rotary."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import Attention, TransformerWrapper
from x_transformers.x_transformers import AttentionLayers, RotaryEmbedding

from ..prefill import why_no_cache
from ..release import WRAPPERS, plain_angles
from . import formula

SEED = 0
MIN_LEN = 32
_CONTEXT_LEN = 24


@dataclass(frozen=True)
class Text:
    """What a call is about: some rows of token ids (b, n) or hidden states (b, n, d), from `start` to `stop`.

    `per_row` goes with it by name, and has b rows too.
    """

    data: Tensor
    per_row: Mapping[str, Tensor] = field(default_factory=dict)
    rows: slice = field(default_factory=lambda: slice(None))
    start: int = 0
    stop: int = 2**63

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", min(self.stop, self.data.shape[1]))

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def main(self) -> Tensor:
        return self.data[self.rows, self.start : self.stop]

    def part(self, start: int, stop: int) -> Text:
        return replace(self, start=start, stop=stop)

    def row(self, number: int) -> Text:
        return replace(self, rows=slice(number, number + 1))

    def to(self, device: torch.device, dtype: torch.dtype) -> Text:
        """On a device and, what is of floating point, in a dtype."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return replace(self, data=move(self.data), per_row={name: move(each) for name, each in self.per_row.items()})


class Model:
    """A wrapper, or the `AttentionLayers` alone, which gives outputs (b, n, d) and the intermediates when called."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.layers: Any = getattr(module, "attn_layers", module)
        self.is_wrapper = self.module is not self.layers
        self.attentions: list[Any] = [part for part in self.layers.modules() if isinstance(part, Attention)]
        # of MultiInputTransformerWrapper: the number of tokens of each input
        embeddings: Any = getattr(module, "embeds", None) if not hasattr(module, "token_emb") else None
        self.named_tokens = {name[: -len("_embed")]: each.num_embeddings for name, each in (embeddings or {}).items()}
        self.is_language_model = isinstance(module, TransformerWrapper)
        self.reads_tokens = self.is_language_model or bool(self.named_tokens)

        self.device: torch.device = next(iter(module.parameters())).device
        # of queries and keys
        self.dtype: torch.dtype = self.attentions[0].to_q.weight.dtype
        self.is_flash = all(part.attend.flash for part in module.modules() if isinstance(part, Attention))
        # how many hidden states of the past a wrapper keeps, None where it is for the caller to keep them
        self.max_mem_len: int | None = getattr(self.module, "max_mem_len", None)
        # how many keys a query needs: `attn_sparse_topk` cannot choose among fewer
        of_attend = (getattr(attention.attend.attn_fn, "keywords", {}) for attention in self.attentions)
        self.min_keys = max(int(keywords.get("sparse_topk", 1)) for keywords in of_attend)

    @property
    def takes_prefill(self) -> bool:
        """Whether `prefill` takes it, with no more arguments than `per_row` has."""
        return self.is_language_model

    @property
    def rotary_dim(self) -> int:
        return 2 * int(self.layers.rotary_pos_emb.inv_freq.shape[0])

    @property
    def is_plain(self) -> bool:
        return isinstance(self.layers.rotary_pos_emb, PlainRotary)

    # what it cannot do, as a reason, empty if it can

    no_asserts = "" if __debug__ else "these refusals are assert statements, which python -O removes"

    @property
    def no_cache(self) -> str:
        return why_no_cache(self.module)

    @property
    def no_mems(self) -> str:
        if self.max_mem_len == 0:
            return "its max_mem_len is 0, so it keeps no hidden states"
        reason = why_no_cache(self.layers)
        return reason if reason.startswith("shift_tokens") else ""

    @property
    def no_shift(self) -> str:
        if isinstance(getattr(self.module, "pos_emb", None), nn.Module):
            return "it has absolute positions as well, which a shift changes"
        if self.is_wrapper and not self.is_language_model:
            return f"{type(self.module).__name__} does not pass pos to its layers"
        return ""

    # how much it can read

    def positions(self, length: int) -> int:
        """How many positions the layers see of a text of `length`: memory tokens have theirs."""
        every, count = self._memory_tokens()
        return length + count if every is None else -(-length // every) * (every + count)

    def longest(self, positions: int) -> int:
        """The longest text of which the layers see no more than `positions`."""
        every, count = self._memory_tokens()
        return max(0, positions - count if every is None else positions // (every + count) * every)

    def _memory_tokens(self) -> tuple[int | None, int]:
        memory_tokens = getattr(self.module, "memory_tokens", None) if self.is_wrapper else None
        count = 0 if memory_tokens is None else int(memory_tokens.shape[0])
        return getattr(self.module, "memory_tokens_interspersed_every", None), count

    @property
    def limit(self) -> int:
        """The most positions of one call that the package accepts; the unpatched release knows no limit."""
        limit = getattr(self.layers.rotary_pos_emb, "max_xpos_queries", None)
        return 2**31 if limit is None else int(limit(self.dtype))

    @property
    def comfortable(self) -> int:
        """How many positions one call has range for, with room for large activations, and for a mask on the scores.

        Half of the limit for queries and keys; less than half of that of the scores, which are scaled by its square.
        """
        of_scores = torch.finfo(torch.promote_types(self.dtype, torch.float32)).max
        ratio = math.log(of_scores) / math.log(torch.finfo(self.dtype).max)
        return min(self.limit // 2, int(self.limit * ratio * 2 / 5))

    def length_to_read(self, asked: int | None, default: int) -> int:
        """How long a text to read, if all properties can be measured on it, else ValueError."""
        largest, scale_base = self.longest(self.comfortable), self.layers.rotary_pos_emb.scale_base
        reason = f"more could leave the range of {name_of(self.dtype)} at a scale base of {scale_base:g}"
        room = getattr(getattr(self.module, "pos_emb", None), "max_seq_len", None)
        if room is not None and room < largest:
            largest, reason = int(room), "its absolute position embedding has no more"
        if largest < MIN_LEN:
            raise ValueError(f"the model can read {largest} tokens in one call, of {MIN_LEN} for the check: {reason}")
        length = min(default, largest) if asked is None else asked
        if not isinstance(length, int) or not MIN_LEN <= length <= largest:
            raise ValueError(f"max_len is {length}: give a whole number from {MIN_LEN} to {largest}, as {reason}")
        return length

    def text(self, batch: int, length: int) -> Text:
        """Random token ids, or unit-normal hidden states, and what else has to be passed with them."""
        generator = torch.Generator().manual_seed(SEED)
        normal = partial(torch.randn, generator=generator, dtype=torch.float32)
        if self.reads_tokens:
            num_tokens = max(self.named_tokens.values()) if self.named_tokens else int(self.module.num_tokens)
            main = torch.randint(num_tokens, (batch, length), generator=generator)
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
        return Text(main, per_row).to(self.device, self.dtype)

    def __call__(self, text: Text, **options: Any) -> tuple[Tensor, Any]:
        """Outputs, and the intermediates. `options` are further ones of the call. ValueError if it gives others."""
        returned = "return_intermediates" if self.is_wrapper else "return_hiddens"
        # for attention that draws at random
        torch.manual_seed(SEED)
        main: Any = text.main
        if self.named_tokens:
            main = {name: text.main % number for name, number in self.named_tokens.items()}
        per_row = {name: each[text.rows] for name, each in text.per_row.items()}
        out, intermediates = self.module(main, **{returned: True}, **per_row, **options)
        if isinstance(out, dict):
            out = torch.cat([*out.values()], dim=-1)
        new = options.get("cache_age", 1) if options.get("cache") is not None else text.length
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if len(shape) != 3 or shape[:2] != (len(text.main), new):
            wanted = f"({len(text.main)}, {new}, dim), one output for each new token"
            raise ValueError(f"the model returns {shape} instead of {wanted}")
        return out, intermediates

    # copies

    def duplicate(self) -> Model:
        return Model(duplicate(self.module))

    def with_plain_rotary(self, dtype: torch.dtype) -> Model:
        """The same weights, rounded to the model's dtype if they are not yet, and plain rotary, in `dtype`."""
        twin = Model(duplicate(self.module).to(dtype=dtype))
        if not twin.is_plain:
            twin.layers.rotary_pos_emb = PlainRotary(twin.rotary_dim, dtype)
        return twin

    def as_float64(self) -> Model:
        """A copy with the same, already rounded, weights that computes in float64, where that can be had."""
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        return Model(duplicate(self.module).to(device).double())


class PlainRotary(nn.Module):
    """Plain rotary in place of a `RotaryEmbedding`, with tables in float64, so that what rounds is the model alone."""

    like: Tensor

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.dim = None, dim
        # of the dtype that the model is in, also after it was cast
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, t: Tensor, offset: object = 0, seq_len: object = None) -> tuple[Tensor, Tensor | float]:
        """Angles (1, n, dim) or (b, n, dim) of positions `t`, (n,) or (b, n), and a scale of 1."""
        dtype = torch.float64 if t.device.type != "mps" else torch.float32
        angle = t[..., None].to(dtype) * formula.angles(self.dim).to(t.device, dtype)
        return plain_angles(angle, self.like.dtype)


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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# the models in what a user passes


def find(module: object) -> dict[str, Model]:
    """Each stack of layers with xPos in `module`, in its outermost wrapper, by its path. ValueError without any."""
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise ValueError(f"the model is a {kind}: pass a TransformerWrapper, a Decoder or a module that contains one")
    stacks = [(path, part) for path, part in module.named_modules() if isinstance(part, AttentionLayers)]
    if not stacks:
        raise ValueError(f"the {kind} has no Decoder of x-transformers in it: pass a module that contains one")
    found = {}
    for path, layers in stacks:
        rotary: Any = getattr(layers, "rotary_pos_emb", None)
        if isinstance(rotary, RotaryEmbedding) and getattr(rotary, "scale", None) is not None:
            wrappers = (each for each in module.named_modules() if isinstance(each[1], WRAPPERS))
            around: Any = ((at, each) for at, each in wrappers if each.attn_layers is layers)
            path, part = next(around, (path, layers))
            found[path] = Model(part)
    if not found:
        kinds = ", ".join(dict.fromkeys(type(layers).__name__ for _, layers in stacks))
        raise ValueError(
            f"the {kind} has no xPos: its {kinds} was built without rotary_xpos = True. Build it with that "
            "(rotary_xpos_scale_base alone does nothing)"
        )
    return found


def summary(path: str, model: Model) -> str:
    """One line that says what it is, and its size."""
    kinds = " of a ".join(dict.fromkeys((type(model.module).__name__, type(model.layers).__name__)))
    attention, scale_base = model.attentions[0], model.layers.rotary_pos_emb.scale_base
    return (
        f"{f'{path}, ' if path else ''}{kinds}: {model.layers.layer_types.count('a')} attention layers, "
        f"{attention.heads} heads of {attention.to_q.weight.shape[0] // attention.heads} dims, {model.rotary_dim} "
        f"rotated, scale base {scale_base:g}"
    )


def usable_copy(
    model: Model, dtype: torch.dtype | None, device: torch.device | str | None, *, must_run: bool
) -> tuple[Model, str]:
    """A copy that can be called, cast and moved if asked, and a note, empty if there is nothing to say.

    Where the wrapper cannot be called with what is known, or gives no output per position, it is the layers in it,
    given hidden states.
    """
    try:
        copied = model.duplicate()
    except Exception as error:
        raise ValueError(f"the model cannot be copied: {said(error)}") from error
    note = reason = ""
    for part in dict.fromkeys((copied.module, copied.layers)):
        try:
            found = Model(part.to(device=device, dtype=dtype))
            if found.device.type == "meta":
                raise ValueError("its parameters are on the meta device, and have no values")
            if not found.dtype.is_floating_point:
                raise ValueError(f"its queries are projected in {found.dtype}, not in floating point")
            # as long as a check needs, as far as it can be: some options need a number of keys
            room = getattr(getattr(part, "pos_emb", None), "max_seq_len", MIN_LEN)
            if must_run:
                found(found.text(2, max(1, min(MIN_LEN, found.longest(found.comfortable), room))))
            return found, note
        except Exception as error:
            reason = said(error)
            whole, layers = type(copied.module).__name__, type(copied.layers).__name__
            note = f"checked is the {layers} alone, on hidden states, since the {whole} cannot be called: {reason}"
    asked = "".join(f" with {name} = {str(value)!r}" for name, value in (("device", device), ("dtype", dtype)) if value)
    raise ValueError(f"the model cannot be called{asked}: {reason}")


def said(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join((str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}").split())
