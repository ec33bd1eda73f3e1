"""How many queries fit into one call with xPos, and what is left of a score at a distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from x_transformers.x_transformers import RotaryEmbedding

DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class Limits:
    """What `limits` returns; `str()` of it is a table. Keys are names of dtypes, or distances in positions.

    `queries` has the most queries in one call. With a `length`, `scale_bases` has the least whole scale base for that
    many queries in one call, and `calls` how many calls they take otherwise. `remaining` has the fraction of a score
    that is left at a distance: of the pair of dims that decays fastest, of the mean of all pairs, and of the slowest.
    """

    scale_base: float
    dim: int
    queries: dict[str, int]
    remaining: dict[float, tuple[float, float, float]]
    length: int | None = None
    scale_bases: dict[str, int] | None = None
    calls: dict[str, int] | None = None

    def __str__(self) -> str:
        columns = {"queries": self.queries, "scale base for all": self.scale_bases, "calls instead": self.calls}
        shown = {title: column for title, column in columns.items() if column is not None}
        counts, fractions = [["dtype", *shown]], [["distance", "fastest", "mean", "slowest"]]
        counts += [[name, *(f"{column[name]:,}" for column in shown.values())] for name in self.queries]
        fractions += [[f"{at:,.6g}", *(f"{part:.2g}" for part in parts)] for at, parts in self.remaining.items()]
        wanted = "" if self.length is None else f", and what {self.length:,} queries need"
        return _TEXT.format(_aligned(counts), _aligned(fractions), self=self, wanted=wanted)


_TEXT = """\
The most queries in one call with a scale base of {self.scale_base:g}{wanted}:

{0}

One query more raises ValueError. Keys in the KV cache or in mems do not count. Stay below half of a
limit, since large activations can overflow earlier. From half of float32's limit on, flash attention
with a mask, a bias, a cache, mems or dropout can give NaN, as it does upstream. Positions that are
passed in as a tensor are not checked.

Longer sequences: pass them in chunks with x_transformers.xpos.prefill, use bfloat16 or float32
instead of float16, or train with a larger rotary_xpos_scale_base.

The fraction of a score that is left at a distance, of {self.dim} rotated dims:

{1}"""


def _aligned(rows: list[list[str]]) -> str:
    return "\n".join(f"{first:<12}" + "".join(f"{cell:>20}" for cell in rest) for first, *rest in rows)


def limits(scale_base: float = 512, length: int | None = None, *, dim: int = 32) -> Limits:
    """How many queries one call can have with xPos in each dtype, as the package itself computes it.

    Args:
        scale_base: `rotary_xpos_scale_base` of the `Decoder`, in positions. The limits are proportional to it.
        length: a number of queries, at least 1. With it, the result has the scale base that one call of that length
            needs, and the number of calls that it takes otherwise, in chunks through the KV cache.
        dim: how many dims of a head are rotated, `rotary_emb_dim`, at least 3. The decay depends on it, limits do not.

    Returns:
        A `Limits`, which prints as a table.

    Raises:
        ValueError: an argument is out of the ranges above, or x_transformers is unpatched.

    Example:
        >>> found = limits()
        >>> found.queries["float16"], found.queries["float32"]
        (9065, 72521)
        >>> limits(length=100_000).scale_bases["float16"], limits(length=100_000).calls["float16"]
        (5649, 12)
    """
    if not (isinstance(dim, int) and dim >= 3):
        raise ValueError(f"dim is {dim}: give the number of rotated dims, a whole number from 3 on")
    if not (math.isfinite(scale_base) and scale_base > 0):
        raise ValueError(f"scale_base is {scale_base:g}: give a number above 0")
    if length is not None and not (isinstance(length, int) and length >= 1):
        raise ValueError(f"length is {length}: give a number of queries, at least 1")
    rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base)
    if not hasattr(rotary, "max_xpos_queries"):
        raise ValueError("this x_transformers is upstream's, where xPos past its limits gives NaN: install the fork")
    queries = {name: int(rotary.max_xpos_queries(dtype)) for name, dtype in DTYPES.items()}
    decays = {ratio * scale_base: rotary.scale.double() ** ratio for ratio in (0.25, 0.5, 1, 2, 4, 8)}
    remaining = {at: (float(left.min()), float(left.mean()), float(left.max())) for at, left in decays.items()}
    if length is None:
        return Limits(scale_base, dim, queries, remaining)
    bases = {name: _least_scale_base(rotary, length, dtype) for name, dtype in DTYPES.items()}
    calls = {name: math.ceil(length / most) for name, most in queries.items()}
    return Limits(scale_base, dim, queries, remaining, length, bases, calls)


def _least_scale_base(rotary: RotaryEmbedding, length: int, dtype: torch.dtype) -> int:
    # limits are proportional to the scale base, but for the rounding to a whole number
    rotary.scale_base = 1_000
    rotary.scale_base = max(1, length * 1_000 // rotary.max_xpos_queries(dtype) - 1)
    while rotary.max_xpos_queries(dtype) < length:
        rotary.scale_base += 1
    return int(rotary.scale_base)
