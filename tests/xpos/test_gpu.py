"""On a GPU: a model captured as a CUDA graph, and one that trains under autocast. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import build, decoder_options, few, gradients, seeds, tokens
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# rounding of float64 through three layers, relative to outputs of about 1; a replay may use another workspace
TOLERANCE = 1e-12


def step(model: Any, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
    return model(x, cache=cache, input_not_include_cache=True, return_intermediates=True)


@few
@given(decoder_options(), seeds, st.integers(1, 40), st.integers(0, 3))
@torch.no_grad()
def test_a_step_that_is_replayed_gives_what_it_gives_eagerly(
    options: dict[str, Any], seed: int, seq_len: int, steps: int
) -> None:
    """From the cache of a prompt or of some steps, before and after others have gone on from it."""
    model = build(options, seed).cuda()
    x, new = (tokens(seed + i, 2, n).cuda() for i, n in enumerate((seq_len, steps + 2)))
    _, cache = model(x, return_intermediates=True)
    for i in range(steps):
        _, cache = step(model, new[:, i, None], cache)
    token = new[:, steps, None].clone()
    step(model, token, model(x, return_intermediates=True)[1])  # what cuBLAS does once is not captured

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed, replayed_cache = step(model, token, cache)
    for i in (steps, steps + 1):
        token.copy_(new[:, i, None])
        graph.replay()
        eager, eager_cache = step(model, token, cache)
        torch.testing.assert_close(replayed, eager, atol=TOLERANCE, rtol=0)
        for ours, theirs in zip(replayed_cache.attn_intermediates, eager_cache.attn_intermediates):
            for kv, expected in zip(ours.cached_kv, theirs.cached_kv):
                torch.testing.assert_close(kv, expected, atol=TOLERANCE, rtol=0)


@few
@given(decoder_options(), seeds, st.integers(1, 40))
@torch.no_grad()
def test_a_forward_that_is_replayed_gives_what_it_gives_eagerly(
    options: dict[str, Any], seed: int, seq_len: int
) -> None:
    model = build(options, seed).cuda()
    first, second = (tokens(seed + i, 2, seq_len).cuda() for i in range(2))
    x = first.clone()
    model(x)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = model(x)
    for each in (first, second):
        x.copy_(each)
        graph.replay()
        torch.testing.assert_close(replayed, model(each), atol=TOLERANCE, rtol=0)


@few
@given(decoder_options(), seeds, st.integers(2, 40), st.sampled_from([torch.bfloat16, torch.float16]))
def test_under_autocast_a_prefix_and_its_gradients_are_those_of_the_prefix_alone(
    options: dict[str, Any], seed: int, seq_len: int, dtype: torch.dtype
) -> None:
    model = build(options, seed, torch.float32).cuda().train().requires_grad_()
    x = tokens(seed, 2, seq_len).cuda()
    half = seq_len // 2

    with torch.autocast("cuda", dtype=dtype):
        alone, whole = model(x[:, :half]), model(x)[:, :half]
    # each layer rounds some times, and xPos may be no worse than the whole of it
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(whole, alone, atol=tolerance * float(alone.detach().abs().max()), rtol=0)
    ours, theirs = (torch.cat([t.flatten() for t in gradients(model, out)]) for out in (whole, alone))
    torch.testing.assert_close(ours, theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)
