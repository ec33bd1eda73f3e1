"""Carry a model that was trained on upstream's xPos over to this fork.

Only models with learned memory key / values (`attn_num_mem_kv`) need it. Upstream left those keys unscaled, while the
queries carried ζ ** ((m - c) / S) with c = n // 2 at sequence length n; here the keys are at position 0 and carry
ζ ** ((c - 0) / S) themselves. At the length that a model was trained at, the difference is a constant factor of each
rotated dimension, so folding it into the parameter once makes the two the same there. At other lengths they differ, and
upstream's answer is the one that changes with the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers import Attention
from x_transformers.x_transformers import AttentionLayers

from .net import rotates_neighbors

GAMMA = 0.4


@dataclass(frozen=True)
class Fold:
    """What is to be multiplied into the memory keys of one attention layer.

    `mem_k` is the parameter, `(heads, num_mem_kv, dim_head)`. `factor`, float64 `(rotated dims,)`, is that of the first
    dims of the last `num_heads` heads.
    """

    mem_k: nn.Parameter
    num_heads: int
    factor: Tensor

    def __call__(self, mem_k: Tensor) -> Tensor:
        """A folded copy of `mem_k`, in its dtype. Raises ValueError if that leaves its range."""
        folded = mem_k.clone()
        rotated = folded[-self.num_heads :, :, : len(self.factor)]
        rotated.copy_(rotated.double() * self.factor.to(mem_k.device))
        if bool(mem_k.isfinite().all()) and not bool(folded.isfinite().all()):
            name = str(mem_k.dtype).removeprefix("torch.")
            raise ValueError(
                f"memory keys times a factor of up to {float(self.factor.max()):.2g} leave the range of {name}: "
                "convert a copy of the model in float32 or bfloat16"
            )
        return folded


def folds(model: nn.Module, seq_len: int, *, context_pos: bool = False) -> list[Fold]:
    """What `fold_mem_kv_` does, one for each attention layer; arguments and errors are its own."""
    if seq_len < 1:
        raise ValueError(f"seq_len must be the length that the model was trained at, at least 1, got {seq_len}")

    found = list(_with_mem_kv(model, context_pos))
    if not found:
        raise ValueError("model has no layer with both rotary_xpos and attn_num_mem_kv: it needs no conversion")
    if any(attention.qk_norm for _, attention in found):
        raise ValueError(
            "model has attn_qk_norm, which normalises mem_k after any factor was folded into it, so there is no exact "
            "conversion: fine-tune the model on this fork, or stay with the release that it was trained on"
        )

    result = []
    for layers, attention in found:
        rotary = layers.rotary_pos_emb
        dim = 2 * rotary.inv_freq.shape[0]
        pair = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        factor = ((pair + GAMMA) / (1 + GAMMA)) ** (-(seq_len // 2) / rotary.scale_base)
        factor = factor.repeat_interleave(2) if rotates_neighbors() else factor.repeat(2)
        # 1.27.5 rotates all heads
        num_heads = getattr(attention, "rotate_num_heads", attention.heads)
        result.append(Fold(attention.mem_k, num_heads, factor))
    return result


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
    found = folds(model, seq_len, context_pos=context_pos)
    for fold, folded in [(fold, fold(fold.mem_k)) for fold in found]:
        fold.mem_k.copy_(folded)
    return len(found)


def _with_mem_kv(model: nn.Module, context_pos: bool) -> Iterator[tuple[AttentionLayers, Attention]]:
    for layers in model.modules():
        if not isinstance(layers, AttentionLayers):
            continue
        rotary = layers.rotary_pos_emb
        if rotary is None or rotary.scale is None:
            continue
        for layer_type, (_, block, _) in zip(layers.layer_types, layers.layers):
            if isinstance(block, Attention) and block.num_mem_kv > 0 and (layer_type == "a" or context_pos):
                yield layers, block
