"""The check's own models, which it runs where it is given none: small language models, bytes in and logits out.

The models are not trained. Trained weights would hide less than these do: whatever an initialisation makes zero or one
is made random, and queries and keys are large enough that attention is far from uniform, so that a wrong score shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import Decoder, TransformerWrapper
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import LayerIntermediates

from ..release import rotated_pairs_first
from . import formula
from .models import SEED, Model, Text
from .runs import ROWS, Case

DIM = 128
HEADS = 4
DIM_HEAD = 64
# half of each head, the library's own default: partial rotation is part of what is checked
ROTARY_DIM = DIM_HEAD // 2

# the standard deviation of a score is about the square of this, so one key in some hundred gets most of a softmax
_QUERY_KEY_STD = 1.5
_ANY = 2**31


def texts(max_len: int) -> Text:
    """`ROWS` texts of `max_len` bytes from the topics of Python's own help, each from another place on."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some Pythons have none
        topics = {"": "xPos is the same at every length. "}
    content = "\n".join(topics[name] for name in sorted(topics)).encode()
    text = torch.tensor(list((content * (max_len // len(content) + 1))[:max_len]))
    return Text(torch.stack([text.roll(-row * max_len // ROWS) for row in range(ROWS)]))


def variant(case: Case, length: int = _ANY, dtype: torch.dtype | None = None, **options: Any) -> Case:
    """The same texts, or less of them, and a model with these options of `build`, in the same or another dtype."""
    dtype = dtype or case.model.dtype
    return Case(
        Model(build(**options).module.to(case.model.device, dtype)), case.texts.part(0, min(length, case.max_len))
    )


def build(*, flash: bool = True, depth: int = 2, **options: Any) -> Model:
    """A byte-level `TransformerWrapper` in eval mode, float32 on the CPU; tokens (b, n) to logits (b, n, 256).

    `flash=False` keeps the scores, which `scaled_dot_product_attention` does not give out. `options` are further ones
    of `Decoder`. The same arguments give the same weights, and torch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        sizes = {"dim": DIM, "depth": depth, "heads": HEADS, "attn_dim_head": DIM_HEAD, "rotary_emb_dim": ROTARY_DIM}
        layers = Decoder(**sizes, attn_flash=flash, rotary_xpos=True, **options)
        # neither limits anything
        unlimited = {"max_seq_len": _ANY, "max_mem_len": _ANY, "use_abs_pos_emb": False}
        model = Model(TransformerWrapper(num_tokens=256, **unlimited, attn_layers=layers).eval())
        with torch.no_grad():
            _randomise(model)
    return model


def _randomise(model: Model) -> None:
    for parameter in model.module.parameters():
        if bool(((parameter == 0) | (parameter == 1)).all()):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for attention in model.attentions:
        # values as large as the embedding or larger, else the residual stream drowns what attention gives
        for name, std in (("to_q", _QUERY_KEY_STD), ("to_k", _QUERY_KEY_STD), ("to_v", 1), ("to_out", 1)):
            projection = getattr(attention, name)
            projection.weight.normal_(std=std * projection.in_features**-0.5)


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
    softmax gets, before the causal mask. An error is relative to the largest sum of the terms' sizes of its query. All
    other rows are let go of at once: `n * n` scores per layer would be what the memory is spent on.
    """
    queries: list[Tensor] = []
    scores: list[Tensor] = []

    def note_queries(_module: nn.Module, _args: object, q: Tensor) -> None:
        queries.append(q[0, rows].unflatten(-1, (HEADS, DIM_HEAD)).transpose(0, 1))

    def note_scores(_module: nn.Module, _args: object, output: Any) -> None:
        found = output[1]
        scores.append(found.qk_similarities[0, :, rows])
        found.qk_similarities = found.pre_softmax_attn = found.post_softmax_attn = None

    handles = [attention.to_q.register_forward_hook(note_queries) for attention in model.attentions]
    handles += [attention.attend.register_forward_hook(note_scores) for attention in model.attentions]
    try:
        cache = call()
    finally:
        for handle in handles:
            handle.remove()
    errors, query_pos = [], query_pos.cpu()
    for of_layer, found, layer in zip(queries, scores, cache.attn_intermediates):
        # keys before the rotation
        q, k = (rotated_pairs_first(t, ROTARY_DIM) for t in (of_layer, layer.cached_kv[0][0]))
        exact, size = formula.scores(q, k, query_pos, key_pos, rotary_dim=ROTARY_DIM)
        met = query_pos[:, None] >= key_pos
        error = (found.detach().cpu().double() * DIM_HEAD**0.5 - exact).abs()
        error = (error / size.where(met, 0.0).amax(dim=-1, keepdim=True))[:, met]
        errors.append(float(error.max()) if bool(error.isfinite().all()) else float("inf"))
    return errors
