"""Hypothesis strategies, named for what they generate. All shrink towards the smallest case."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Module

from x_transformers import Attention, Decoder, TransformerWrapper
from x_transformers.xpos.release import CACHED_TOKENS_LEFT_OUT

IS_OLDER = not CACHED_TOKENS_LEFT_OUT
SIZES_ROTATED = (32, 48) if IS_OLDER else (4, 8, 16)
NUM_TOKENS = 32
MAX_SEQ_LEN = 256

# of a small decoder, part of each head rotated; the older line rotates at least 32 dims, and has fewer arguments
SMALL: dict[str, Any] = dict(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_emb_dim=6, verbose=False)
if IS_OLDER:
    SMALL = dict(dim=16, depth=2, heads=4, attn_dim_head=48, rotary_emb_dim=32)
OPTIONS: dict[str, Any] = {**SMALL, "rotary_xpos": True, "rotary_xpos_scale_base": 32}

seeds = st.integers(0, 2**16)

# for what is run for every case of a table, or takes a model many calls
few = settings(max_examples=max(settings().max_examples // 4, 10))

# distances that positions are moved by: small ones, and far beyond any context
shifts = st.one_of(st.integers(1, 64), st.integers(1, 1_000_000))


def tokens(seed: int, batch: int, seq_len: int) -> Tensor:
    """(batch, seq_len) token ids."""
    return torch.randint(0, NUM_TOKENS, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def randomize_(module: Module, seed: int) -> Module:
    """Draws every parameter anew, since one that starts at zero or one would hide what multiplies it.

    Matrices keep the variance of their input, doubled so that attention is far from uniform.
    """
    generator = torch.Generator().manual_seed(seed)

    with torch.no_grad():
        for param in module.parameters():
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            fan_in = param.shape[-1] if param.ndim > 1 else 4
            param.copy_(noise * (2 / fan_in) ** 0.5)

    return module


@st.composite
def splits(draw: st.DrawFn, min_len: int = 2, max_len: int = 40) -> list[int]:
    """Lengths of consecutive chunks, at least two, each at least 1."""
    total = draw(st.integers(min_len, max_len))
    cuts = draw(st.sets(st.integers(1, total - 1), min_size=1, max_size=min(5, total - 1)))
    edges = [0, *sorted(cuts), total]
    return [b - a for a, b in zip(edges, edges[1:])]


# the default softmax of `Attend` works in float32, which would put a floor under what float64 can tell
softmax = partial(torch.softmax, dim=-1)


@st.composite
def decoder_options(draw: st.DrawFn, flash: bool | None = None, max_mem_kv: int = 0) -> dict[str, Any]:
    """Keyword arguments of a small `Decoder` with xPos.

    The scale base goes down to 4, where a few dozen positions decay as much as thousands do at 512.
    """
    dim_head = draw(st.sampled_from([32, 48] if IS_OLDER else [8, 16]))
    heads = draw(st.sampled_from([2, 4]))
    flash = draw(st.booleans()) if flash is None else flash

    options: dict[str, Any] = dict(
        dim=draw(st.sampled_from([8, 16])),
        depth=draw(st.integers(1, 3)),
        heads=heads,
        attn_dim_head=dim_head,
        attn_kv_heads=draw(st.sampled_from([h for h in (1, 2, 4) if h <= heads])),
        attn_num_mem_kv=draw(st.integers(0, max_mem_kv)),
        attn_qk_norm=draw(st.booleans()),
        attn_flash=flash,
        attn_custom_attn_fn=None if flash else softmax,
        rotary_xpos=True,
        rotary_emb_dim=draw(st.sampled_from([d for d in SIZES_ROTATED if d <= dim_head])),
        rotary_xpos_scale_base=draw(st.sampled_from([4, 32, 512])),
        rotary_interpolation_factor=draw(st.sampled_from([1.0, 2.5])),
        rotary_base_rescale_factor=draw(st.sampled_from([1.0, 4.0])),
        verbose=False,
    )
    if IS_OLDER:
        del options["verbose"], options["attn_custom_attn_fn"]
        if options["attn_num_mem_kv"]:  # it has as many of them as there are heads of queries
            options["attn_kv_heads"] = heads
        elif flash:  # with one key head it takes no more keys than queries, with any positions
            options["attn_kv_heads"] = max(2, options["attn_kv_heads"])
    return options


def exact(model: Any) -> Any:
    """The model; of the older line, which takes no function for it, with a softmax that does not go through float32."""
    for attention in (module for module in model.modules() if IS_OLDER and isinstance(module, Attention)):
        attention.attend.attn_fn = softmax
    return model


def build(
    options: dict[str, Any], seed: int, dtype: torch.dtype = torch.float64, **wrapper_options: Any
) -> TransformerWrapper:
    """A randomised language model in eval mode.

    In float64 by default: there rounding is so far below any error of the mathematics that the two
    cannot be mistaken for each other.
    """
    model = TransformerWrapper(
        num_tokens=NUM_TOKENS,
        max_seq_len=MAX_SEQ_LEN,
        attn_layers=Decoder(**options),
        **wrapper_options,
    )
    model = randomize_(exact(model).double(), seed).to(dtype).eval()
    return model.requires_grad_(False)


def gradients(model: Module, out: Tensor) -> list[Tensor]:
    """Of the sum of the squares of an output, by every parameter."""
    parameters = list(model.parameters())
    return [*torch.autograd.grad(out.square().sum(), parameters, allow_unused=True, materialize_grads=True)]
