"""What must hold for xPos at every length, each measured on a real model over real text.

A property is a generator that yields a `Point` per length: how far two computations that must agree are apart.
`check` runs all of them and judges the largest deviation of each. Those about further options of a decoder are in
`features`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from x_transformers import AutoregressiveWrapper
from x_transformers.x_transformers import LayerIntermediates

from . import features, models
from .subject import (
    GREEDY_STEPS,
    STEPS,
    Point,
    Subject,
    decode,
    deviation,
    extend,
    part_sizes,
    prefill,
    score_error,
    score_tolerance,
)

SHIFTS = (1, 4_097, 1_000_000)
CACHE_LENGTHS = (1_000, 10_000, 100_000)

_GREEDY_LONGEST_PROMPT = 512
_SCORE_LONGEST = 4_096
_SCORE_ROWS = 16


@dataclass(frozen=True)
class Result:
    """The verdict on one property; `deviation` is the largest of `points`, None where measuring raised `error`."""

    key: str
    name: str
    deviation: float | None
    tolerance: float | None
    detail: str
    points: tuple[Point, ...] = ()
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.deviation is not None and self.tolerance is not None and self.deviation <= self.tolerance

    @property
    def verdict(self) -> str:
        return "pass" if self.passed else "FAIL"


# the properties


def prefix_consistency(subject: Subject) -> Iterator[Point]:
    """The output at a position is the same however much text follows."""
    for length in subject.lengths[:-1]:
        logits = subject.net(subject.tokens[:, :length])
        yield Point(length, deviation(logits, subject.full[:, :length]))


def cached_decode_whole(subject: Subject) -> Iterator[Point]:
    """One token at a time through the KV cache, the whole sequence passed each time, equals one call for all."""
    return _cached_decode(subject, input_not_include_cache=False)


def cached_decode_new(subject: Subject) -> Iterator[Point]:
    """One token at a time through the KV cache, only the new token passed, equals one call for all."""
    return _cached_decode(subject, input_not_include_cache=True)


def _cached_decode(subject: Subject, *, input_not_include_cache: bool) -> Iterator[Point]:
    for length in subject.lengths:
        # the last tokens of the prefix; of a shorter one all but the first
        start = max(1, length - STEPS)
        tokens = subject.tokens[:, :length]
        logits = decode(subject.net, tokens, start, input_not_include_cache=input_not_include_cache)
        yield Point(length, deviation(logits, subject.full[:, start - 1 : length]))


def chunked_prefill(subject: Subject) -> Iterator[Point]:
    """Chunks through the KV cache equal one call for all, whatever the size of the chunks."""
    for size in part_sizes(subject.max_len):
        yield from _by_length(subject, prefill(subject.net, subject.tokens, size), f"parts of {size:,}")


def segments_with_mems(subject: Subject) -> Iterator[Point]:
    """Segments that carry the hidden states of all before them equal one call for all."""
    for size in part_sizes(subject.max_len):
        found, mems = [], None
        for segment in subject.tokens.split(size, dim=1):
            logits, mems = subject.net(segment, mems=mems, return_mems=True)
            found.append(logits)
        yield from _by_length(subject, torch.cat(found, dim=1), f"parts of {size:,}")


def _by_length(subject: Subject, logits: Tensor, note: str) -> Iterator[Point]:
    start = 0
    for length in subject.lengths:
        yield Point(length, deviation(logits[:, start:length], subject.full[:, start:length]), note)
        start = length


def shift_invariance(subject: Subject) -> Iterator[Point]:
    """A constant added to all positions changes rounding alone: a whole call, one cached token, a shift per row."""
    for length in (subject.lengths[len(subject.lengths) // 2], subject.max_len):
        tokens = subject.tokens[:, :length]
        positions = torch.arange(length, device=subject.device)
        _, cache = subject.net(tokens[:, :-1], return_intermediates=True)
        decode = partial(subject.net, tokens, cache=cache, return_intermediates=True)
        logits, (new_logits, _) = subject.net(tokens), decode()

        yield Point(length, deviation(subject.net(tokens, pos=positions), logits), "pos=arange(n) given")
        for shift in SHIFTS:
            shifted = positions + shift
            yield Point(length, deviation(subject.net(tokens, pos=shifted), logits), f"by {shift:,}")
            yield Point(length, deviation(decode(pos=shifted)[0], new_logits), f"a cached token by {shift:,}")

    rows = subject.tokens[:, : subject.max_len // 2 * 2].reshape(2, -1)
    positions = torch.arange(rows.shape[1], device=subject.device)
    shifted = torch.stack((positions + SHIFTS[0], positions + SHIFTS[-1]))
    yield Point(rows.shape[1], deviation(subject.net(rows, pos=shifted), subject.net(rows)), "each row by its own")


def greedy_generation(subject: Subject) -> Iterator[Point]:
    """The text generated greedily is the same with and without the KV cache.

    The deviation is 0 where it is. Where it is not, it is how far apart the logits of the two candidates for the first
    token that differs are: within the tolerance they are a tie, which rounding may decide either way.
    """
    # it leaves the model in the mode that it is in itself
    generator = AutoregressiveWrapper(subject.net).eval()
    longest = min(subject.max_len, _GREEDY_LONGEST_PROMPT)
    for length in [length for length in subject.lengths if length <= longest][::-3][::-1]:
        prompt = subject.tokens[:, :length]
        cached, uncached = (
            generator.generate(prompt, GREEDY_STEPS, temperature=0.0, cache_kv=cache_kv)[0]
            for cache_kv in (True, False)
        )
        differs = (cached != uncached).nonzero()
        if len(differs) == 0:
            yield Point(length, 0.0, "the same text")
            continue
        first = int(differs[0])
        logits = subject.net(torch.cat((prompt, cached[None, :first]), dim=1))[0, -1]
        apart = deviation(logits[cached[first]], logits[uncached[first]])
        kind = "a tie" if apart <= _of_decoding(subject) else "no tie"
        yield Point(length, apart, f"differ at token {first + 1}, {kind}")


def scores_of_all_queries(subject: Subject) -> Iterator[Point]:
    """The scores of a call for the whole text, in each layer and head, are those of the paper's formula."""
    net = models.build(subject.room, flash=False).to(subject.device, subject.dtype)
    for length in [length for length in subject.lengths if length <= _SCORE_LONGEST][::-3][::-1]:
        rows = torch.linspace(0, length - 1, min(length, _SCORE_ROWS)).long().to(subject.device)
        with models.observe(net, rows) as layers:
            _, cache = net(subject.tokens[:, :length], return_intermediates=True)
        yield from _score_points(layers, cache, rows)


def scores_on_long_cache(subject: Subject) -> Iterator[Point]:
    """The scores of one query on a long cache of random keys are those of the paper's formula."""
    net = models.build(subject.room, flash=False, depth=1).to(subject.device, subject.dtype)
    for length in CACHE_LENGTHS:
        cache = models.random_cache(length, 1, subject.device, subject.dtype)
        tokens = subject.tokens[:, :1].expand(1, length + 1)
        with models.observe(net, torch.tensor([0], device=subject.device)) as layers:
            _, cache = extend(net, tokens, 1, cache)
        yield from _score_points(layers, cache, torch.tensor([length]))


def _score_points(layers: list[models.Observed], cache: LayerIntermediates, query_pos: Tensor) -> Iterator[Point]:
    for number, (layer, inter) in enumerate(zip(layers, cache.attn_intermediates), 1):
        keys = inter.cached_kv[0][0]
        length = keys.shape[-2]
        error = score_error(layer.scores, layer.queries, keys, query_pos, torch.arange(length))
        yield Point(length, error, f"layer {number}")


# the run


@dataclass(frozen=True)
class Property:
    """`needs` is an argument of `AttentionLayers.forward` without which a release has nothing to measure."""

    key: str
    name: str
    measure: Callable[[Subject], Iterator[Point]]
    tolerance: Callable[[Subject], float]
    needs: str | None = None


def _of_calls(subject: Subject) -> float:
    return subject.logit_factor * subject.forced_errors.call


def _of_decoding(subject: Subject) -> float:
    return subject.logit_factor * subject.forced_errors.decoding


def _of_chunks(subject: Subject) -> float:
    return subject.logit_factor * subject.forced_errors.chunks


def _of_scores(subject: Subject) -> float:
    return score_tolerance(subject.dtype, subject.max_len)


def _of_scores_on_cache(subject: Subject) -> float:
    return score_tolerance(subject.dtype, max(CACHE_LENGTHS))


def _of_shift(subject: Subject) -> float:
    # in float64 alone an angle has no more digits than the model, and loses them with the size of the position
    return _of_calls(subject) * (max(SHIFTS) / subject.max_len if subject.dtype is torch.float64 else 1)


def _none(_subject: Subject) -> float:
    return 0.0


PROPERTIES = (
    Property("prefix", "prefix consistency", prefix_consistency, _of_calls),
    Property("cached-whole", "cached decode, whole text", cached_decode_whole, _of_decoding),
    Property("cached-new", "cached decode, new token", cached_decode_new, _of_decoding, "input_not_include_cache"),
    Property("chunked", "chunked prefill", chunked_prefill, _of_chunks),
    Property("mems", "segments with mems", segments_with_mems, _of_chunks),
    Property("shift", "shift of positions", shift_invariance, _of_shift, "pos"),
    Property("greedy", "greedy text, cache on, off", greedy_generation, _of_decoding),
    Property("scores", "scores, all queries", scores_of_all_queries, _of_scores),
    Property("scores-cache", "scores, long cache", scores_on_long_cache, _of_scores_on_cache),
    Property("scores-bf16", "scores, cast to bfloat16", *features.scores_cast_to(torch.bfloat16)),
    Property("scores-f16", "scores, cast to float16", *features.scores_cast_to(torch.float16)),
    Property("scores-shards", "scores, across shards", features.scores_across_shards, _of_scores, "pos"),
    *(Property(each.key, each.name, each.measure, each.tolerance, each.needs) for each in features.WITH_OTHER_KEYS),
    Property("table", "table passed in", features.table_passed_in, _of_decoding),
    Property("range", "up to the limit", features.up_to_the_limit, _of_chunks),
    Property("refusals", "refusals", features.refusals, _none),
)


@dataclass(frozen=True)
class LeftOut:
    """A property that is not measured, and why; `needs` is the argument that is lacking, if it is that."""

    key: str
    name: str
    reason: str
    needs: str | None = None


def left_out() -> tuple[LeftOut, ...]:
    """The properties that this release of upstream has no arguments for."""
    return tuple(
        LeftOut(prop.key, prop.name, "this release of x-transformers lacks the argument", prop.needs)
        for prop in PROPERTIES
        if prop.needs is not None and not models.accepts(prop.needs)
    )


@torch.no_grad()
def check(subject: Subject, progress: Callable[[str, str], None] = lambda _name, _step: None) -> tuple[Result, ...]:
    """Measure every property of `subject`; one that raises is a failed result with its error, and the rest still run.

    Those of `left_out` are not among the results. `progress` is told the property and, length by length, where in it
    the run is.
    """
    skipped = {prop.key for prop in left_out()}
    results = []
    for prop in PROPERTIES:
        if prop.key not in skipped:
            progress(prop.name, "")
            results.append(
                judge(prop.key, prop.name, partial(prop.tolerance, subject), partial(prop.measure, subject), progress)
            )
    return tuple(results)


def judge(
    key: str,
    name: str,
    tolerance_of: Callable[[], float],
    measure: Callable[[], Iterator[Point]],
    progress: Callable[[str, str], None],
) -> Result:
    """The verdict on what `measure` yields; what it or `tolerance_of` raises is a failure with the error."""
    points: list[Point] = []
    tolerance, error = None, None
    try:
        tolerance = tolerance_of()
        for point in measure():
            points.append(point)
            progress(name, f"length {point.length:,}")
    except Exception as raised:  # whatever a broken package raises is what there is to report
        error = " ".join(f"{type(raised).__name__}: {raised}".split())
    worst = None if error else max(point.deviation for point in points)
    return Result(key, name, worst, tolerance, error or _detail(points), tuple(points), error)


def _detail(points: Sequence[Point]) -> str:
    lengths = [point.length for point in points]
    covered = f"{min(lengths):,} to {max(lengths):,}"
    worst = max(points, key=lambda point: point.deviation)
    if worst.deviation == 0:
        return covered
    kind = "worst" if math.isfinite(worst.deviation) else "not finite"
    return f"{covered}; {kind} at {worst.length:,}" + (f", {worst.note}" if worst.note else "")
