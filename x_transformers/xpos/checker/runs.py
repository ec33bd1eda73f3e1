"""The ways to run a model that must all give the same, and how far their answers may be apart.

Tolerances follow from the dtype, in the way the flash-attention authors judge theirs; none is picked.

- Outputs: 4 times the error that the dtype forces on the same model and weights with plain rotary in place of xPos, run
  in the same way, in the dtype against float64. Two runs are compared, and with xPos other keys weigh most. As that
  model has no part of the package's `RotaryEmbedding`, a fault there cannot widen its own tolerance; as it has
  positions, attention is about as sharp as it was trained to be. A float64 model has nothing to be compared with: there
  the error of its float32 copy is scaled by the ratio of the unit roundoffs, unless attention is not flash, since its
  softmax works in float32 whatever the dtype. Nor has it a wider type for its angles, so one more rounding is as large
  as `angle_error`.
- Scores: `score_tolerance`, from the unit roundoff alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..prefill import prefill
from ..release import CACHED_TOKENS_LEFT_OUT, accepts
from .models import SEED, Model, Text

Run = Callable[[Model, Text], Tensor]

ROWS = 3
STEPS = 16


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, in float64; infinite where either is not finite."""
    difference = (a.detach().cpu().double() - b.detach().cpu().double()).abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else math.inf


# ways to run a model


def in_one_call(model: Model, text: Text) -> Tensor:
    """Outputs of all positions."""
    return model(text)[0]


def token_by_token(model: Model, text: Text, start: int, *, only_new: bool, **options: Any) -> Tensor:
    """Outputs from position `start - 1` on, after one call for all before and one for each position more."""
    out, cache = model(text.part(text.start, start), **options)
    found = [out[:, -1:]]
    for stop in range(start + 1, text.stop + 1):
        out, cache = continued(model, text.part(text.start, stop), stop - 1, cache, only_new=only_new, **options)
        found.append(out)
    return torch.cat(found, dim=1)


def in_chunks(model: Model, text: Text, size: int) -> Tensor:
    """Outputs of all positions, `size` of them in each call, by the public `prefill` where that takes the model."""
    if model.takes_prefill:
        torch.manual_seed(SEED)
        per_row: dict[str, Any] = {name: each[text.rows] for name, each in text.per_row.items()}
        return prefill(model.module, text.main, size, **per_row)[0]
    out, cache = model(text.part(0, size))
    found = [out]
    for start in range(size, text.stop, size):
        out, cache = continued(model, text.part(0, min(start + size, text.stop)), start, cache)
        found.append(out)
    return torch.cat(found, dim=1)


def continued(
    model: Model, text: Text, start: int, cache: Any, *, only_new: bool = CACHED_TOKENS_LEFT_OUT, **options: Any
) -> tuple[Tensor, Any]:
    """Outputs from position `start` on, given a cache of all before; only these are passed, or all."""
    options |= {"cache": cache, "cache_age": text.stop - start}
    if only_new:
        options["input_not_include_cache"] = True
    elif not model.is_wrapper and accepts("seq_pos_offset"):
        # upstream's layers count the cache again unless they are told
        options["seq_pos_offset"] = 0
    return model(text.part(start if only_new else text.start, text.stop), **options)


def in_segments(model: Model, text: Text, sizes: Sequence[int]) -> Tensor:
    """Outputs of consecutive segments, each given the hidden states of those before."""
    found, start, mems = [], 0, None
    for size in sizes:
        out, mems = segment(model, text.part(start, start + size), mems)
        found.append(out)
        start += size
    return torch.cat(found, dim=1)


def segment(model: Model, text: Text, mems: Any) -> tuple[Tensor, Any]:
    """Outputs of a segment, and the hidden states for the next."""
    if model.reads_tokens:
        out, intermediates = model(text, mems=mems, return_mems=True)
        return out, intermediates.mems
    out, intermediates = model(text, mems=mems)
    hiddens = intermediates.hiddens
    mems = hiddens if mems is None else [torch.cat(pair, dim=-2) for pair in zip(mems, hiddens)]
    return out, mems if model.max_mem_len is None else [each[:, -model.max_mem_len :] for each in mems]


# of which lengths


@dataclass(frozen=True)
class Plan:
    """Lengths of a text, sizes of chunks and of segments, steps of decoding, and distances that positions move by."""

    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    steps: int = STEPS
    shifts: tuple[int, ...] = (1, 4_097, 1_000_000)


def plan(model: Model, length: int) -> Plan:
    """Lengths from 1 to `length`, each about 5/8 of the next, so that odd and even ones both occur."""
    lengths = [length]
    while lengths[0] > 1:
        lengths.insert(0, lengths[0] * 5 // 8)
    # an even split, and an odd size that leaves a shorter last part
    chunks, segments, kept = (length // 4, length // 7 | 1), [], model.max_mem_len
    for size in chunks:
        # none may have more before it than are kept
        n = length if kept is None else min(length, (kept // size + 1) * size)
        segments.append((size,) * (n // size) + (n % size,) * (n % size > 0))
    if kept is not None:
        segments.append((min(kept, length // 2),) * 2)
    return Plan(tuple(n for n in lengths if n >= model.min_keys), chunks, tuple(segments), min(STEPS, length // 2))


class Case:
    """A model, some texts, of which all but one property read the first, and the tolerance of each way to run it."""

    def __init__(self, model: Model, texts: Text, plan_: Plan | None = None) -> None:
        self.model, self.texts, self.max_len = model, texts, texts.length
        self.text = texts.row(0)
        self.plan = plan_ or plan(model, self.max_len)
        self._tolerances: dict[str, float] = {}

    @cached_property
    def full(self) -> Tensor:
        """The outputs of the whole text in one call."""
        return in_one_call(self.model, self.text)

    @cached_property
    def plain(self) -> Case:
        """The same with plain rotary."""
        return Case(self.model.with_plain_rotary(self.model.dtype), self.texts)

    @cached_property
    def holds_in_chunks(self) -> bool:
        """Whether the model gives the same in chunks with plain rotary."""
        if self.model.no_cache:
            return False
        try:
            in_parts = in_chunks(self.plain.model, self.text, max(1, self.max_len // 3))
            return deviation(in_parts, self.plain.full) <= self.tolerance("chunks")
        except Exception:  # whatever upstream refuses it with
            return False

    def positions_matter(self) -> bool:
        """Whether the output is another without positions. If it is not, little can be said about them."""
        model = self.model.duplicate()
        model.layers.rotary_pos_emb = None
        try:
            return deviation(self.full, in_one_call(model, self.text)) > self.tolerance("calls")
        except Exception:  # with some options there is no doing without
            return True

    @property
    def factor(self) -> float:
        """The tolerance in units of the forced error: 4, and more in float64, where angles are no more exact."""
        exact_angles = self.model.dtype is not torch.float64 or not self.model.is_flash
        return 2 * (1 + (1 if exact_angles else angle_error(self.max_len)))

    def tolerance(self, way: str) -> float:
        """How far runs of this way may be apart: "calls", "rows", "decoding", "chunks" or "segments"."""
        if way not in self._tolerances:
            start = self.max_len - self.plan.steps
            every: dict[str, list[Run]] = {
                "calls": [in_one_call],
                "rows": [in_one_call],
                "decoding": [partial(token_by_token, start=start, only_new=CACHED_TOKENS_LEFT_OUT)],
                "chunks": [partial(in_chunks, size=size) for size in self.plan.chunks],
                "segments": [partial(in_segments, sizes=sizes) for sizes in self.plan.segments],
            }
            forced = self._forced(self.texts if way == "rows" else self.text, every[way])
            self._tolerances[way] = forced if way == "calls" else max(forced, self.tolerance("calls"))
        return self._tolerances[way]

    def _forced(self, text: Text, every: list[Run]) -> float:
        """How far the model with plain rotary is from itself in float64, run in these ways, times the factor."""
        dtype = self.model.dtype
        measured = torch.float32 if dtype is torch.float64 else dtype
        model = self.model.with_plain_rotary(measured)
        exact, ratio = model.as_float64(), unit_roundoff(dtype) / unit_roundoff(measured) if model.is_flash else 1.0
        text = text.to(model.device, measured)
        exact_text = text.to(exact.device, torch.float64)
        error = max(ratio * deviation(run(model, text), run(exact, exact_text)) for run in every)
        if not math.isfinite(error):
            # as a tolerance it would let everything pass
            raise ArithmeticError("the model with plain rotary in place of xPos is not finite")
        return self.factor * error


# roundings


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def angle_error(length: int) -> float:
    """Bound on the error of a float64 angle, in unit roundoffs, of a position up to `length`.

    The frequency (at most 1) is off by 2, the product by 1, the wrapping into 0 to 2 pi by 1, all times the position.
    """
    return 4 * length


def score_tolerance(dtype: torch.dtype, length: int, dim_head: int) -> float:
    """How far a score may be off, relative to the largest sum of its terms' sizes among the keys of its query.

    With u the unit roundoff of the dtype, and w that of the arithmetic (float32, or float64 for a float64 model):

    - q and k are rounded to the dtype after the rotation, the product is rounded and so is its scaling: 4 u
    - each rotated element is a cosine and a sine (1 w) of an angle from 0 to 2 pi (4 w), a scale (1 w, for k and its
      reciprocal 2 w), two products and a sum (3 w): 9 w for q, 10 w for k; a rotation mixes the two elements of a pair,
      so sqrt(2) times that
    - the dot product adds dim_head terms: sqrt(dim_head) w, as roundings of either sign add up

    Only in float64 can the angles be had with no more digits than w: of q, of k and of the formula they are off by
    `angle_error` of `length`, the number of keys, instead of 4 w.
    """
    arithmetic = unit_roundoff(torch.promote_types(dtype, torch.float32))
    rotation = 19 if dtype is not torch.float64 else 11 + 3 * angle_error(length)
    return 4 * unit_roundoff(dtype) + (math.sqrt(2) * rotation + math.sqrt(dim_head)) * arithmetic
