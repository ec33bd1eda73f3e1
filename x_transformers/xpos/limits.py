"""How many queries fit into one call with xPos, by dtype, and what scale base a longer one needs.

All figures are what the package itself refuses above: `RotaryEmbedding.max_seq_len`, or, where the line has none, the
same formula. The center is in the middle of the queries, so q and k are scaled by up to (1 / ζ_0) ** (window // 2 / S).
"""

from __future__ import annotations

import math
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

_EXPLANATION = """
any: the scale itself is out of range above. masked: flash attention with a mask, a bias, a cache, mems
or dropout, which adds to scores that have to be finite. What is in the cache or the mems does not count.

One query more raises ValueError before any layer runs. Ways out: pass the sequence in chunks through the
KV cache, with input_not_include_cache = True and cache_age set to the length of each chunk; compute in
bfloat16 or float32; or build the model with a larger rotary_xpos_scale_base. Stay at half of a limit, as
large values need room too. Positions passed in are not checked: what is too far ahead gives NaN."""


def longest_window(dtype: torch.dtype, scale_base: float) -> int:
    """How many queries fit into one call, masked or not, with room for elements of q and k of up to 64."""
    return _window(dtype, scale_base, masked=True, room=64)


def limit_of(rotary: Any, dtype: torch.dtype, *, masked: bool) -> int:
    """The most queries in one call that are not refused: with room for elements of 1, as some parameters make them.

    `masked` says that the scores with keys ahead, which are scaled by its square, have to be finite as well, as flash
    attention adds a mask or a bias to them. Else attention replaces or skips them.
    """
    if hasattr(rotary, "max_seq_len"):
        return int(rotary.max_seq_len(dtype, is_masked=masked))
    return _window(dtype, rotary.scale_base, masked=masked, room=1)


def _window(dtype: torch.dtype, scale_base: float, *, masked: bool, room: float) -> int:
    largest = torch.finfo(dtype).max / room
    if masked:
        largest = min(largest, math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max) / room)
    growth = -math.log(float(formula.decays(MIN_DIM)[0])) / scale_base
    return 2 * int(math.log(largest) / growth) + 1


def limit_at(dim: int, scale_base: float, dtype: torch.dtype, *, masked: bool) -> int:
    """That of any model with `dim` rotated dims and this scale base."""
    return limit_of(RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base), dtype, masked=masked)


def least_scale_base(dim: int, length: int, dtype: torch.dtype, *, masked: bool) -> int:
    """The least whole scale base for which `length` queries fit into one call; the limit grows with it."""
    high = 1
    while limit_at(dim, high, dtype, masked=masked) < length:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if limit_at(dim, middle, dtype, masked=masked) >= length else (middle, high)
    return high


def table(dim: int, scale_base: float, length: int | None) -> str:
    """The limits of each dtype and, with `length`, the least scale base and the number of calls that it needs."""
    kinds = {"any": False, "masked": True}
    limits = {name: [limit_at(dim, scale_base, DTYPES[name], masked=kinds[kind]) for kind in kinds] for name in DTYPES}
    lines = [
        f"Limits of xPos with a scale base of {scale_base:g} and {dim} rotated dims (any number has the same).",
        "",
        "            queries in one call",
        _row("dtype", *kinds),
        *(_row(name, *found) for name, found in limits.items()),
    ]
    if length is not None:
        lines += [
            "",
            f"For {length:,} queries: the least whole scale base in one call, or the calls it takes at {scale_base:g}",
            _row("dtype", *kinds, "calls"),
        ]
        for name, dtype in DTYPES.items():
            bases = [least_scale_base(dim, length, dtype, masked=masked) for masked in kinds.values()]
            lines.append(_row(name, *bases, math.ceil(length / limits[name][-1])))
    return "\n".join([*lines, _EXPLANATION])


def _row(name: str, *cells: str | int) -> str:
    shown = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
    return f"{name:<12}" + "".join(f"{cell:>12}" for cell in shown)
