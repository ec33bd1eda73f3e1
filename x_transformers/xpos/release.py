"""What the installed x_transformers has, as far as the lines 2.x and 1.27.x and the unpatched releases differ."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import x_transformers
from x_transformers.x_transformers import AttentionLayers, RotaryEmbedding, rotate_half


def is_patched() -> bool:
    """Whether `RotaryEmbedding.forward` takes `seq_len`, the number of queries, which upstream's does not."""
    return "seq_len" in inspect.signature(RotaryEmbedding.forward).parameters


def accepts(argument: str) -> bool:
    """Whether `AttentionLayers.forward` has the argument; 1.27.5 lacks some."""
    return argument in inspect.signature(AttentionLayers.forward).parameters


# whether the tokens in the cache can be left out of a call; 1.27.5 wants them passed again
CACHED_TOKENS_LEFT_OUT = accepts("input_not_include_cache")
# whether dims 2d and 2d + 1 are rotated together, as in 2.x, or d and d + dim / 2, as in 1.27.5
NEIGHBORS_ROTATE = bool(rotate_half(torch.arange(4))[0] == -1)
# the wrappers whose layers are their `attn_layers`; 1.27.5 lacks the last
WRAPPERS: tuple[Any, ...] = tuple(
    getattr(x_transformers, name)
    for name in ("TransformerWrapper", "ContinuousTransformerWrapper", "MultiInputTransformerWrapper")
    if hasattr(x_transformers, name)
)


def rotated_pairs_first(t: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """`t` (..., dim_head), unrotated, with the dims that are rotated together beside each other."""
    if NEIGHBORS_ROTATE:
        return t
    halves = t[..., :rotary_dim].unflatten(-1, (2, -1))
    return torch.cat((halves.mT.flatten(-2), t[..., rotary_dim:]), dim=-1)


def plain_angles(angle: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | float]:
    """What `RotaryEmbedding.forward` gives without xPos for float64 angles (n, pairs) or (b, n, pairs), and the scale.

    1.27.5 has no batch of angles. It computes in their dtype, and brings what is scaled by a tensor back to that of the
    model, which is `dtype`.
    """
    if NEIGHBORS_ROTATE:
        angle = angle.repeat_interleave(2, dim=-1)
        return angle[None] if angle.ndim == 2 else angle, 1.0
    angle = torch.cat((angle, angle), dim=-1).remainder(2 * torch.pi)
    angle = angle.to(torch.promote_types(dtype, torch.float32))
    return angle, torch.ones_like(angle)
