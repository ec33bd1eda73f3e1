"""The check's own models, which it runs where it is given none: small language models, tokens in and logits out.

The models are not trained. Trained weights would hide less than these do: whatever an initialisation makes zero or one
is made random, and queries and keys are large enough that attention is far from uniform, so that a wrong score shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import LayerIntermediates

from ..release import rotated_pairs_first
from . import formula
from .models import SEED, Model
from .runs import Case

DIM = 128
HEADS = 4
DIM_HEAD = 64
# half of each head, the library's own default: partial rotation is part of what is checked
ROTARY_DIM = DIM_HEAD // 2

# of parameters: the standard deviation of a score is about the square of that of queries and keys, so one key in some
# hundred gets most of a softmax; values are as large as the embedding, else the residual stream drowns attention
_STD = {"to_q": 1.5, "to_k": 1.5, "to_v": 1.0, "to_out": 1.0}


def variant(case: Case, length: int = 2**31, dtype: torch.dtype | None = None, **options: Any) -> Case:
    """The same texts, or less of them, and a model with these options of `build`, in the same or another dtype."""
    model = build(**options).module.to(case.model.device, dtype or case.model.dtype)
    return Case(Model(model), case.texts.part(0, length))


def build(*, flash: bool = True, depth: int = 2, **options: Any) -> Model:
    """A `TransformerWrapper` in eval mode, float32 on the CPU; tokens (b, n) of 256 kinds to logits (b, n, 256).

    `flash=False` keeps the scores, which `scaled_dot_product_attention` does not give out. `options` are further ones
    of `Decoder`. The same arguments give the same weights.
    """
    torch.manual_seed(SEED)
    sizes = {"dim": DIM, "depth": depth, "heads": HEADS, "attn_dim_head": DIM_HEAD, "rotary_emb_dim": ROTARY_DIM}
    layers = Decoder(**sizes, attn_flash=flash, rotary_xpos=True, **options)
    # neither limits anything
    unlimited = {"max_seq_len": 2**31, "max_mem_len": 2**31, "use_abs_pos_emb": False}
    model = TransformerWrapper(num_tokens=256, **unlimited, attn_layers=layers).eval()
    for name, parameter in model.named_parameters():
        std = _STD.get(name.split(".")[-2])
        if std is not None:
            parameter.data.normal_(std=std * parameter.shape[-1] ** -0.5)
        elif bool(((parameter == 0) | (parameter == 1)).all()):
            parameter.data += torch.randn_like(parameter) * 0.2
    return Model(model)


def random_cache(length: int, model: Model) -> LayerIntermediates:
    """A KV cache of `length` unit-normal keys and values for one layer, as if that many tokens had been decoded."""
    generator = torch.Generator().manual_seed(SEED)
    keys, values = torch.randn(2, 1, HEADS, length, DIM_HEAD, generator=generator).to(model.device, model.dtype)
    layer = Intermediates(cached_kv=(keys, values))
    cache = LayerIntermediates(attn_intermediates=[layer])
    # set rather than passed: 1.27.5 knows neither
    cache.cache_length, layer.layer_type = length, "a"
    return cache


def score_errors(
    model: Model, rows: Tensor, call: Callable[[], LayerIntermediates], query_pos: Tensor, key_pos: Tensor
) -> list[float]:
    """How far the scores of a call are from the formula, in each layer of a model that was built with `flash=False`.

    Compared are the queries at `rows`, with positions `query_pos`, of a batch of one. The scores are those that the
    softmax gets, before the causal mask. An error is relative to the largest sum of the terms' sizes of its query.
    """
    queries: list[Tensor] = []

    def note(attention: Any, args: Any, returned: Any) -> None:
        queries.append(attention.to_q(args[0])[0, rows].unflatten(-1, (HEADS, DIM_HEAD)).transpose(0, 1))
        # whole matrices of every layer can take gigabytes
        returned[1].qk_similarities = returned[1].qk_similarities[0, :, rows]
        returned[1].pre_softmax_attn = returned[1].post_softmax_attn = None

    with ExitStack() as hooks:
        for attention in model.attentions:
            hooks.enter_context(attention.register_forward_hook(note))
        cache = call()
    errors, query_pos = [], query_pos.cpu()
    for of_layer, layer in zip(queries, cache.attn_intermediates):
        # keys before the rotation
        q, k = (rotated_pairs_first(t, ROTARY_DIM) for t in (of_layer, layer.cached_kv[0][0]))
        exact, size = formula.scores(q, k, query_pos, key_pos, rotary_dim=ROTARY_DIM)
        met = query_pos[:, None] >= key_pos
        error = (layer.qk_similarities.detach().cpu().double() * DIM_HEAD**0.5 - exact).abs()
        error = (error / size.where(met, 0.0).amax(dim=-1, keepdim=True))[:, met]
        errors.append(float(error.max()) if bool(error.isfinite().all()) else float("inf"))
    return errors
