"""What must hold for xPos at every length, each measured on a real model: one of ours or the user's.

A property is a generator that yields a `Point` per length: how far two computations that must agree are apart.
`judge` has the verdict on the largest deviation of each. Those for which attention has to be observed, or the model
built in another way, are measured on our models alone. `ALL` has every one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from x_transformers import Attention, AutoregressiveWrapper, Decoder

from . import ours
from .limits import limit, longest_window
from .net import Inputs, Net, accepts
from .ours import Ours
from .subject import (
    ROWS,
    Subject,
    decode,
    deviation,
    extend,
    part_sizes,
    prefill,
    score_tolerance,
    segment_sizes,
    segments,
)

SHIFTS = (1, 4_097, 1_000_000)
CACHE_LENGTHS = (1_000, 10_000, 100_000)

_GREEDY_STEPS = 32
_CAST_LEN = _GREEDY_LONGEST_PROMPT = 512
_CONTEXT_PADDING = 80
_SCORE_ROWS = 16


@dataclass(frozen=True)
class Point:
    """How far two computations over `length` positions are apart; infinite where one of them is not finite."""

    length: int
    deviation: float
    note: str = ""


# of any model


def prefix_consistency(subject: Subject) -> Iterator[Point]:
    """The output at a position is the same however much text follows."""
    for length in subject.lengths[:-1]:
        yield Point(length, deviation(subject.net(subject.inputs.part(0, length))[0], subject.full[:, :length]))


def independent_rows(subject: Subject) -> Iterator[Point]:
    """A text gives in a batch what it gives alone."""
    for length in (subject.lengths[len(subject.lengths) // 2], subject.max_len):
        together = subject.net(subject.texts.part(0, length))[0]
        for row in range(ROWS):
            alone = subject.net(subject.texts.part(0, length, slice(row, row + 1)))[0]
            yield Point(length, deviation(alone, together[row : row + 1]), f"row {row + 1} of {ROWS}")


def cached_decode(subject: Subject, *, only_new: bool) -> Iterator[Point]:
    """One position at a time through the KV cache, only what is new passed or all of it, equals one call for all."""
    for length in subject.lengths[1:]:
        start = max(subject.lengths[0], length - subject.steps)
        out = decode(subject.net, subject.inputs.part(0, length), start, only_new=only_new)
        yield Point(length, deviation(out, subject.full[:, start - 1 : length]))


def chunked_prefill(subject: Subject) -> Iterator[Point]:
    """Chunks through the KV cache equal one call for all, whatever the size of the chunks."""
    for size in part_sizes(subject.max_len):
        yield from _by_length(subject, prefill(subject.net, subject.inputs, size), size)


def segments_with_mems(subject: Subject) -> Iterator[Point]:
    """Segments that carry the hidden states of all before them equal one call for all."""
    for sizes in segment_sizes(subject.max_len, subject.net.max_mem_len):
        yield from _by_length(subject, segments(subject.net, subject.inputs, sizes), sizes[0])


def _by_length(subject: Subject, out: Tensor, size: int) -> Iterator[Point]:
    start, end = 0, out.shape[1]
    for length in sorted({end, *(length for length in subject.lengths if length < end)}):
        yield Point(length, deviation(out[:, start:length], subject.full[:, start:length]), f"parts of {size:,}")
        start = length


def shift_invariance(subject: Subject) -> Iterator[Point]:
    """A constant added to all positions changes rounding alone: a whole call, one cached token, a shift per row."""
    net = subject.net

    def positions(length: int) -> Tensor:
        return torch.arange(net.positions(length), device=net.device)

    for length in (subject.lengths[len(subject.lengths) // 2], subject.max_len):
        inputs, pos = subject.inputs.part(0, length), positions(length)
        expected = net(inputs)[0]
        for shift in (0, *SHIFTS):
            note = f"by {shift:,}" if shift else "pos=arange(n) given"
            yield Point(length, deviation(net(inputs, pos=pos + shift)[0], expected), note)

        # the layers of themselves take positions of the new alone
        if net.is_wrapper and subject.holds_in_chunks:
            cache = net(inputs.part(0, length - 1))[1]
            decode_last = partial(extend, net, inputs, length - 1, length, cache, only_new=False)
            last = decode_last()[0]
            for shift in SHIFTS:
                out = decode_last(pos=pos + shift)[0]
                yield Point(length, deviation(out, last), f"a cached token by {shift:,}")

    shifts = torch.tensor((0, *SHIFTS[-(ROWS - 1) :]), device=net.device)[:, None]
    found, expected = net(subject.texts, pos=positions(subject.max_len) + shifts)[0], net(subject.texts)[0]
    yield Point(subject.max_len, deviation(found, expected), "each row by its own")


def up_to_the_limit(subject: Subject) -> Iterator[Point]:
    """As many queries in one call as the dtype has room for are finite, and more than the limit raise.

    On a copy with a scale base for which the limit is below the length of the text: at the model's own it may be tens
    of thousands. Where parts through the KV cache can equal one call, they must there as well. Plain rotary has no
    limit, so there it is whether the model can be called at all.
    """
    if subject.net.is_plain:
        yield Point(subject.max_len, deviation(subject.full, subject.full))
        return
    net = subject.net.duplicate()
    rotary: Any = net.layers.rotary_pos_emb
    # limits are odd numbers, so it may come out one higher
    rotary.scale_base *= (net.positions(subject.max_len) - 2) / limit(rotary.scale_base, net.dtype, masked=False)
    inputs = subject.inputs.part(0, net.longest(longest_window(net.dtype, rotary.scale_base)))
    expected = out = net(inputs)[0]
    if subject.holds_in_chunks:
        expected = prefill(net, inputs, max(1, inputs.length // 3))
    yield Point(inputs.length, deviation(out, expected), f"scale base {rotary.scale_base:.3g}")

    more = net.longest(limit(rotary.scale_base, net.dtype, masked=False)) + 1
    yield _refusal(more, "one query too many", ValueError, lambda: net(subject.inputs.part(0, more)))


def _refusal(length: int, name: str, error: type[Exception], attempt: Callable[[], object]) -> Point:
    try:
        attempt()
    except error:
        return Point(length, 0.0, f"{name} refused")
    return Point(length, math.inf, f"{name} not refused")


# of our models


def greedy_generation(subject: Subject) -> Iterator[Point]:
    """The text generated greedily is the same with and without the KV cache.

    The deviation is 0 where it is. Where it is not, it is how far apart the logits of the two candidates for the first
    token that differs are: within the tolerance they are a tie, which rounding may decide either way.
    """
    # it leaves the model in the mode that it is in itself
    generator = AutoregressiveWrapper(subject.net.module).eval()
    for length in _every_third(subject.lengths, min(subject.max_len, _GREEDY_LONGEST_PROMPT)):
        prompt = subject.inputs.main[:, :length]
        generate = partial(generator.generate, prompt, _GREEDY_STEPS, temperature=0.0)
        cached, uncached = generate(cache_kv=True)[0], generate(cache_kv=False)[0]
        differs = (cached != uncached).nonzero()
        if len(differs) == 0:
            yield Point(length, 0.0, "the same text")
            continue
        first = int(differs[0])
        logits = subject.net.module(torch.cat((prompt, cached[None, :first]), dim=1))[0, -1]
        yield Point(length, deviation(logits[cached[first]], logits[uncached[first]]), f"differ at token {first + 1}")


def _every_third(lengths: tuple[int, ...], longest: int) -> list[int]:
    return [length for length in lengths if 1 < length <= longest][::-3][::-1]


def scores_of_all_queries(subject: Ours) -> Iterator[Point]:
    """The scores of a call for the whole text, in each layer and head, are those of the paper's formula."""
    net = subject.net
    for length in _every_third(subject.lengths, subject.max_len):
        rows = _some_rows(length, net)
        with ours.observe(net, rows) as layers:
            _, cache = net(subject.inputs.part(0, length))
        for number, (layer, inter) in enumerate(zip(layers, cache.attn_intermediates), 1):
            error = layer.score_error(inter.cached_kv[0][0], rows, torch.arange(length))
            yield Point(length, error, f"layer {number}")


def _some_rows(length: int, net: Net) -> Tensor:
    return torch.linspace(0, length - 1, min(length, _SCORE_ROWS)).long().to(net.device)


def scores_on_long_cache(subject: Ours) -> Iterator[Point]:
    """The scores of one query on a long cache of random keys are those of the paper's formula."""
    net = subject.net
    for length in CACHE_LENGTHS:
        tokens = torch.zeros(1, length + 1, dtype=torch.long, device=net.device)
        with ours.observe(net, _some_rows(1, net)) as layers:
            _, cache = extend(net, Inputs(tokens), length, length + 1, ours.random_cache(length, net))
        keys = cache.attn_intermediates[0].cached_kv[0][0]
        yield Point(length, layers[0].score_error(keys, torch.tensor([length]), torch.arange(length + 1)))


def scores_across_shards(subject: Ours) -> Iterator[Point]:
    """Queries of one shard of a sequence score with the keys of another, rotated there, as the formula says."""
    net = subject.net
    for length in _every_third(subject.lengths, subject.max_len - 1):
        pos, cut = torch.arange(length, device=net.device), length // 2
        rows, window = _some_rows(length - cut, net), {"rotary_window": (0, length)}
        with ours.observe(net, rows[:1]) as first:
            _, cache = net(subject.inputs.part(0, cut), pos=pos[:cut], **window)
        with ours.observe(net, rows) as second:
            net(subject.inputs.part(cut, length), pos=pos[cut:], **window)
        found, keys = second[0], cache.attn_intermediates[0].cached_kv[0][0]
        found.scores = found.rotated_queries @ first[0].rotated_keys.mT * ours.DIM_HEAD**-0.5
        yield Point(length, found.score_error(keys, pos[cut:][rows], pos[:cut]), f"cut at {cut:,}")


def context_positions(subject: Ours) -> Iterator[Point]:
    """The output at a position is the same however much text follows, and however the context is padded."""
    yield from prefix_consistency(subject)
    given = ours.context(_CONTEXT_PADDING)
    padded = Inputs(subject.main, **given).part(None, None, slice(0, 1)).to(subject.net.device, subject.net.dtype)
    yield Point(subject.max_len, deviation(subject.net(padded)[0], subject.full), "context padded")


def table_passed_in(subject: Subject) -> Iterator[Point]:
    """A token decoded with a table of rotary embeddings for all that is in the cache equals one call for all."""
    for length in subject.lengths[1:]:
        inputs = subject.inputs.part(0, length)
        table = subject.net.layers.rotary_pos_emb(torch.arange(length, device=subject.net.device))
        _, cache = subject.net(inputs.part(0, length - 1))
        out, _ = extend(subject.net, inputs, length - 1, length, cache, only_new=False, rotary_pos_emb=table)
        yield Point(length, deviation(out, subject.full[:, length - 1 : length]))


def refusals(subject: Subject) -> Iterator[Point]:
    """What no center cancels in is refused, as far as a release has it.

    These are l2 distance, CoPE and rotated values when a model is built, and `causal = False` on forward.
    """
    decoder = {"dim": ours.DIM, "depth": 1, "heads": ours.HEADS, "rotary_xpos": True, "verbose": False}
    known = inspect.signature(Attention.__init__).parameters
    for option in ("l2_distance", "use_cope", "rotary_embed_values"):
        if option in known:
            attempt: Callable[[], object] = partial(Decoder, **decoder, **{f"attn_{option}": True})
            yield _refusal(subject.max_len, option, AssertionError, attempt)
    if accepts("causal"):
        attempt = partial(subject.net, subject.inputs, causal=False)
        yield _refusal(subject.max_len, "causal = False", AssertionError, attempt)


# all of them


def _no_mems(net: Net) -> str:
    return "its max_mem_len is 0, so that it keeps no hidden states" if net.max_mem_len == 0 else net.shifts_tokens


def _no_positions(net: Net) -> str:
    if net.has_absolute_positions:
        return "it has absolute positions as well, which a shift changes"
    if net.is_wrapper and not net.reads_tokens:
        return f"{type(net.module).__name__} does not pass pos to its layers"
    return ""


def _of_shift(subject: Subject) -> float:
    # in float64 alone an angle has no more digits than the model, and loses them with the size of the position
    return subject.of_calls * (max(SHIFTS) / subject.max_len if subject.net.dtype is torch.float64 else 1)


def _of_range(subject: Subject) -> float:
    return subject.of_chunks if subject.holds_in_chunks else subject.of_calls


def _of_scores(subject: Subject, length: int | None = None) -> float:
    return score_tolerance(subject.net.dtype, length or subject.max_len, ours.DIM_HEAD)


@dataclass(frozen=True)
class Property:
    """`needs` is an argument of `AttentionLayers.forward` without which a release has nothing to measure.

    `lacked` gives the reason why a model cannot have it, empty if it can. `variant` gives the options of the model of
    ours that it is measured on, empty for the one given; it is None for a property of any model.
    """

    key: str
    name: str
    measure: Callable[[Any], Iterator[Point]]
    tolerance: Callable[[Any], float]
    needs: str | None = None
    lacked: Callable[[Net], str] = lambda _net: ""
    variant: Callable[[], dict[str, Any]] | None = None


def _on(key: str, name: str, measure: Any, tolerance: Any, needs: str | None = None, **options: Any) -> Property:
    """A property of our model with these options; those that are functions are called for theirs."""

    def variant() -> dict[str, Any]:
        return {option: value() if callable(value) else value for option, value in options.items()}

    return Property(key, name, measure, tolerance, needs, variant=variant)


_of_calls, _of_decoding, _no_cache = attrgetter("of_calls"), attrgetter("of_decoding"), attrgetter("no_cache")
_decode_whole, _decode_new = (partial(cached_decode, only_new=only_new) for only_new in (False, True))
_of_long_cache = partial(_of_scores, length=max(CACHE_LENGTHS))
_only_new, _added_kv = "input_not_include_cache", "self_attn_additional_kv"
_with_context: dict[str, Any] = {"given": ours.context, "cross_attend": True}
# scaled_dot_product_attention does not give out the scores
_scores = partial(_on, measure=scores_of_all_queries, tolerance=_of_scores, flash=False)

ALL = (
    Property("prefix", "prefix consistency", prefix_consistency, _of_calls),
    Property("rows", "independent rows", independent_rows, attrgetter("of_rows")),
    Property("cached-whole", "cached decode, whole text", _decode_whole, _of_decoding, lacked=_no_cache),
    Property("cached-new", "cached decode, new token", _decode_new, _of_decoding, _only_new, _no_cache),
    Property("chunked", "chunked prefill", chunked_prefill, attrgetter("of_chunks"), lacked=_no_cache),
    Property("mems", "segments with mems", segments_with_mems, attrgetter("of_segments"), lacked=_no_mems),
    Property("shift", "shift of positions", shift_invariance, _of_shift, "pos", _no_positions),
    Property("range", "up to the limit", up_to_the_limit, _of_range),
    _on("greedy", "greedy text, cache on, off", greedy_generation, _of_decoding),
    _scores("scores", "scores, all queries"),
    _on("scores-cache", "scores, long cache", scores_on_long_cache, _of_long_cache, flash=False, depth=1),
    _scores("scores-bf16", "scores, cast to bfloat16", dtype=torch.bfloat16, length=_CAST_LEN),
    _scores("scores-f16", "scores, cast to float16", dtype=torch.float16, length=_CAST_LEN),
    _on("scores-shards", "scores, across shards", scores_across_shards, _of_scores, "pos", flash=False, depth=1),
    _on("mem-kv", "memory keys", prefix_consistency, _of_calls, attn_num_mem_kv=4),
    _on("mem-kv-norm", "memory keys, qk norm", prefix_consistency, _of_calls, attn_num_mem_kv=4, attn_qk_norm=True),
    _on("added-kv", "additional keys", prefix_consistency, _of_calls, _added_kv, given=ours.additional_kv),
    _on("context-pos", "context positions", context_positions, _of_calls, "context_pos", **_with_context),
    _on("table", "table passed in", table_passed_in, _of_decoding),
    _on("refusals", "refusals", refusals, lambda _: 0.0),
)
OF_ANY = tuple(prop for prop in ALL if prop.variant is None)
