"""Convert memory key / values that were trained with upstream's xPos.

Upstream left memory keys unscaled, while queries carried ζ ** ((m - c) / S) with the center c = n // 2 at a sequence
length of n. The fork has memory keys at position 0, so they carry ζ ** ((c - 0) / S) themselves. At the length of
training the two differ by a constant factor of each rotated dim, which can be multiplied into the parameter once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import Attention
from x_transformers.x_transformers import AttentionLayers

from .release import is_patched

_FOLDED_FOR = "mem_kv_folded_for"


@torch.no_grad()
def fold_mem_kv_(model: nn.Module, seq_len: int, *, context_pos: bool = False) -> int:
    """Convert memory keys that were trained with upstream's xPos, in place: at `seq_len` the model answers as before.

    Only models with both `rotary_xpos` and `attn_num_mem_kv` need it. Load the checkpoint, fold once, save.

    Args:
        model: any module that contains a `Decoder`, with the weights that upstream trained.
        seq_len: the sequence length of training, in positions: tokens, memory tokens and whatever was prepended.
        context_pos: whether the model is called with `context_pos`. Memory keys of cross attention count only then.

    Returns:
        The number of attention layers that were changed.

    Raises:
        ValueError: `seq_len` is not a whole number from 1 on; the model has no memory keys with xPos; it has
            `attn_qk_norm`, which normalises memory keys after any factor; the result leaves the range of the dtype; or
            the model was folded before. The model is unchanged then.

    A fold is remembered by the module, its `copy.deepcopy` and `torch.save(model)`, but not by its state dict, which
    has the same keys as upstream's. So a second fold is not noticed after the state dict of a folded model was loaded
    into a new one: give the checkpoint that you save a name that says so.

    Example:
        >>> from x_transformers import Decoder
        >>> layers = Decoder(dim=32, depth=2, heads=2, rotary_xpos=True, attn_num_mem_kv=4)
        >>> fold_mem_kv_(layers, 1024)
        2
        >>> fold_mem_kv_(layers, 1024)
        Traceback (most recent call last):
        ValueError: the memory keys of this model were folded before, for a seq_len of 1024: ...
    """
    if not isinstance(seq_len, int) or seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: give the length that the model was trained at, at least 1")
    if not is_patched():
        raise ValueError("this x_transformers is upstream's, where memory keys stay as they are: install the fork")
    found = _with_memory_keys(model, context_pos=context_pos)
    if not found:
        raise ValueError("the model has no layer with both rotary_xpos and attn_num_mem_kv: it needs no conversion")
    if before := {getattr(attention, _FOLDED_FOR) for attention in found if hasattr(attention, _FOLDED_FOR)}:
        raise ValueError(
            f"the memory keys of this model were folded before, for a seq_len of {max(before)}: a second fold would "
            "scale them twice. To fold another checkpoint, load it into a newly built model"
        )
    if any(attention.qk_norm for attention in found):
        raise ValueError(
            "the model has attn_qk_norm, which normalises memory keys after any factor, so there is no exact "
            "conversion: fine-tune the model with the fork, or stay with upstream's release"
        )
    folded = []
    for attention, rotary in found.items():
        # the scale of position 0 in a window of `seq_len` queries
        position = torch.zeros(1, dtype=torch.long, device=rotary.scale.device)
        scale: Tensor = rotary(position, offset=0, seq_len=seq_len)[1].flatten().double()
        mem_k = attention.mem_k.clone()
        # (heads, num_mem_kv, dim_head), of which the first dims of the last heads are rotated, in 1.27.5 of all heads
        rotated = mem_k[-getattr(attention, "rotate_num_heads", attention.heads) :, :, : len(scale)]
        rotated.copy_(rotated.double() * scale.to(mem_k.device))
        if bool(attention.mem_k.isfinite().all()) and not bool(mem_k.isfinite().all()):
            raise ValueError(
                f"seq_len is {seq_len}: memory keys times a factor of up to {float(scale.max()):.2g} leave the range "
                f"of {str(mem_k.dtype)[6:]}. Convert a copy of the model in float32 or bfloat16"
            )
        folded.append(mem_k)
    for attention, mem_k in zip(found, folded):
        attention.mem_k.copy_(mem_k)
        setattr(attention, _FOLDED_FOR, seq_len)
    return len(found)


def _with_memory_keys(model: nn.Module, *, context_pos: bool) -> dict[Any, Any]:
    """The `RotaryEmbedding` of each `Attention` with memory keys that xPos applies to."""
    found = {}
    for layers in (part for part in model.modules() if isinstance(part, AttentionLayers)):
        if getattr(layers.rotary_pos_emb, "scale", None) is None:
            continue
        for layer_type, (_, block, _) in zip(layers.layer_types, layers.layers):
            if isinstance(block, Attention) and block.num_mem_kv > 0 and (layer_type == "a" or context_pos):
                found[block] = layers.rotary_pos_emb
    return found
