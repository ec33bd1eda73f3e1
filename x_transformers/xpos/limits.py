"""How many queries fit into one call with xPos, by dtype, and what scale base a longer one needs.

All figures are what the package itself refuses above: `RotaryEmbedding.max_seq_len`, or, where the line has none, the
same formula. The center is in the middle of the queries, so q and k are scaled by up to (1 / ζ_0) ** (window // 2 / S).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from x_transformers.x_transformers import RotaryEmbedding

from . import formula

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# `RotaryEmbedding` divides by `dim - 2`
MIN_DIM = 4

_FORMAT = 2
# What an element of q or k may reach before it is scaled.
_ROOM = 64


def longest_window(dtype: torch.dtype, scale_base: float = formula.SCALE_BASE, *, masked: bool = True) -> int:
    """How many queries fit into one call with room for elements of up to 64.

    `masked` says that the scores with keys ahead, which are scaled by its square, have to be finite as well.
    """
    return _window(dtype, scale_base, masked=masked, room=_ROOM)


def limit_of(rotary: Any, dtype: torch.dtype, *, masked: bool) -> int:
    """How many queries in one call are not refused: with room for elements of 1, as some parameters make them."""
    if hasattr(rotary, "max_seq_len"):
        return int(rotary.max_seq_len(dtype, is_masked=masked))
    return _window(dtype, rotary.scale_base, masked=masked, room=1)


def _window(dtype: torch.dtype, scale_base: float, *, masked: bool, room: float) -> int:
    largest = torch.finfo(dtype).max / room
    if masked:
        largest = min(largest, math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max) / room)
    growth = -math.log(float(formula.decays(MIN_DIM)[0])) / scale_base
    return 2 * int(math.log(largest) / growth) + 1


@dataclass(frozen=True)
class Limit:
    """The most queries in one call that are not refused.

    - `unmasked`: the largest scale of a query or key is in range. Scores with keys ahead may overflow, as attention
      replaces them, and flash attention without any other mask skips them
    - `masked`: with flash attention that adds a mask or a bias to the scores, these have to be finite as well
    """

    dtype: str
    unmasked: int
    masked: int


@dataclass(frozen=True)
class Needed(Limit):
    """What it takes for a length: in one call, the least whole scale base, or how many calls through the KV cache."""

    calls: int


def limits(dim: int, scale_base: float) -> tuple[Limit, ...]:
    """The limits of each dtype."""
    rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base)
    return tuple(
        Limit(name, *(limit_of(rotary, dtype, masked=masked) for masked in (False, True)))
        for name, dtype in DTYPES.items()
    )


def needed(dim: int, scale_base: float, length: int) -> tuple[Needed, ...]:
    """What it takes for `length` queries in each dtype."""

    def base(dtype: str, kind: str) -> int:
        def limit_at(base: int) -> int:
            rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=base)
            return limit_of(rotary, DTYPES[dtype], masked=kind == "masked")

        return shortest_scale_base(length, limit_at)

    return tuple(
        Needed(row.dtype, base(row.dtype, "any"), base(row.dtype, "masked"), math.ceil(length / row.masked))
        for row in limits(dim, scale_base)
    )


def shortest_scale_base(length: int, limit_at: Callable[[int], int]) -> int:
    """The least whole scale base for which `limit_at` is at least `length`; it grows with the scale base."""
    high = 1
    while limit_at(high) < length:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if limit_at(middle) >= length else (middle, high)
    return high


def table(dim: int, scale_base: float, length: int | None) -> str:
    def rows(found: tuple[Any, ...], *columns: str) -> list[str]:
        return [
            f"{row.dtype:<10}{row.unmasked:>14,}" + "".join(f"{getattr(row, name):>12,}" for name in columns)
            for row in found
        ]

    lines = [
        f"Limits of xPos with a scale base of {scale_base:g} and {dim} rotated dims (any number has the same).",
        "",
        "            queries in one call",
        f"{'dtype':<10}{'any':>14}{'masked':>12}",
        *rows(limits(dim, scale_base), "masked"),
    ]
    if length is not None:
        lines += [
            "",
            f"For {length:,} queries: the least whole scale base in one call, or the calls it takes at {scale_base:g}",
            f"{'dtype':<10}{'any':>14}{'masked':>12}{'calls':>12}",
            *rows(needed(dim, scale_base, length), "masked", "calls"),
        ]
    return "\n".join([*lines, "", _EXPLANATION])


_EXPLANATION = """\
any: the scale itself is out of range above. masked: flash attention with a mask, a bias, a cache, mems
or dropout, which adds to scores that have to be finite. What is in the cache or the mems does not count.

One query more raises ValueError before any layer runs. Ways out: pass the sequence in chunks through the
KV cache, with input_not_include_cache = True and cache_age set to the length of each chunk; compute in
bfloat16 or float32; or build the model with a larger rotary_xpos_scale_base. Stay at half of a limit, as
large values need room too. Positions passed in are not checked: what is too far ahead gives NaN."""


def document(dim: int, scale_base: float, length: int | None) -> str:
    fields = {
        "format": _FORMAT,
        "dim": dim,
        "scale_base": scale_base,
        "limits": [asdict(row) for row in limits(dim, scale_base)],
        "length": length,
        "needed": None if length is None else [asdict(need) for need in needed(dim, scale_base, length)],
    }
    return json.dumps(fields, indent=2, allow_nan=False)
