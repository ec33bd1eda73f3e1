"""What must hold for xPos in any model, measured on a user's own: with its weights, in its dtype, on its device.

Tolerances follow from the dtype as in `subject`: 4 times the error that the dtype forces on the same model, with the
same weights and inputs and `PlainRotary` in place of xPos, run the same way (in one call, decoding, in chunks), in the
dtype against float64. Two runs are compared, and with xPos other keys weigh most. Since that model has no xPos, and no
part of the package's `RotaryEmbedding`, a fault there cannot widen its own tolerance, as it would if the model were
compared with itself in float64; and since it has positions, attention is about as sharp as it was trained to be, as it
is not without. A float64 model has nothing to be compared with, so there the error of its float32 copy is scaled by the
ratio of the unit roundoffs, unless attention is not flash: its softmax works in float32 whatever the model's dtype. A
shift of all positions changes rounding alone, and has the same tolerance.

Not every model has every property: with some options a decoder lacks one whatever its positions are, as a shift where
memory keys stay at position 0. So where one does not hold, the model with plain rotary is asked as well, and where that
lacks it too it is left out, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import formula, models
from .properties import SHIFTS, LeftOut, Result, judge
from .subject import STEPS, Point, angle_error, deviation, ladder, part_sizes, unit_roundoff
from .user_model import Inputs, Net, duplicate

MIN_LEN = 32
DEFAULT_MAX_LEN = 512

_ROWS = 3


def longest(net: Net) -> tuple[int, str]:
    """The longest text that all properties can be run on, and what limits it."""
    rotary: Any = net.layers.rotary_pos_emb
    in_dtype = models.longest_window(net.dtype, rotary.scale_base, masked=True)
    # memory tokens have positions of their own
    fitting = in_dtype
    while fitting > 0 and net.positions(fitting) > in_dtype:
        fitting -= net.positions(fitting) - in_dtype
    name = str(net.dtype).removeprefix("torch.")
    reason = f"more queries in one call leave the range of {name} at its scale base of {rotary.scale_base:g}"
    if net.max_seq_len is not None and net.max_seq_len < fitting:
        return net.max_seq_len, "its absolute position embedding has room for no more"
    return fitting, reason


class ModelSubject:
    """The model under check, the texts that it reads and what it gives for all of them at once.

    `_ROWS` texts of `max_len` positions, of which all but one property read the first.
    """

    def __init__(self, net: Net, max_len: int) -> None:
        self.net, self.max_len = net, max_len
        self.texts = net.inputs(_ROWS, max_len)
        self.inputs = self.texts.part(None, None, slice(0, 1))
        self.lengths = ladder(max_len)

    @cached_property
    def full(self) -> Tensor:
        return self.net(self.inputs)[0]

    # the model with plain rotary, and what the dtype does to it

    @cached_property
    def plain(self) -> ModelSubject:
        return ModelSubject(self._twin(self.net.dtype), self.max_len)

    def _twin(self, dtype: torch.dtype) -> Net:
        """The same weights, rounded to the model's dtype if they are not yet, and plain rotary, in `dtype`."""
        net = Net(duplicate(self.net.module).to(dtype=dtype))
        net.layers.rotary_pos_emb = PlainRotary(net.layers.rotary_pos_emb)
        return net

    @property
    def _measured(self) -> torch.dtype:
        return torch.float32 if self.net.dtype is torch.float64 else self.net.dtype

    @cached_property
    def _pair(self) -> tuple[Net, Net, float]:
        """The model with plain rotary, its float64 copy, and what its errors are to be multiplied by."""
        net = self._twin(self._measured)
        device = models.reference_device(net.device)
        exact = Net(duplicate(net.module).to(device).double())
        ratio = unit_roundoff(self.net.dtype) / unit_roundoff(self._measured) if self.net.is_flash else 1.0
        return net, exact, ratio

    def forced_error(self, run: Callable[[Net, Inputs], Tensor], inputs: Inputs | None = None) -> float:
        """How far `run` is from itself in float64 on the model with plain rotary."""
        net, exact, ratio = self._pair
        inputs = (inputs or self.inputs).to(net.device, self._measured)
        found, expected = run(net, inputs), run(exact, inputs.to(exact.device, torch.float64))
        error = ratio * deviation(found, expected)
        if not math.isfinite(error):
            raise ArithmeticError("the model with plain rotary in place of xPos is not finite")
        return error

    @cached_property
    def of_calls(self) -> float:
        return self.logit_factor * self.forced_error(lambda net, inputs: net(inputs)[0])

    @cached_property
    def of_decoding(self) -> float:
        start = self.max_len - _steps(self.max_len)
        error = self.forced_error(lambda net, inputs: decode(net, inputs, start, only_new=_takes_only_new()))
        return max(self.of_calls, self.logit_factor * error)

    @cached_property
    def of_chunks(self) -> float:
        errors = (
            self.forced_error(lambda net, inputs, size=size: prefill(net, inputs, size))  # type: ignore[misc]
            for size in part_sizes(self.max_len)
        )
        return max(self.of_calls, self.logit_factor * max(errors))

    @property
    def logit_factor(self) -> float:
        """The tolerance in units of the forced error: 4, and more in float64, where angles are no more exact."""
        exact_angles = self.net.dtype is not torch.float64 or not self.net.is_flash
        return 2 * (1 + (1 if exact_angles else angle_error(self.max_len)))

    @torch.no_grad()
    def positions_matter(self) -> bool:
        """Whether the output is another without positions. If it is not, little can be said about them."""
        net = Net(duplicate(self.net.module))
        net.layers.rotary_pos_emb = None
        try:
            return deviation(self.full, net(self.inputs)[0]) > self.of_calls
        except Exception:  # with some options there is no doing without
            return True


class PlainRotary(nn.Module):
    """Plain rotary in place of a `RotaryEmbedding`, with tables in float64, so that what rounds is the model alone."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.scale = None
        self.dim = 2 * rotary.inv_freq.shape[0]

    def forward(self, t: Tensor, offset: object = 0, seq_len: object = None) -> tuple[Tensor, Tensor | float]:
        """Angles `(1, n, dim)` or `(b, n, dim)` of positions `t`, `(n,)` or `(b, n)`, and a scale of 1."""
        dtype = torch.float64 if t.device.type != "mps" else torch.float32
        angle = t[..., None].to(dtype) * formula.angles(self.dim).to(t.device, dtype)
        if models.rotates_neighbors():
            angle = angle.repeat_interleave(2, dim=-1)
            return angle[None] if t.ndim == 1 else angle, 1.0
        angle = torch.cat((angle, angle), dim=-1)
        # 1.27.5 has angles (n, dim), and brings back to the model's dtype only what it scales by a tensor
        return angle, torch.ones_like(angle)


# ways to run a model over a text


def _steps(length: int) -> int:
    return min(STEPS, length // 2)


def _takes_only_new() -> bool:
    return models.accepts("input_not_include_cache")


def decode(net: Net, inputs: Inputs, start: int, *, only_new: bool) -> Tensor:
    """Outputs from position `start - 1` on, after one call for all before and one for each position more."""
    out, cache = net(inputs.part(0, start))
    found = [out[:, -1:]]
    for end in range(start + 1, inputs.length + 1):
        out, cache = extend(net, inputs, end - 1, end, cache, only_new=only_new)
        found.append(out)
    return torch.cat(found, dim=1)


def prefill(net: Net, inputs: Inputs, size: int) -> Tensor:
    """Outputs of all positions, `size` of them in each call, through the KV cache."""
    out, cache = net(inputs.part(0, size))
    found = [out]
    for start in range(size, inputs.length, size):
        stop = min(start + size, inputs.length)
        out, cache = extend(net, inputs, start, stop, cache, only_new=_takes_only_new())
        found.append(out)
    return torch.cat(found, dim=1)


def extend(net: Net, inputs: Inputs, start: int, stop: int, cache: Any, *, only_new: bool) -> tuple[Tensor, Any]:
    """Outputs from `start` to `stop`, given a cache of all before; only these are passed, or all."""
    options: dict[str, Any] = {"cache": cache, "cache_age": stop - start}
    if only_new:
        options["input_not_include_cache"] = True
    elif not net.is_wrapper and models.accepts("seq_pos_offset"):
        # the layers take what they are given with a cache for new
        options["seq_pos_offset"] = 0
    return net(inputs.part(start if only_new else 0, stop), **options)


def segments(net: Net, inputs: Inputs, sizes: list[int]) -> Tensor:
    """Outputs of consecutive segments, each given the hidden states of those before."""
    found, mems, start = [], None, 0
    keeps = net.reads_tokens
    for size in sizes:
        options = {} if mems is None else {"mems": mems}
        if keeps:
            options["return_mems"] = True
        out, intermediates = net(inputs.part(start, start + size), **options)
        found.append(out)
        start += size
        if keeps:
            mems = intermediates.mems
            continue
        hiddens = intermediates.hiddens
        mems = hiddens if mems is None else [torch.cat(pair, dim=-2) for pair in zip(mems, hiddens)]
        if net.max_mem_len is not None:
            mems = [each[:, -net.max_mem_len :] for each in mems]
    return torch.cat(found, dim=1)


def _segment_sizes(length: int, kept: int | None) -> Iterator[list[int]]:
    """Segments of which none has more before it than are kept; at most `length` in all."""
    for size in dict.fromkeys(part_sizes(length)):
        longest = length if kept is None else min(length, kept + size)
        sizes = [size] * (longest // size)
        if longest % size:
            sizes.append(longest % size)
        if kept is None or sum(sizes[:-1]) <= kept:
            yield sizes
        elif kept > 0:
            yield [min(kept, longest // 2)] * 2
    if kept is not None and 0 < kept < length // 2:
        yield [kept, kept]


# the properties


def prefix_consistency(subject: ModelSubject) -> Iterator[Point]:
    """The output at a position is the same however much text follows."""
    for length in subject.lengths[:-1]:
        yield Point(length, deviation(subject.net(subject.inputs.part(0, length))[0], subject.full[:, :length]))


def independent_rows(subject: ModelSubject) -> Iterator[Point]:
    """A text gives in a batch what it gives alone."""
    for length in (subject.lengths[len(subject.lengths) // 2], subject.max_len):
        together = subject.net(subject.texts.part(0, length))[0]
        for row in range(_ROWS):
            rows = slice(row, row + 1)
            alone = subject.net(subject.texts.part(0, length, rows))[0]
            yield Point(length, deviation(alone, together[rows]), f"row {row + 1} of {_ROWS}")


def cached_decode_whole(subject: ModelSubject) -> Iterator[Point]:
    """One position at a time through the KV cache, all of the text passed each time, equals one call for all."""
    return _cached_decode(subject, only_new=False)


def cached_decode_new(subject: ModelSubject) -> Iterator[Point]:
    """One position at a time through the KV cache, only what is new passed, equals one call for all."""
    return _cached_decode(subject, only_new=True)


def _cached_decode(subject: ModelSubject, *, only_new: bool) -> Iterator[Point]:
    for length in subject.lengths[1:]:
        start = max(1, length - _steps(subject.max_len))
        out = decode(subject.net, subject.inputs.part(0, length), start, only_new=only_new)
        yield Point(length, deviation(out, subject.full[:, start - 1 : length]))


def chunked_prefill(subject: ModelSubject) -> Iterator[Point]:
    """Chunks through the KV cache equal one call for all, whatever the size of the chunks."""
    for size in part_sizes(subject.max_len):
        out = prefill(subject.net, subject.inputs, size)
        yield Point(subject.max_len, deviation(out, subject.full), f"parts of {size:,}")


def segments_with_mems(subject: ModelSubject) -> Iterator[Point]:
    """Segments that carry the hidden states of all before them equal one call for all."""
    for sizes in _segment_sizes(subject.max_len, subject.net.max_mem_len):
        length = sum(sizes)
        out = segments(subject.net, subject.inputs, sizes)
        yield Point(length, deviation(out, subject.full[:, :length]), f"parts of {sizes[0]:,}")


def shift_invariance(subject: ModelSubject) -> Iterator[Point]:
    """A constant added to all positions changes rounding alone: of a whole call, and one for each row."""
    for length in (subject.lengths[len(subject.lengths) // 2], subject.max_len):
        inputs = subject.inputs.part(0, length)
        positions = torch.arange(subject.net.positions(length), device=subject.net.device)
        expected = subject.net(inputs)[0]
        yield Point(length, deviation(subject.net(inputs, pos=positions)[0], expected), "pos=arange(n) given")
        for shift in SHIFTS:
            found = subject.net(inputs, pos=positions + shift)[0]
            yield Point(length, deviation(found, expected), f"by {shift:,}")

    positions = torch.arange(subject.net.positions(subject.max_len), device=subject.net.device)
    shifts = torch.tensor((0, *SHIFTS[-(_ROWS - 1) :]), device=subject.net.device)[:, None]
    found, expected = (subject.net(subject.texts, **options)[0] for options in ({"pos": positions + shifts}, {}))
    yield Point(subject.max_len, deviation(found, expected), "each row by its own")


def up_to_the_limit(subject: ModelSubject) -> Iterator[Point]:
    """As many queries in one call as the dtype has room for are finite, and more than the limit raise.

    On a copy with a scale base for which the limit is below the length of the text: at the model's own it may be tens
    of thousands. Where parts through the KV cache can equal one call, they must there as well.
    """
    net = Net(duplicate(subject.net.module))
    rotary: Any = net.layers.rotary_pos_emb
    # limits are odd numbers, so it may come out one higher
    wanted = net.positions(subject.max_len - 1) - 1
    rotary.scale_base *= wanted / models.limit_of(rotary, net.dtype, masked=False)
    note = f"scale base {rotary.scale_base:.3g}"

    def longest(positions: int) -> int:
        return max(n for n in range(subject.max_len) if net.positions(n) <= positions)

    fitting = longest(models.longest_window(net.dtype, rotary.scale_base, masked=True))
    out = net(subject.inputs.part(0, fitting))[0]
    expected = out
    if net.can_cache and _holds_in_chunks(subject, fitting):
        expected = prefill(net, subject.inputs.part(0, fitting), max(1, fitting // 3))
    yield Point(fitting, deviation(out, expected), note)

    limit = longest(models.limit_of(rotary, net.dtype, masked=False))
    try:
        net(subject.inputs.part(0, limit + 1))
    except ValueError:
        yield Point(limit + 1, 0.0, "refused")
    else:
        yield Point(limit + 1, math.inf, "one query too many, and no error")


def _holds_in_chunks(subject: ModelSubject, length: int) -> bool:
    """Whether that is a property of the model at all, that is with plain rotary."""
    twin = subject.plain
    inputs = twin.inputs.part(0, length)
    try:
        return deviation(prefill(twin.net, inputs, max(1, length // 3)), twin.net(inputs)[0]) <= subject.of_chunks
    except Exception:
        return False


def _no_cache(net: Net) -> str:
    if not net.can_cache:
        return "it cannot cache keys and values (memory tokens, recycling or attn_selective)"
    return ""


def _no_input_of_only_the_new(net: Net) -> str:
    return _no_cache(net) or ("" if _takes_only_new() else "this release lacks the argument input_not_include_cache")


def _no_mems(net: Net) -> str:
    return "its max_mem_len is 0, so that it keeps no hidden states" if net.max_mem_len == 0 else ""


def _no_positions(net: Net) -> str:
    if not models.accepts("pos"):
        return "this release lacks the argument pos"
    if net.has_absolute_positions:
        return "it has absolute positions as well, which a shift changes"
    if net.is_wrapper and not net.reads_tokens:
        return f"{type(net.module).__name__} does not pass pos to its layers"
    return ""


@dataclass(frozen=True)
class ModelProperty:
    """`left_out` gives the reason why a model cannot have it, empty if it can."""

    key: str
    name: str
    measure: Callable[[ModelSubject], Iterator[Point]]
    tolerance: Callable[[ModelSubject], float]
    left_out: Callable[[Net], str] = lambda _net: ""
    # whether the model with plain rotary can lack it
    asks_twin: bool = True


def _of_rows(subject: ModelSubject) -> float:
    alone = subject.forced_error(lambda net, inputs: net(inputs)[0], subject.texts)
    return max(subject.of_calls, subject.logit_factor * alone)


def _of_shift(subject: ModelSubject) -> float:
    # in float64 alone an angle has no more digits than the model, and loses them with the size of the position
    return subject.of_calls * (max(SHIFTS) / subject.max_len if subject.net.dtype is torch.float64 else 1)


def _of_chunks_if_any(subject: ModelSubject) -> float:
    return subject.of_chunks if subject.net.can_cache else subject.of_calls


def _of_segments(subject: ModelSubject) -> float:
    errors = [
        subject.forced_error(
            lambda net, inputs, sizes=sizes: segments(net, inputs, sizes)  # type: ignore[misc]
        )
        for sizes in _segment_sizes(subject.max_len, subject.net.max_mem_len)
    ]
    return max(subject.of_calls, subject.logit_factor * max(errors))


PROPERTIES = (
    ModelProperty("prefix", "prefix consistency", prefix_consistency, lambda subject: subject.of_calls),
    ModelProperty("rows", "independent rows", independent_rows, _of_rows),
    ModelProperty(
        "cached-whole",
        "cached decode, whole text",
        cached_decode_whole,
        lambda subject: subject.of_decoding,
        _no_cache,
    ),
    ModelProperty(
        "cached-new",
        "cached decode, new token",
        cached_decode_new,
        lambda subject: subject.of_decoding,
        _no_input_of_only_the_new,
    ),
    ModelProperty("chunked", "chunked prefill", chunked_prefill, lambda subject: subject.of_chunks, _no_cache),
    ModelProperty("mems", "segments with mems", segments_with_mems, _of_segments, _no_mems),
    ModelProperty("shift", "shift of positions", shift_invariance, _of_shift, _no_positions),
    ModelProperty("range", "up to the limit", up_to_the_limit, _of_chunks_if_any, asks_twin=False),
)


@torch.no_grad()
def check(
    subject: ModelSubject, progress: Callable[[str, str], None] = lambda _name, _step: None
) -> tuple[tuple[Result, ...], tuple[LeftOut, ...]]:
    """Measure every property that the model can have; those that it cannot are named with the reason."""
    results, left_out = [], []
    for prop in PROPERTIES:
        progress(prop.name, "")
        reason = prop.left_out(subject.net)
        if not reason:
            result = _judge(prop, subject, prop.tolerance, progress)
            reason = "" if result.passed or not prop.asks_twin else _reason_of_twin(prop, subject, result)
        if reason:
            left_out.append(LeftOut(prop.key, prop.name, reason))
        else:
            results.append(result)
    return tuple(results), tuple(left_out)


def _judge(
    prop: ModelProperty,
    subject: ModelSubject,
    tolerance: Callable[[ModelSubject], float],
    progress: Callable[[str, str], None],
) -> Result:
    return judge(prop.key, prop.name, lambda: tolerance(subject), lambda: prop.measure(subject), progress)


def _reason_of_twin(prop: ModelProperty, subject: ModelSubject, result: Result) -> str:
    """Why it is no fault of xPos that the property does not hold, empty if it is one."""
    try:
        tolerance = prop.tolerance(subject)
    except Exception as error:
        return f"with plain rotary it cannot be run with this model either: {_first_line(error)}"
    of_twin = _judge(prop, subject.plain, lambda _subject: tolerance, lambda _name, _step: None)
    if of_twin.passed:
        return ""
    found = of_twin.error or f"{of_twin.deviation:.1e} apart, {of_twin.detail}"
    return f"with plain rotary this model does not have it either: {found}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"
