"""Carry a model that was trained on upstream's xPos over to this fork.

Only models with learned memory key / values (`attn_num_mem_kv`) need it. Upstream left those keys unscaled, while the
queries carried ζ ** ((m - c) / S) with c = n // 2 at sequence length n; here the keys are at position 0 and carry
ζ ** ((c - 0) / S) themselves. At the length that a model was trained at, the difference is a constant factor of each
rotated dimension, so folding it into the parameter once makes the two the same there. At other lengths they differ, and
upstream's answer is the one that changes with the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import Attention
from x_transformers.x_transformers import AttentionLayers

from . import formula
from .net import name_of, rotates_neighbors


@torch.no_grad()
def fold_mem_kv_(model: nn.Module, seq_len: int, *, context_pos: bool = False) -> int:
    """Fold the scale of `seq_len`, the length trained at, into the memory keys of `model`, in place.

    Load the checkpoint first, fold once, and save. Returns the number of attention layers that were changed.

    `seq_len` is the number of positions attended over in training, the tokens and whatever is prepended to them.
    `context_pos` says that the model is called with `context_pos`: only then do memory keys of cross attention count
    as keys at position 0.

    Raises ValueError if `seq_len` is not positive, if the model has no memory keys that xPos applies to, if the result
    leaves the range of the parameter's dtype, and for `attn_qk_norm`, which normalises the memory keys, so that no
    factor can be folded into them. Nothing is changed then.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be the length that the model was trained at, at least 1, got {seq_len}")
    found = list(with_mem_kv(model, context_pos=context_pos))
    if not found:
        raise ValueError("model has no layer with both rotary_xpos and attn_num_mem_kv: it needs no conversion")
    if any(attention.qk_norm for _, attention in found):
        raise ValueError(
            "model has attn_qk_norm, which normalises mem_k after any factor was folded into it, so there is no exact "
            "conversion: fine-tune the model on this fork, or stay with the release that it was trained on"
        )
    folded = [_folded(attention, factor(rotary, seq_len)) for rotary, attention in found]
    for (_, attention), mem_k in zip(found, folded):
        attention.mem_k.copy_(mem_k)
    return len(found)


def with_mem_kv(model: nn.Module, *, context_pos: bool = False) -> Iterator[tuple[Any, Any]]:
    """The `RotaryEmbedding` and the attention of each layer with memory keys that xPos applies to."""
    layers: Any
    for layers in model.modules():
        rotary = layers.rotary_pos_emb if isinstance(layers, AttentionLayers) else None
        if rotary is None or rotary.scale is None:
            continue
        for layer_type, (_, block, _) in zip(layers.layer_types, layers.layers):
            if isinstance(block, Attention) and block.num_mem_kv > 0 and (layer_type == "a" or context_pos):
                yield rotary, block


def factor(rotary: Any, seq_len: int) -> Tensor:
    """What each rotated dim of a memory key is multiplied by, float64 `(rotated dims,)`."""
    of_pairs: Tensor = formula.decays(2 * rotary.inv_freq.shape[0]) ** (-(seq_len // 2) / rotary.scale_base)
    return of_pairs.repeat_interleave(2) if rotates_neighbors() else of_pairs.repeat(2)


def _folded(attention: Any, factor: Tensor) -> Tensor:
    """A copy of the memory keys `(heads, num_mem_kv, dim_head)` with the first dims of the rotated heads scaled."""
    mem_k: Tensor = attention.mem_k
    folded = mem_k.clone()
    # 1.27.5 rotates all heads
    rotated = folded[-getattr(attention, "rotate_num_heads", attention.heads) :, :, : len(factor)]
    rotated.copy_(rotated.double() * factor.to(mem_k.device))
    if bool(mem_k.isfinite().all()) and not bool(folded.isfinite().all()):
        raise ValueError(
            f"memory keys times a factor of up to {float(factor.max()):.2g} leave the range of "
            f"{name_of(mem_k.dtype)}: convert a copy of the model in float32 or bfloat16"
        )
    return folded
