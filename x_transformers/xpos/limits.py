"""How many queries fit into one call with xPos, by dtype, and what scale base a longer one needs.

All figures are what the package itself refuses at: `RotaryEmbedding.max_seq_len`, or, where the line has none, the same
formula (see `models.longest_window`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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

_FORMAT = 1


@dataclass(frozen=True)
class Limit:
    """The most queries in one call: by what the call needs, and None for what the release has no argument for.

    - `unmasked`: flash attention with nothing to add to the scores, which never looks at the keys ahead
    - `masked`: all else; scores with keys ahead are computed, in float32 or wider, and have to be finite
    - `context`: positions of a context, and no flash attention, whose scores are in the dtype itself

    `pos_ahead` and `context_ahead` are how far positions that are passed in may be ahead of the center of the window,
    `offset + seq_len // 2`, of the queries; behind it there is no limit.
    """

    dtype: str
    unmasked: int
    masked: int
    context: int | None
    pos_ahead: int | None
    context_ahead: int | None


@dataclass(frozen=True)
class Needed:
    """What it takes for a length: how many calls through the KV cache or, in one call, the least whole scale base."""

    dtype: str
    calls: int
    unmasked: int
    masked: int
    context: int | None


def rotary(dim: int, scale_base: float) -> RotaryEmbedding:
    return RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base)


def limits(dim: int, scale_base: float) -> tuple[Limit, ...]:
    """The limits of each dtype."""
    table = rotary(dim, scale_base)
    found = []
    for name, dtype in DTYPES.items():
        masked = models.longest_window_of(table, dtype, masked=True)
        context = _of_context(table, dtype)
        found.append(
            Limit(
                name,
                models.longest_window_of(table, dtype, masked=not hasattr(table, "max_seq_len")),
                masked,
                context,
                masked // 2 if models.accepts("pos") else None,
                context // 2 if context is not None else None,
            )
        )
    return tuple(found)


def _of_context(table: RotaryEmbedding, dtype: torch.dtype) -> int | None:
    if not models.accepts("context_pos"):
        return None
    return models.longest_window_of(table, dtype, masked=True, score_dtype=dtype)


def needed(dim: int, scale_base: float, length: int) -> tuple[Needed, ...]:
    """What it takes for `length` queries in each dtype."""
    found = []
    for limit in limits(dim, scale_base):
        dtype = DTYPES[limit.dtype]

        def masked(base: int, dtype: torch.dtype = dtype) -> int:
            return models.longest_window_of(rotary(dim, base), dtype, masked=True)

        def unmasked(base: int, dtype: torch.dtype = dtype) -> int:
            table = rotary(dim, base)
            return models.longest_window_of(table, dtype, masked=not hasattr(table, "max_seq_len"))

        def context(base: int, dtype: torch.dtype = dtype) -> int:
            return _of_context(rotary(dim, base), dtype) or 0

        found.append(
            Needed(
                limit.dtype,
                math.ceil(length / limit.masked) if limit.masked else 0,
                shortest_scale_base(length, unmasked),
                shortest_scale_base(length, masked),
                shortest_scale_base(length, context) if limit.context is not None else None,
            )
        )
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
    rows = limits(dim, scale_base)
    lines = [
        f"Limits of xPos with a scale base of {scale_base:g} and {dim} rotated dims (any number has the same).",
        "",
        "            queries in one call                      ahead of the center",
        "dtype       nothing masked      masked     context         pos     context",
    ]
    for row in rows:
        lines.append(_row(row.dtype, 14, (row.unmasked, row.masked, row.context, row.pos_ahead, row.context_ahead)))
    if length is not None:
        lines += [
            "",
            f"For {length:,} queries: the least whole scale base in one call, or the calls it takes at {scale_base:g}",
            "dtype       nothing masked      masked     context       calls",
        ]
        for need in needed(dim, scale_base, length):
            # at a scale base so short that no query fits, no number of calls will do
            lines.append(_row(need.dtype, 14, (need.unmasked, need.masked, need.context, need.calls or None)))
    return "\n".join([*lines, "", *_EXPLANATIONS])


def _row(name: str, width: int, values: Sequence[int | None]) -> str:
    cells = ["-" if value is None else f"{value:,}" for value in values]
    return f"{name:<10}  {cells[0]:>{width}}" + "".join(f"{cell:>12}" for cell in cells[1:])


_EXPLANATIONS = (
    "nothing masked: flash attention with no mask, bias, cache, mems, dropout or positions of your own.",
    "masked: all else. context: with context_pos and without flash attention; with it as masked.",
    "ahead of the center: how far pos and context_pos may be from offset + seq_len // 2 of the queries;",
    "behind it there is no limit, and none on how much is in the cache or the mems.",
    "",
    "One query more raises ValueError before any layer runs. Ways out: pass the sequence in chunks through",
    "the KV cache, compute in bfloat16 or float32, or build the model with a larger rotary_xpos_scale_base.",
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
