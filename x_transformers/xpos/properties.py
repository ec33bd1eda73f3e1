"""What must hold for xPos at every length, each measured on a real model over real text.

A property is a generator that yields a `Point` per length: how far two computations that must agree are apart.
`check` runs all of them and judges the largest deviation of each.

Tolerances follow from the dtype, in the way the flash-attention authors judge theirs; none is picked.

- Logits: the error that the dtype itself forces is measured on the same model with the same weights and no positions
  at all, in the dtype against float64, on the same text: in one call, and also decoding or in chunks for the properties
  that are about those (kernels for fewer queries than keys add up a long row in another order). The tolerance is 4
  times that: two runs are compared, and each of them rounds q and k once more, after the rotation. A float64 model has
  nothing to be compared with, so there the error of its float32 copy is scaled by the ratio of the unit roundoffs; and
  no wider type to compute its angles in, which makes the one rounding more as large as `angle_error`.
- Scores: `score_tolerance`, from the unit roundoff alone.
- A shift of all positions changes nothing, so its tolerance is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper
from x_transformers.x_transformers import LayerIntermediates

from . import formula, models

MIN_LEN = 64

SHIFTS = (1, 4_097, 1_000_000)
CACHE_LENGTHS = (1_000, 10_000, 100_000)

_STEPS = 16
_GREEDY_STEPS = 32
_GREEDY_LONGEST_PROMPT = 512
_SCORE_LONGEST = 4_096
_SCORE_ROWS = 16


@dataclass(frozen=True)
class Point:
    """How far two computations over `length` positions are apart; infinite where one of them is not finite."""

    length: int
    deviation: float
    note: str = ""


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


class ForcedErrors(NamedTuple):
    """What the dtype alone does to the logits of one call, of that and decoding, of that and chunks."""

    call: float
    decoding: float
    chunks: float


class Subject:
    """The model under check, the text it reads and what it gives for all of it at once.

    `text` holds byte values, `(max_len,)` or longer, of which the first `max_len` are read. Raises ValueError if there
    are fewer, or if `max_len` is less than MIN_LEN.
    """

    def __init__(self, text: Tensor, max_len: int, *, device: torch.device, dtype: torch.dtype) -> None:
        if max_len < MIN_LEN:
            raise ValueError(f"max_len must be at least {MIN_LEN}, got {max_len}")
        if len(text) < max_len:
            raise ValueError(f"text must hold at least max_len = {max_len} bytes, got {len(text)}")
        self.max_len, self.device, self.dtype = max_len, device, dtype
        self.tokens = text[None, :max_len].to(device)
        self.room = max_len + _GREEDY_STEPS

    @cached_property
    def net(self) -> nn.Module:
        return models.build(self.room).to(self.device, self.dtype)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """A ladder from 1 to `max_len`, each about 5/8 of the next, so that odd and even lengths both occur."""
        ladder, length = [], self.max_len
        while length >= 1:
            ladder.append(length)
            length = length * 5 // 8
        return tuple(reversed(ladder))

    @cached_property
    def full(self) -> Tensor:
        """The logits of the whole text in one call, `(1, max_len, 256)`."""
        logits: Tensor = self.net(self.tokens)
        return logits

    @cached_property
    def forced_errors(self) -> ForcedErrors:
        """The errors of the logits that the dtype alone forces; the module's docstring says how they are measured."""
        measured = torch.float32 if self.dtype is torch.float64 else self.dtype
        net = models.build(self.room, xpos=False).to(self.device, measured)
        exact = models.as_float64(net, self.device)(self.tokens.to(models.reference_device(self.device)))
        ratio = unit_roundoff(self.dtype) / unit_roundoff(measured)

        start = self.max_len - _STEPS
        call = ratio * deviation(net(self.tokens), exact)
        decoding = ratio * deviation(
            _decode(net, self.tokens, start, input_not_include_cache=True), exact[:, start - 1 :]
        )
        chunks = ratio * max(deviation(_chunks(net, self.tokens, size), exact) for size in _part_sizes(self.max_len))
        if not math.isfinite(call + decoding + chunks):
            # as a tolerance it would let everything pass
            raise ArithmeticError(f"the model without positions is not finite in {measured}")
        return ForcedErrors(call, max(call, decoding), max(call, chunks))

    @property
    def logit_factor(self) -> float:
        """The tolerance of logits in units of the forced error: 4, and more in float64."""
        roundings = angle_error(self.max_len) if self.dtype is torch.float64 else 1
        return 2 * (1 + roundings)


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, in float64; infinite where either is not finite."""
    difference = (a.detach().cpu().double() - b.detach().cpu().double()).abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else math.inf


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def angle_error(length: int) -> float:
    """Bound on the error of a float64 angle, in unit roundoffs, of a position up to `length` / 2 from the center.

    The frequency (at most 1) is off by 2, the product by 1, the wrapping into 0 to 2 pi by 1, all times the distance.
    """
    return 4 * length / 2


def score_tolerance(dtype: torch.dtype, length: int, dim_head: int = models.DIM_HEAD) -> float:
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
        start = max(1, length - _STEPS)
        tokens = subject.tokens[:, :length]
        logits = _decode(subject.net, tokens, start, input_not_include_cache=input_not_include_cache)
        yield Point(length, deviation(logits, subject.full[:, start - 1 : length]))


def _decode(net: nn.Module, tokens: Tensor, start: int, *, input_not_include_cache: bool) -> Tensor:
    """Logits from position `start - 1` on, after one call for `tokens[:, :start]` and one for each token more."""
    logits, cache = net(tokens[:, :start], return_intermediates=True)
    found = [logits[:, -1:]]
    for end in range(start + 1, tokens.shape[1] + 1):
        first = end - 1 if input_not_include_cache else 0
        logits, cache = net(
            tokens[:, first:end],
            cache=cache,
            input_not_include_cache=input_not_include_cache,
            return_intermediates=True,
        )
        found.append(logits[:, -1:])
    return torch.cat(found, dim=1)


def chunked_prefill(subject: Subject) -> Iterator[Point]:
    """Chunks through the KV cache equal one call for all, whatever the size of the chunks."""
    for size in _part_sizes(subject.max_len):
        yield from _by_length(subject, _chunks(subject.net, subject.tokens, size), f"parts of {size:,}")


def _chunks(net: nn.Module, tokens: Tensor, size: int) -> Tensor:
    """Logits of all tokens, `size` of them in each call."""
    found, cache = [], None
    for chunk in tokens.split(size, dim=1):
        logits, cache = net(
            chunk, cache=cache, input_not_include_cache=True, cache_age=chunk.shape[1], return_intermediates=True
        )
        found.append(logits)
    return torch.cat(found, dim=1)


def segments_with_mems(subject: Subject) -> Iterator[Point]:
    """Segments that carry the hidden states of all before them equal one call for all."""
    for size in _part_sizes(subject.max_len):
        found, mems = [], None
        for segment in subject.tokens.split(size, dim=1):
            logits, mems = subject.net(segment, mems=mems, return_mems=True)
            found.append(logits)
        yield from _by_length(subject, torch.cat(found, dim=1), f"parts of {size:,}")


def _part_sizes(length: int) -> tuple[int, ...]:
    # an even split, and an odd size that leaves a shorter last part
    return (length // 4, length // 7 | 1)


def _by_length(subject: Subject, logits: Tensor, note: str) -> Iterator[Point]:
    start = 0
    for length in subject.lengths:
        yield Point(length, deviation(logits[:, start:length], subject.full[:, start:length]), note)
        start = length


def shift_invariance(subject: Subject) -> Iterator[Point]:
    """A constant added to all positions changes nothing, not a bit: a whole call, one cached token, a shift per row."""
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
    generator = AutoregressiveWrapper(subject.net)
    longest = min(subject.max_len, _GREEDY_LONGEST_PROMPT)
    for length in [length for length in subject.lengths if length <= longest][::-3][::-1]:
        prompt = subject.tokens[:, :length]
        cached, uncached = (
            generator.generate(prompt, _GREEDY_STEPS, temperature=0.0, cache_kv=cache_kv)[0]
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
        with models.observe(net, torch.tensor([0], device=subject.device)) as layers:
            _, cache = net(subject.tokens[:, :1], cache=cache, input_not_include_cache=True, return_intermediates=True)
        yield from _score_points(layers, cache, torch.tensor([length]))


def _score_points(layers: list[models.Observed], cache: LayerIntermediates, query_pos: Tensor) -> Iterator[Point]:
    for number, (layer, inter) in enumerate(zip(layers, cache.attn_intermediates), 1):
        keys = inter.cached_kv[0][0]
        length = keys.shape[-2]
        query_pos = query_pos.cpu()
        key_pos = torch.arange(length)
        exact, size = formula.scores(layer.queries, keys, query_pos, key_pos, rotary_dim=models.ROTARY_DIM)
        error = (layer.scores.cpu().double() - exact).abs() / size.amax(dim=-1, keepdim=True)
        error = error[:, query_pos[:, None] >= key_pos]
        found = float(error.max()) if bool(error.isfinite().all()) else math.inf
        yield Point(length, found, f"layer {number}")


# the run


@dataclass(frozen=True)
class Property:
    key: str
    name: str
    measure: Callable[[Subject], Iterator[Point]]
    tolerance: Callable[[Subject], float]


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


def _none(_subject: Subject) -> float:
    return 0.0


PROPERTIES = (
    Property("prefix", "prefix consistency", prefix_consistency, _of_calls),
    Property("cached-whole", "cached decode, whole text", cached_decode_whole, _of_decoding),
    Property("cached-new", "cached decode, new token", cached_decode_new, _of_decoding),
    Property("chunked", "chunked prefill", chunked_prefill, _of_chunks),
    Property("mems", "segments with mems", segments_with_mems, _of_chunks),
    Property("shift", "shift of positions", shift_invariance, _none),
    Property("greedy", "greedy text, cache on, off", greedy_generation, _of_decoding),
    Property("scores", "scores, all queries", scores_of_all_queries, _of_scores),
    Property("scores-cache", "scores, long cache", scores_on_long_cache, _of_scores_on_cache),
)


@torch.no_grad()
def check(subject: Subject, progress: Callable[[str, str], None] = lambda _name, _step: None) -> tuple[Result, ...]:
    """Measure every property of `subject`; one that raises is a failed result with its error, and the rest still run.

    `progress` is told the property and, length by length, where in it the run is.
    """
    return tuple(_judge(prop, subject, progress) for prop in PROPERTIES)


def _judge(prop: Property, subject: Subject, progress: Callable[[str, str], None]) -> Result:
    points: list[Point] = []
    tolerance, error = None, None
    progress(prop.name, "")
    try:
        tolerance = prop.tolerance(subject)
        for point in prop.measure(subject):
            points.append(point)
            progress(prop.name, f"length {point.length:,}")
    except Exception as raised:  # whatever a broken package raises is what there is to report
        error = " ".join(f"{type(raised).__name__}: {raised}".split())
    worst = None if error else max(point.deviation for point in points)
    return Result(prop.key, prop.name, worst, tolerance, error or _detail(points), tuple(points), error)


def _detail(points: Sequence[Point]) -> str:
    lengths = [point.length for point in points]
    covered = f"{min(lengths):,} to {max(lengths):,}"
    worst = max(points, key=lambda point: point.deviation)
    if worst.deviation == 0:
        return covered
    kind = "worst" if math.isfinite(worst.deviation) else "not finite"
    return f"{covered}; {kind} at {worst.length:,}" + (f", {worst.note}" if worst.note else "")
