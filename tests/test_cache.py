"""The KV cache with xPos: appended to in place, and for everyone who reads it the one that it always was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import build, decoder_options, seeds, splits, tokens
from test_properties import assert_equal_to_rounding, prefill_with_cache
from torch import Tensor

from x_transformers.x_transformers import LayerIntermediates

# what a cache may be continued with
news = st.lists(st.integers(1, 3), min_size=2, max_size=6)


def continue_with(model, x: Tensor, cache: LayerIntermediates) -> tuple[Tensor, LayerIntermediates]:
    return model(x, cache=cache, cache_age=x.shape[1], input_not_include_cache=True, return_intermediates=True)


def keys_values(cache: LayerIntermediates) -> list[Tensor]:
    return [t for inter in cache.attn_intermediates for t in inter.cached_kv]


def memory(cache: LayerIntermediates) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in keys_values(cache)]


@given(decoder_options(), seeds, splits())
def test_what_is_cached_is_not_rotated(options, seed, lens):
    # as with plain rotary and the same parameters, in the first layer, which no attention precedes
    model, plain = build(options, seed), build({**options, "rotary_xpos": False, "rotary_pos_emb": True}, seed)
    x = tokens(seed, 2, sum(lens))

    _, cache = prefill_with_cache(model, x, lens)
    _, expected = prefill_with_cache(plain, x, lens)

    for actual, t in zip(keys_values(cache)[:2], keys_values(expected)[:2]):
        assert_equal_to_rounding(actual, t)


@given(decoder_options(), seeds, st.integers(1, 20), st.integers(2, 12))
def test_steps_share_their_memory(options, seed, prompt_len, num_steps):
    model = build(options, seed)
    x = tokens(seed, 2, prompt_len + num_steps)
    _, cache = model(x[:, :prompt_len], return_intermediates=True)
    addresses = set()

    for step in range(num_steps):
        _, cache = continue_with(model, x[:, prompt_len + step, None], cache)
        addresses.add(tuple(memory(cache)))
        assert {t.shape[-2] for t in keys_values(cache)} == {prompt_len + step + 1}

    # there is room for 16 more
    assert len(addresses) == 1


@given(decoder_options(), seeds, st.integers(1, 20), news, st.data())
def test_branches_of_a_cache_do_not_touch_each_other(options, seed, prompt_len, lens, data):
    model = build(options, seed)
    _, cache = model(tokens(seed, 1, prompt_len), return_intermediates=True)
    # each branch with the tokens that led to it, and what its cache held when it was made
    branches = [(tokens(seed, 1, prompt_len), cache, [t.clone() for t in keys_values(cache)])]

    for i, new in enumerate(lens):
        before, cache, _ = branches[data.draw(st.integers(0, len(branches) - 1), label="continue")]
        x = tokens(seed + 1 + i, 1, new)
        logits, cache = continue_with(model, x, cache)
        branches.append((torch.cat((before, x), dim=1), cache, [t.clone() for t in keys_values(cache)]))
        assert_equal_to_rounding(logits, model(branches[-1][0])[:, -new:])
        if data.draw(st.booleans(), label="forget one"):
            branches.pop(data.draw(st.integers(0, len(branches) - 1), label="which"))
            if not branches:
                return
        # the loop's own references must not keep a branch alive that was forgotten
        del before, cache

        for seen, branch, held in branches:
            assert all(torch.equal(t, expected) for t, expected in zip(keys_values(branch), held))
            assert branch.cache_length == seen.shape[1]


@given(decoder_options(), seeds, st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_a_view_outlives_the_step_that_it_is_of(options, seed, prompt_len, new, inference):
    model = build(options, seed)
    with torch.inference_mode(inference):
        _, cache = model(tokens(seed, 1, prompt_len), return_intermediates=True)
        _, after = continue_with(model, tokens(seed + 1, 1, new), cache)
        views = [t[..., -new:, :2] for t in keys_values(after)]
        expected = [t.clone() for t in views]
        del after

        continue_with(model, tokens(seed + 2, 1, new), cache)

        assert all(torch.equal(t, e) for t, e in zip(views, expected))


@given(decoder_options(), seeds, st.integers(1, 20), st.booleans())
def test_the_same_step_again_takes_the_same_memory(options, seed, prompt_len, inference):
    model = build(options, seed)
    x = tokens(seed, 2, prompt_len + 1)
    with torch.inference_mode(inference):
        _, cache = model(x[:, :-1], return_intermediates=True)
        first, after = continue_with(model, x[:, -1:], cache)
        addresses, cached = memory(after), [t.clone() for t in keys_values(after)]
        del after

        again, after = continue_with(model, x[:, -1:], cache)

        assert memory(after) == addresses
        assert torch.equal(again, first)
        assert all(torch.equal(t, e) for t, e in zip(keys_values(after), cached))


@given(decoder_options(), seeds, st.integers(1, 20), st.sampled_from(["deepcopy", "pickle", "crop", "index", "clone"]))
def test_a_cache_that_was_copied_or_replaced_decodes_the_same(options, seed, prompt_len, how):
    model = build(options, seed)
    x = tokens(seed, 2, prompt_len + 3)
    _, cache = model(x[:, :prompt_len], return_intermediates=True)
    _, cache = continue_with(model, x[:, prompt_len, None], cache)
    expected = model(x)[:, prompt_len + 1 :]

    if how == "deepcopy":
        other = copy.deepcopy(cache)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(cache))
    else:
        replace = {"crop": lambda t: t[..., -t.shape[-2] :, :], "index": lambda t: t[torch.tensor([0, 1])]}
        other = copy.deepcopy(cache)
        for inter in other.attn_intermediates:
            inter.cached_kv = [replace.get(how, torch.clone)(t) for t in inter.cached_kv]

    continue_with(model, tokens(seed + 9, 2, 2), cache)
    assert_equal_to_rounding(continue_with(model, x[:, prompt_len + 1 :], other)[0], expected)
    assert_equal_to_rounding(continue_with(model, x[:, prompt_len + 1 :], cache)[0], expected)


@given(decoder_options(), seeds, splits())
def test_with_gradients_a_cache_is_copied_and_they_are_those_of_the_full_forward(options, seed, lens):
    x = tokens(seed, 2, sum(lens))
    model = build(options, seed).requires_grad_(True)
    params = list(model.parameters())

    logits, _ = prefill_with_cache(model, x, lens)

    decoded = torch.autograd.grad(logits.square().sum(), params, allow_unused=True)
    full = torch.autograd.grad(model(x).square().sum(), params, allow_unused=True)
    for d, f in zip(decoded, full):
        assert (d is None) == (f is None)
        if d is not None:
            assert_equal_to_rounding(d, f)


def test_a_cache_may_cross_into_and_out_of_inference_mode():
    model = build(dict(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_xpos=True, verbose=False), 0)
    x = tokens(0, 1, 12)
    expected = model(x)

    with torch.inference_mode():
        _, cache = model(x[:, :4], return_intermediates=True)
        _, cache = continue_with(model, x[:, 4:6], cache)
    outside, cache = continue_with(model, x[:, 6:8], cache)
    with torch.inference_mode():
        inside, cache = continue_with(model, x[:, 8:10], cache)
    last, _ = continue_with(model, x[:, 10:], cache)

    assert_equal_to_rounding(torch.cat((outside, inside, last), dim=1), expected[:, 6:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_of_dtype_between_steps_is_a_change_of_dtype(dtype):
    model = build(dict(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_xpos=True, verbose=False), 0).float()
    x = tokens(0, 1, 8)
    with torch.autocast("cpu", dtype=dtype):
        _, cache = model(x[:, :4], return_intermediates=True)
        _, cache = continue_with(model, x[:, 4:6], cache)
        assert {t.dtype for t in keys_values(cache)} == {dtype}

    # as torch.cat promotes them
    _, cache = continue_with(model, x[:, 6:], cache)
    assert {t.dtype for t in keys_values(cache)} == {torch.float32}
