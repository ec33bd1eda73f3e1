"""The model under check, the text it reads, and how far its answers may be apart.

Tolerances follow from the dtype, in the way the flash-attention authors judge theirs; none is picked.

- Logits: the error that the dtype itself forces is measured on the same model with the same weights and no positions
  at all, in the dtype against float64, on the same text: in one call, and also decoding or in chunks for the properties
  that are about those (kernels for fewer queries than keys add up a long row in another order). The tolerance is 4
  times that: two runs are compared, and each of them rounds q and k once more, after the rotation. A float64 model has
  nothing to be compared with, so there the error of its float32 copy is scaled by the ratio of the unit roundoffs; and
  no wider type to compute its angles in, which makes the one rounding more as large as `angle_error`.
- Scores: `score_tolerance`, from the unit roundoff alone.
- A shift of all positions changes rounding alone: the tolerance of logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import formula, models

MIN_LEN = 64

STEPS = 16
GREEDY_STEPS = 32


@dataclass(frozen=True)
class Point:
    """How far two computations over `length` positions are apart; infinite where one of them is not finite."""

    length: int
    deviation: float
    note: str = ""


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
        self.room = max_len + GREEDY_STEPS

    @cached_property
    def net(self) -> nn.Module:
        return models.build(self.room).to(self.device, self.dtype)

    def model(self, **options: Any) -> nn.Module:
        """A model with further options of `models.build`, as `net` is without."""
        return models.build(self.room, **options).to(self.device, self.dtype)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return ladder(self.max_len)

    @cached_property
    def full(self) -> Tensor:
        """The logits of the whole text in one call, `(1, max_len, 256)`."""
        logits: Tensor = self.net(self.tokens)
        return logits

    @cached_property
    def forced_errors(self) -> ForcedErrors:
        """The errors of the logits that the dtype alone forces; the module's docstring says how they are measured."""
        net, exact, ratio = self._without_positions()
        start = self.max_len - STEPS
        call = ratio * deviation(net(self.tokens), exact)
        only_new = models.accepts("input_not_include_cache")
        decoded = decode(net, self.tokens, start, input_not_include_cache=only_new)
        decoding = ratio * deviation(decoded, exact[:, start - 1 :])
        chunks = ratio * max(deviation(prefill(net, self.tokens, size), exact) for size in part_sizes(self.max_len))
        return ForcedErrors(_finite(call), _finite(max(call, decoding)), _finite(max(call, chunks)))

    def forced_error(self, inputs: Mapping[str, Any], **options: Any) -> float:
        """The same of one call of a model with further options, and with what is passed to it beside the text."""
        net, exact, ratio = self._without_positions(inputs, **options)
        return _finite(ratio * deviation(net(self.tokens, **move(inputs, self.device, self._measured)), exact))

    @property
    def _measured(self) -> torch.dtype:
        return torch.float32 if self.dtype is torch.float64 else self.dtype

    def _without_positions(
        self, inputs: Mapping[str, Any] | None = None, **options: Any
    ) -> tuple[nn.Module, Tensor, float]:
        """The model without positions, what it gives in float64, and what its errors are to be multiplied by."""
        device, net = models.reference_device(self.device), models.build(self.room, xpos=False, **options)
        net = net.to(self.device, self._measured)
        moved = move(inputs or {}, device, self._measured, torch.float64)
        exact = models.as_float64(net, self.device)(self.tokens.to(device), **moved)
        return net, exact, unit_roundoff(self.dtype) / unit_roundoff(self._measured)

    @property
    def logit_factor(self) -> float:
        """The tolerance of logits in units of the forced error: 4, and more in float64."""
        roundings = angle_error(self.max_len) if self.dtype is torch.float64 else 1
        return 2 * (1 + roundings)


def move(value: Any, device: torch.device, *dtypes: torch.dtype) -> Any:
    """Tensors, in lists, tuples and mappings as well, on a device and, if of floating point, rounded to each dtype."""
    if isinstance(value, Mapping):
        return {name: move(item, device, *dtypes) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device, *dtypes) for item in value)
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    for dtype in dtypes if value.is_floating_point() else ():
        value = value.to(dtype)
    return value


def _finite(error: float) -> float:
    if not math.isfinite(error):
        # as a tolerance it would let everything pass
        raise ArithmeticError("the model without positions is not finite")
    return error


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, in float64; infinite where either is not finite."""
    difference = (a.detach().cpu().double() - b.detach().cpu().double()).abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else math.inf


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def angle_error(length: int) -> float:
    """Bound on the error of a float64 angle, in unit roundoffs, of a position up to `length`.

    The frequency (at most 1) is off by 2, the product by 1, the wrapping into 0 to 2 pi by 1, all times the position.
    """
    return 4 * length


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


def score_error(
    scores: Tensor, q: Tensor, k: Tensor, query_pos: Tensor, key_pos: Tensor, scale_base: float = formula.SCALE_BASE
) -> float:
    """How far scores `(heads, i, j)` are from the formula, relative to the largest sum of terms' sizes of each query.

    `q` `(heads, i, dim_head)` and `k` `(heads, j, dim_head)` are those before the rotation.
    """
    query_pos, key_pos = query_pos.cpu(), key_pos.cpu()
    q, k = models.in_pairs(q), models.in_pairs(k)
    exact, size = formula.scores(q, k, query_pos, key_pos, rotary_dim=models.ROTARY_DIM, scale_base=scale_base)
    error = (scores.detach().cpu().double() - exact).abs() / size.amax(dim=-1, keepdim=True)
    error = error[:, query_pos[:, None] >= key_pos]
    return float(error.max()) if bool(error.isfinite().all()) else math.inf


def decode(net: nn.Module, tokens: Tensor, start: int, *, input_not_include_cache: bool) -> Tensor:
    """Logits from position `start - 1` on, after one call for `tokens[:, :start]` and one for each token more."""
    logits, cache = net(tokens[:, :start], return_intermediates=True)
    found = [logits[:, -1:]]
    for end in range(start + 1, tokens.shape[1] + 1):
        if input_not_include_cache:
            logits, cache = extend(net, tokens[:, :end], 1, cache)
        else:
            logits, cache = net(tokens[:, :end], cache=cache, return_intermediates=True)
        found.append(logits[:, -1:])
    return torch.cat(found, dim=1)


def prefill(net: nn.Module, tokens: Tensor, size: int) -> Tensor:
    """Logits of all tokens, `size` of them in each call."""
    found, cache, end = [], None, 0
    for chunk in tokens.split(size, dim=1):
        end += chunk.shape[1]
        logits, cache = extend(net, tokens[:, :end], chunk.shape[1], cache)
        found.append(logits)
    return torch.cat(found, dim=1)


def extend(net: nn.Module, tokens: Tensor, new: int, cache: Any) -> tuple[Tensor, Any]:
    """Logits of the last `new` tokens, and the cache of all, given a cache of those before; only the new ones are read.

    Where a release has no argument for that, it is given all of them, and drops the others itself.
    """
    options: dict[str, Any] = {"cache": cache, "cache_age": new, "return_intermediates": True}
    if models.accepts("input_not_include_cache"):
        tokens, options["input_not_include_cache"] = tokens[:, -new:], True
    logits, cache = net(tokens, **options)
    return logits, cache


def ladder(length: int) -> tuple[int, ...]:
    """Lengths from 1 to `length`, each about 5/8 of the next, so that odd and even ones both occur."""
    lengths = []
    while length >= 1:
        lengths.append(length)
        length = length * 5 // 8
    return tuple(reversed(lengths))


def part_sizes(length: int) -> tuple[int, ...]:
    # an even split, and an odd size that leaves a shorter last part
    return (length // 4, length // 7 | 1)
