"""The small language models that the check runs: bytes in, logits out, xPos or no positions at all.

They are not trained. Trained weights would hide less than these do: whatever an initialisation makes zero or one is
made random, and queries and keys are large enough that attention is far from uniform, so that a wrong score shows.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import Attention, Decoder, TransformerWrapper
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import AttentionLayers, LayerIntermediates, RotaryEmbedding, rotate_half

from . import formula

DIM = 128
DEPTH = 2
HEADS = 4
DIM_HEAD = 64
# Half of each head, the library's own default: partial rotation is part of what is checked.
ROTARY_DIM = DIM_HEAD // 2
NUM_TOKENS = 256
SEED = 0
SUMMARY = f"{DEPTH} layers, {HEADS} heads of {DIM_HEAD} dims, {ROTARY_DIM} rotated"

# Standard deviation of a score is about the square of this, so one key in some hundred gets most of a softmax.
_QUERY_KEY_STD = 1.5
# What an element of q or k may reach before it is scaled.
_ROOM = 64


def accepts(argument: str) -> bool:
    """Whether this release of upstream has an argument of `AttentionLayers.forward`; 1.27.5 lacks some."""
    return argument in inspect.signature(AttentionLayers.forward).parameters


def build(
    max_len: int, *, xpos: bool = True, flash: bool = True, depth: int = DEPTH, seed: int = SEED, **options: Any
) -> nn.Module:
    """A byte-level `TransformerWrapper` in eval mode, float32 on the CPU; tokens `(b, n)` to logits `(b, n, 256)`.

    `xpos=False` is the same model with the same weights and no positions of any kind. `flash=False` keeps the scores,
    which `scaled_dot_product_attention` does not give out. `max_len` is the longest text, context included. `options`
    are further ones of `Decoder`. The same arguments give the same weights, and torch's global random state is left as
    it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = TransformerWrapper(
            num_tokens=NUM_TOKENS,
            max_seq_len=max_len,
            max_mem_len=max_len,
            use_abs_pos_emb=False,
            attn_layers=Decoder(
                dim=DIM,
                depth=depth,
                heads=HEADS,
                attn_dim_head=DIM_HEAD,
                attn_flash=flash,
                rotary_xpos=xpos,
                rotary_emb_dim=ROTARY_DIM,
                **options,
            ),
        )
        _randomise(net)
    net.eval()
    return net


def as_float64(net: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `net` that holds the same, already rounded, weights and computes in float64."""
    return copy.deepcopy(net).to(reference_device(device)).double()


def reference_device(device: torch.device) -> torch.device:
    """Where float64 can be had for a model on `device`."""
    return torch.device("cpu") if device.type == "mps" else device


def longest_window(dtype: torch.dtype, scale_base: float = formula.SCALE_BASE, *, masked: bool = False) -> int:
    """How many queries fit into one call with room for elements of up to 64, when the decay is split between q and k.

    The center is in the middle of the queries, so q and k are scaled by up to (1 / ζ_0) ** (window // 2 / S). `masked`
    says that the scores with keys ahead, which are scaled by its square, have to be finite as well.
    """
    return _window(dtype, scale_base, masked=masked, room=_ROOM)


def rotary_of(net: nn.Module) -> Any:
    return next(module for module in net.modules() if isinstance(module, RotaryEmbedding))


def limit_of(rotary: Any, dtype: torch.dtype, *, masked: bool) -> int:
    """How many queries in one call are not refused: with room for elements of 1, as some parameters make them."""
    if hasattr(rotary, "max_seq_len"):
        return int(rotary.max_seq_len(dtype, is_masked=masked))
    return _window(dtype, rotary.scale_base, masked=masked, room=1)


def _window(dtype: torch.dtype, scale_base: float, *, masked: bool, room: float) -> int:
    largest = torch.finfo(dtype).max / room
    if masked:
        largest = min(largest, math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max) / room)
    growth = -math.log(float(formula.decays(ROTARY_DIM)[0])) / scale_base
    return 2 * int(math.log(largest) / growth) + 1


def random_cache(length: int, depth: int, device: torch.device, dtype: torch.dtype) -> LayerIntermediates:
    """A KV cache of `length` unit-normal keys and values in each layer, as if that many tokens had been decoded."""
    generator = torch.Generator().manual_seed(SEED)

    def normal() -> Tensor:
        return torch.randn(1, HEADS, length, DIM_HEAD, generator=generator).to(device, dtype)

    layers = [Intermediates(cached_kv=(normal(), normal())) for _ in range(depth)]
    cache = LayerIntermediates(attn_intermediates=layers)
    # set rather than passed: 1.27.5 knows neither
    cache.cache_length = length
    for layer in layers:
        layer.layer_type = "a"
    return cache


def rotates_neighbors() -> bool:
    """Whether the dims 2d and 2d + 1 are rotated together, as in 2.x, and not d and d + dim / 2, as in 1.27.5."""
    return bool(rotate_half(torch.arange(4))[0] == -1)


def in_pairs(t: Tensor) -> Tensor:
    """Unrotated queries or keys `(..., DIM_HEAD)` with the dims that are rotated together beside each other."""
    if rotates_neighbors():
        return t
    halves = t[..., :ROTARY_DIM].unflatten(-1, (2, -1))
    return torch.cat((halves.transpose(-1, -2).flatten(-2), t[..., ROTARY_DIM:]), dim=-1)


@dataclass
class Observed:
    """What one layer computed: queries before and after rotation `(heads, i, dim_head)`, scores `(heads, i, j)`.

    `rotated_keys` `(heads, j, dim_head)` are those that the queries met.
    """

    queries: Tensor = field(default_factory=lambda: torch.empty(0))
    rotated_queries: Tensor = field(default_factory=lambda: torch.empty(0))
    rotated_keys: Tensor = field(default_factory=lambda: torch.empty(0))
    scores: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def observe(net: nn.Module, rows: Tensor) -> Iterator[list[Observed]]:
    """While open, each layer of a model built with `flash=False` notes the given rows of its queries and scores.

    The list is filled by the next call, with a batch of one. The scores are those that the softmax gets, before the
    causal mask. All other rows are let go of at once: `n * n` scores per layer would be what the memory is spent on.
    """
    seen: list[Observed] = []
    handles = []
    for attention in (module for module in net.modules() if isinstance(module, Attention)):
        layer = Observed()
        seen.append(layer)

        def note_queries(_module: nn.Module, _args: object, q: Tensor, layer: Observed = layer) -> None:
            layer.queries = q[0, rows].unflatten(-1, (HEADS, DIM_HEAD)).transpose(0, 1)

        def note_scores(
            _module: nn.Module,
            args: tuple[Tensor, ...],
            output: tuple[Tensor, Intermediates],
            layer: Observed = layer,
        ) -> None:
            intermediates = output[1]
            layer.rotated_queries, layer.rotated_keys = args[0][0, :, rows], args[1][0]
            layer.scores = intermediates.qk_similarities[0, :, rows]
            intermediates.qk_similarities = intermediates.pre_softmax_attn = intermediates.post_softmax_attn = None

        handles.append(attention.to_q.register_forward_hook(note_queries))
        handles.append(attention.attend.register_forward_hook(note_scores))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _randomise(net: nn.Module) -> None:
    for parameter in net.parameters():
        if bool(((parameter == 0) | (parameter == 1)).all()):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for attention in (module for module in net.modules() if isinstance(module, Attention)):
        for projection, std in ((attention.to_q, _QUERY_KEY_STD), (attention.to_k, _QUERY_KEY_STD)):
            projection.weight.normal_(std=std * projection.in_features**-0.5)
        # as large as the embedding or larger, else the residual stream drowns what attention gives
        for projection in (attention.to_v, attention.to_out):
            projection.weight.normal_(std=projection.in_features**-0.5)
