"""How many queries fit into one call with xPos, by dtype, what scale base a longer one needs, and what it leaves.

The center is in the middle of the queries, so q and k are scaled by up to (1 / ζ_0) ** (length // 2 / S), where ζ_0 is
0.4 / 1.4 whatever the number of rotated dims is. What does not fit is refused by the package, by the same formula.
"""

from __future__ import annotations

import math

import torch

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
KV cache, as x_transformers.xpos.prefill does; compute in bfloat16 or float32; or train with a larger
rotary_xpos_scale_base. Stay at half of a limit, as large values need room too. Positions passed in are
not checked: what is too far ahead gives NaN."""


def limit(scale_base: float, dtype: torch.dtype, *, masked: bool, room: float = 1) -> int:
    """The most queries in one call with room for elements of q and k of this size: of 1, as the package refuses more.

    `masked` says that the scores with keys ahead, which are scaled by its square, have to be finite as well, as flash
    attention adds a mask or a bias to them. Else attention replaces or skips them.
    """
    largest = torch.finfo(dtype).max / room
    if masked:
        largest = min(largest, torch.finfo(torch.promote_types(dtype, torch.float32)).max ** 0.5 / room)
    return 2 * int(scale_base * math.log(largest) / math.log(1.4 / 0.4)) + 1


def longest_window(dtype: torch.dtype, scale_base: float) -> int:
    """How many queries fit into one call, masked or not, with room for elements of q and k of up to 64."""
    return limit(scale_base, dtype, masked=True, room=64)


def least_scale_base(length: int, dtype: torch.dtype, *, masked: bool) -> int:
    """The least whole scale base for which `length` queries fit into one call; the limit is proportional to it."""
    base = max(1, length * 1_000 // limit(1_000, dtype, masked=masked) - 1)
    while limit(base, dtype, masked=masked) < length:
        base += 1
    return base


def table(dim: int, scale_base: float, length: int | None) -> str:
    """The limits of each dtype and, with `length`, the least scale base and the number of calls that it needs."""
    limits, needed = [], []
    for name, dtype in DTYPES.items():
        found = [limit(scale_base, dtype, masked=masked) for masked in (False, True)]
        limits.append(_row(name, *found))
        if length is not None:
            bases = [least_scale_base(length, dtype, masked=masked) for masked in (False, True)]
            needed.append(_row(name, *bases, math.ceil(length / found[1])))
    lines = [
        f"Limits of xPos with a scale base of {scale_base:g} and {dim} rotated dims.",
        "",
        "            queries in one call",
        _row("dtype", "any", "masked"),
        *limits,
    ]
    if length is not None:
        lines += [
            "",
            f"For {length:,} queries: the least whole scale base in one call, or the calls it takes at {scale_base:g}",
            _row("dtype", "any", "masked", "calls"),
            *needed,
        ]
    return "\n".join([*lines, _EXPLANATION, "", "What is left of a score at a distance:", fading(dim, scale_base)])


def fading(dim: int, scale_base: float) -> str:
    """What is left of a score at a distance, of the part from the pair of dims that fades fastest, slowest, of all."""
    lines = [_row("distance", "fastest", "mean", "slowest")]
    for ratio in (0.25, 0.5, 1, 2, 4, 8):
        left = formula.decays(dim) ** ratio
        lines.append(
            _row(f"{ratio * scale_base:,.6g}", *(f"{part:.2g}" for part in (left.min(), left.mean(), left.max())))
        )
    return "\n".join(lines)


def _row(name: str, *cells: str | int) -> str:
    shown = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
    return f"{name:<12}" + "".join(f"{cell:>12}" for cell in shown)
