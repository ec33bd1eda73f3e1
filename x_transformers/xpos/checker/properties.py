"""What must hold for xPos at every length, each measured on a real model: the user's or one of the check's own.

A property is a generator that yields a `Point` per length: how far two computations that must agree are apart. Those
for which attention has to be observed, or the model built in another way, are measured on the check's own models alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from x_transformers import Attention, Decoder

from ..release import accepts
from . import runs, samples
from .models import Text
from .runs import Case, deviation

CACHE_LENGTHS = (1_000, 10_000, 100_000)

_CAST_LEN = 512
_SCORE_ROWS = 16


@dataclass(frozen=True)
class Point:
    """How far two computations over `length` positions are apart; infinite where one of them is not finite."""

    length: int
    deviation: float
    note: str = ""


# of any model


def prefixes(case: Case) -> Iterator[Point]:
    for length in case.plan.lengths[:-1]:
        yield Point(length, deviation(case.model(case.text.part(0, length))[0], case.full[:, :length]))


def rows(case: Case) -> Iterator[Point]:
    for length in middle_and_last(case):
        together = case.model(case.texts.part(0, length))[0]
        for row, expected in enumerate(together.split(1)):
            alone = case.model(case.texts.part(0, length).row(row))[0]
            yield Point(length, deviation(alone, expected), f"row {row + 1} of {len(together)}")


def middle_and_last(case: Case) -> list[int]:
    return sorted({case.plan.lengths[len(case.plan.lengths) // 2], case.max_len})


def decoding(case: Case, *, only_new: bool) -> Iterator[Point]:
    for length in case.plan.lengths[1:]:
        start = max(case.plan.lengths[0], length - case.plan.steps)
        out = runs.token_by_token(case.model, case.text.part(0, length), start, only_new=only_new)
        yield Point(length, deviation(out, case.full[:, start - 1 : length]))


def chunks(case: Case) -> Iterator[Point]:
    for size in case.plan.chunks:
        yield from _by_length(case, runs.in_chunks(case.model, case.text, size), size)


def segments(case: Case) -> Iterator[Point]:
    for sizes in case.plan.segments:
        yield from _by_length(case, runs.in_segments(case.model, case.text, sizes), sizes[0])


def _by_length(case: Case, out: Tensor, size: int) -> Iterator[Point]:
    start, end = 0, out.shape[1]
    for length in sorted({end, *(length for length in case.plan.lengths if length < end)}):
        yield Point(length, deviation(out[:, start:length], case.full[:, start:length]), f"parts of {size:,}")
        start = length


def shifts(case: Case) -> Iterator[Point]:
    model, apart = case.model, case.plan.shifts

    def positions(length: int) -> Tensor:
        return torch.arange(model.positions(length), device=model.device)

    for length in middle_and_last(case):
        text, pos = case.text.part(0, length), positions(length)
        expected = model(text)[0]
        for shift in (0, *apart):
            note = f"by {shift:,}" if shift else "pos=arange(n) given"
            yield Point(length, deviation(model(text, pos=pos + shift)[0], expected), note)

        # the layers of themselves take positions of the new alone
        if model.is_wrapper and case.holds_in_chunks:
            cache = model(text.part(0, length - 1))[1]
            decode_last = partial(runs.continued, model, text, length - 1, cache, only_new=False)
            last = decode_last()[0]
            for shift in apart:
                yield Point(length, deviation(decode_last(pos=pos + shift)[0], last), f"a cached token by {shift:,}")

    expected = model(case.texts)[0]
    by_row = torch.tensor((0, *apart)[: -len(expected) - 1 : -1], device=model.device)[:, None]
    found = model(case.texts, pos=positions(case.max_len) + by_row)[0]
    yield Point(case.max_len, deviation(found, expected), "each row by its own")


def padded(case: Case) -> Iterator[Point]:
    pad, text = case.plan.steps, case.text
    data = torch.cat((text.data[:, :pad], text.data), dim=1)[:, : case.max_len]
    behind, expected = replace(text, data=data), case.full[:, : case.max_len - pad]
    starts = {"seq_start_pos": torch.full((len(text.main),), pad, device=case.model.device)}
    yield Point(case.max_len, deviation(case.model(behind, **starts)[0][:, pad:], expected))
    if case.holds_in_chunks:
        start = case.max_len - pad // 2
        out = runs.token_by_token(case.model, behind, start, only_new=False, **starts)
        yield Point(case.max_len, deviation(out, expected[:, start - pad - 1 :]), "token by token")


def limit(case: Case) -> Iterator[Point]:
    """On a copy with a scale base for which the limit is below the length of the text: it may be tens of thousands.

    Plain rotary has no limit, so there it is whether the model can be called at all.
    """
    if case.model.is_plain:
        yield Point(case.max_len, deviation(case.full, case.full))
        return
    model = case.model.duplicate()
    rotary: Any = model.layers.rotary_pos_emb
    # limits are odd numbers, so it may come out one higher
    rotary.scale_base *= (model.positions(case.max_len) - 2) / model.limit
    text = case.text.part(0, model.longest(model.comfortable))
    expected = out = model(text)[0]
    if case.holds_in_chunks:
        expected = runs.in_chunks(model, text, max(1, text.length // 3))
    yield Point(text.length, deviation(out, expected), f"scale base {rotary.scale_base:.3g}")

    more = model.longest(model.limit) + 1
    yield _refusal(more, "one query too many", ValueError, lambda: model(case.text.part(0, more)))


def _refusal(length: int, name: str, error: type[Exception], attempt: Callable[[], object]) -> Point:
    try:
        attempt()
    except error:
        return Point(length, 0.0, f"{name} refused")
    return Point(length, math.inf, f"{name} not refused")


# of the check's own models


def scores(case: Case) -> Iterator[Point]:
    model = case.model
    for length in [length for length in case.plan.lengths if length > 1][::-3]:
        at = torch.linspace(0, length - 1, min(length, _SCORE_ROWS)).long().to(model.device)
        call = partial(lambda text: model(text)[1], case.text.part(0, length))
        for number, error in enumerate(samples.score_errors(model, at, call, at, torch.arange(length)), 1):
            yield Point(length, error, f"layer {number}")


def long_cache(case: Case) -> Iterator[Point]:
    model = case.model
    for length in CACHE_LENGTHS:
        text = Text(torch.zeros(1, length + 1, dtype=torch.long, device=model.device))
        cache, first = samples.random_cache(length, model), torch.zeros(1, dtype=torch.long, device=model.device)
        call = partial(lambda *args: runs.continued(model, *args)[1], text, length, cache)
        (error,) = samples.score_errors(model, first, call, torch.tensor([length]), torch.arange(length + 1))
        yield Point(length, error)


def refusals(case: Case) -> Iterator[Point]:
    decoder = {"dim": samples.DIM, "depth": 1, "heads": samples.HEADS, "rotary_xpos": True, "verbose": False}
    known = inspect.signature(Attention.__init__).parameters
    for option in ("l2_distance", "use_cope", "rotary_embed_values"):
        if option in known:
            attempt: Callable[[], object] = partial(Decoder, **decoder, **{f"attn_{option}": True})
            yield _refusal(case.max_len, option, AssertionError, attempt)
    if accepts("causal"):
        attempt = partial(case.model, case.text, causal=False)
        yield _refusal(case.max_len, "causal = False", AssertionError, attempt)


# all of them


@dataclass(frozen=True)
class Property:
    """`compared` says what must be the same, for the report.

    `tolerance` is a way to run a model, as `Case.tolerance` has it, or gives the tolerance of a case. `lacked` is the
    attribute of `Model` that says why it cannot have the property, `needs` an argument of `AttentionLayers.forward`.
    `variant` has options of the sample model that it is measured on, None for a property of any model.
    """

    key: str
    compared: str
    measure: Callable[[Any], Iterator[Point]]
    tolerance: str | Callable[[Case], float]
    lacked: str = ""
    needs: str = ""
    variant: dict[str, Any] | None = None


def _of_shift(case: Case) -> float:
    # in float64 alone an angle has no more digits than the model, and loses them with the size of the position
    return case.tolerance("calls") * (max(case.plan.shifts) / case.max_len if case.model.dtype is torch.float64 else 1)


def _of_any_call(case: Case) -> float:
    return case.tolerance("chunks" if case.holds_in_chunks else "calls")


def _of_scores(case: Case, length: int | None = None) -> float:
    return runs.score_tolerance(case.model.dtype, length or case.max_len, samples.DIM_HEAD)


_whole, _new, _only_new = partial(decoding, only_new=False), partial(decoding, only_new=True), "input_not_include_cache"
_of_long = partial(_of_scores, length=max(CACHE_LENGTHS))
# without flash, as scaled_dot_product_attention does not give out the scores
_SCORES: dict[str, Any] = {"flash": False}
_ONE_LAYER: dict[str, Any] = {"flash": False, "depth": 1}
_BF16, _F16 = ({"flash": False, "dtype": dtype, "length": _CAST_LEN} for dtype in (torch.bfloat16, torch.float16))
_MEMORY: dict[str, Any] = {"attn_num_mem_kv": 4}
_NORMED: dict[str, Any] = {"attn_num_mem_kv": 4, "attn_qk_norm": True}

ALL = (
    Property("prefix", "the first tokens, with and without the rest of the text", prefixes, "calls"),
    Property("rows", "a text, alone and in a batch", rows, "rows"),
    Property("cached-whole", "one call, and decoding with the whole text passed", _whole, "decoding", "no_cache"),
    Property("cached-new", "one call, and decoding with the new token passed", _new, "decoding", "no_cache", _only_new),
    Property("chunked", "one call, and chunks through the KV cache", chunks, "chunks", "no_cache"),
    Property("mems", "one call, and segments with mems", segments, "segments", "no_mems"),
    Property("shift", "positions from 0 on, and shifted by up to a million", shifts, _of_shift, "no_shift", "pos"),
    Property("padded", "a text, alone and behind padding", padded, _of_any_call, needs="seq_start_pos"),
    Property("range", "one call up to its limit, and chunks; past it an error", limit, _of_any_call),
    Property("scores", "scores of a text, and the formula", scores, _of_scores, variant=_SCORES),
    Property("scores-cache", "scores on a long KV cache, and the formula", long_cache, _of_long, variant=_ONE_LAYER),
    Property("scores-bf16", "scores in bfloat16, and the formula", scores, _of_scores, variant=_BF16),
    Property("scores-f16", "scores in float16, and the formula", scores, _of_scores, variant=_F16),
    Property("mem-kv", "the first tokens, with memory key / values", prefixes, "calls", variant=_MEMORY),
    Property("mem-kv-norm", "the first tokens, with these and attn_qk_norm", prefixes, "calls", variant=_NORMED),
    Property(
        "refusals", "options that cannot be right raise an error", refusals, lambda _: 0.0, "no_asserts", variant={}
    ),
)
