"""How many queries fit into one call with xPos, by dtype, and what scale base a longer one needs.

All figures are what the package itself refuses above: `RotaryEmbedding.max_seq_len`, or, where the line has none, the
same formula (see `models.limit_of`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType

import torch

from x_transformers.x_transformers import RotaryEmbedding

from . import models

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "float64": torch.float64,
    }
)
# `RotaryEmbedding` divides by `dim - 2`
MIN_DIM = 4

_FORMAT = 2


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
class Needed:
    """What it takes for a length: how many calls through the KV cache or, in one call, the least whole scale base."""

    dtype: str
    calls: int
    unmasked: int
    masked: int


def rotary(dim: int, scale_base: float) -> RotaryEmbedding:
    return RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base)


def limits(dim: int, scale_base: float) -> tuple[Limit, ...]:
    """The limits of each dtype."""
    table = rotary(dim, scale_base)
    return tuple(
        Limit(name, *(models.limit_of(table, dtype, masked=masked) for masked in (False, True)))
        for name, dtype in DTYPES.items()
    )


def needed(dim: int, scale_base: float, length: int) -> tuple[Needed, ...]:
    """What it takes for `length` queries in each dtype."""
    found = []
    for limit in limits(dim, scale_base):

        def limit_at(base: int, *, masked: bool, dtype: torch.dtype = DTYPES[limit.dtype]) -> int:
            return models.limit_of(rotary(dim, base), dtype, masked=masked)

        bases = (shortest_scale_base(length, partial(limit_at, masked=masked)) for masked in (False, True))
        found.append(Needed(limit.dtype, math.ceil(length / limit.masked), *bases))
    return tuple(found)


def shortest_scale_base(length: int, limit_of: Callable[[int], int]) -> int:
    """The least whole scale base for which `limit_of` is at least `length`; it grows with the scale base."""
    high = 1
    while limit_of(high) < length:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if limit_of(middle) >= length else (middle, high)
    return high


# text


def table(dim: int, scale_base: float, length: int | None) -> str:
    lines = [
        f"Limits of xPos with a scale base of {scale_base:g} and {dim} rotated dims (any number has the same).",
        "",
        "            queries in one call",
        f"{'dtype':<10}{'any':>14}{'masked':>12}",
        *(f"{row.dtype:<10}{row.unmasked:>14,}{row.masked:>12,}" for row in limits(dim, scale_base)),
    ]
    if length is not None:
        lines += [
            "",
            f"For {length:,} queries: the least whole scale base in one call, or the calls it takes at {scale_base:g}",
            f"{'dtype':<10}{'any':>14}{'masked':>12}{'calls':>12}",
            *(
                f"{need.dtype:<10}{need.unmasked:>14,}{need.masked:>12,}{need.calls:>12,}"
                for need in needed(dim, scale_base, length)
            ),
        ]
    return "\n".join([*lines, "", *_EXPLANATIONS])


_EXPLANATIONS = (
    "any: the scale itself is out of range above. masked: flash attention with a mask, a bias, a cache, mems",
    "or dropout, which adds to scores that have to be finite. What is in the cache or the mems does not count.",
    "",
    "One query more raises ValueError before any layer runs. Ways out: pass the sequence in chunks through the",
    "KV cache, with input_not_include_cache = True and cache_age set to the length of each chunk; compute in",
    "bfloat16 or float32; or build the model with a larger rotary_xpos_scale_base. Stay at half of a limit, as",
    "large values need room too. Positions passed in are not checked: what is too far ahead gives NaN.",
)


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
