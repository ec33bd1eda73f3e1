"""On a GPU: a model captured as a CUDA graph, and one that trains under autocast. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import build, decoder_options, few, gradients, seeds, tokens
from torch.testing import assert_close
from ways import continue_with, keys_values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# rounding of float64 through three layers, relative to outputs of about 1; a replay may use another workspace
TOLERANCE = 1e-12


@few
@given(decoder_options(), seeds, st.integers(1, 40), st.none() | st.integers(0, 3))
@torch.no_grad()
def test_what_is_replayed_gives_what_it_gives_eagerly(options, seed, seq_len, steps):
    """A forward, or a step from the cache of a prompt or of some steps, before and after others go on from it."""
    model = build(options, seed).cuda()
    if steps is None:
        cache = another = None
        inputs = [tokens(seed + i, 2, seq_len).cuda() for i in range(2)]
    else:
        cache, another = (model(tokens(seed, 2, seq_len).cuda(), return_intermediates=True)[1] for _ in range(2))
        new = tokens(seed + 1, 2, steps + 2).cuda().split(1, dim=1)
        for token in new[:steps]:
            _, cache = continue_with(model, token, cache)
        inputs = [*new[steps:]]
    captured = inputs[0].clone()
    continue_with(model, captured, another)  # what cuBLAS does once is not captured

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed, replayed_cache = continue_with(model, captured, cache)
    for x in inputs:
        captured.copy_(x)
        graph.replay()
        eager, eager_cache = continue_with(model, x, cache)
        assert_close(replayed, eager, atol=TOLERANCE, rtol=0)
        for kv, expected in zip(keys_values(replayed_cache), keys_values(eager_cache), strict=True):
            assert_close(kv, expected, atol=TOLERANCE, rtol=0)


@few
@given(decoder_options(), seeds, st.integers(2, 40), st.sampled_from([torch.bfloat16, torch.float16]))
def test_under_autocast_a_prefix_and_its_gradients_are_those_of_the_prefix_alone(options, seed, seq_len, dtype):
    model = build(options, seed, torch.float32).cuda().train().requires_grad_()
    x = tokens(seed, 2, seq_len).cuda()
    half = seq_len // 2

    with torch.autocast("cuda", dtype=dtype):
        alone, whole = model(x[:, :half]), model(x)[:, :half]
    # each layer rounds some times, and xPos may be no worse than the whole of it
    tolerance = 32 * torch.finfo(dtype).eps
    assert_close(whole, alone, atol=tolerance * float(alone.detach().abs().max()), rtol=0)
    ours, theirs = (torch.cat([t.flatten() for t in gradients(model, out)]) for out in (whole, alone))
    assert_close(ours, theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)
