"""xPos with what else a decoder can have: memory behind mems, folding, limits, tables passed in, windows."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import angular_frequency, rescaled_base
from strategies import build, decoder_options, seeds, splits, tokens
from torch import Tensor
from ways import DTYPES, assert_equal_to_rounding, prefill_with_cache

from x_transformers import Attention, TransformerWrapper
from x_transformers.x_transformers import RotaryEmbedding
from x_transformers.xpos import fold_mem_kv_

lengths = st.integers(2, 40)
num_mems = st.integers(1, 5)


# memory keys


@given(decoder_options(), num_mems, seeds, splits())
def test_memory_key_values_stay_at_position_0_behind_mems(options, num_mem_kv, seed, lens):
    # the mems are at negative positions then; in one layer, as theirs are the same wherever they were computed
    model = build({**options, "depth": 1, "attn_num_mem_kv": num_mem_kv}, seed, max_mem_len=1024)
    x = tokens(seed, 2, sum(lens))

    _, mems = model(x[:, : lens[0]], return_mems=True)
    together = model(x, pos=torch.arange(sum(lens)) - lens[0])

    assert_equal_to_rounding(model(x[:, lens[0] :], mems=mems), together[:, lens[0] :])


@given(decoder_options(), num_mems, seeds, lengths, st.integers(1, 3))
def test_folding_memory_keys_keeps_upstreams_answer_at_the_length_trained_at(
    options, num, seed, seq_len, rotated_heads
):
    options.update(attn_qk_norm=False, attn_num_mem_kv=num, attn_kv_heads=options["heads"])
    options.update(rotate_num_heads=min(rotated_heads, options["heads"]))
    model = build(options, seed)
    x = tokens(seed, 2, seq_len)
    expected = upstreams_answer(model, x)

    changed = fold_mem_kv_(model, seq_len)

    assert changed == options["depth"]
    assert_equal_to_rounding(model(x), expected)


def upstreams_answer(model: TransformerWrapper, x: Tensor) -> Tensor:
    """Memory keys without rotation and scale, against queries at absolute angles, centered on n // 2.

    Keys are scaled in the opposite direction by what this fork is going to give them.
    """
    model = deepcopy(model)
    rotary = model.attn_layers.rotary_pos_emb
    freqs, scale = rotary(torch.arange(x.shape[1]))
    # a table passed in starts with the position of the memory keys: here one that leaves them as they are
    freqs, scale = (
        torch.cat((start, t), dim=1) for start, t in ((freqs[:, :1] * 0, freqs), (scale[:, :1] * 0 + 1, scale))
    )
    return model(x, rotary_pos_emb=(freqs, scale))


def test_folding_is_refused_where_no_factor_can_be_folded():
    base = dict(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_xpos=True, rotary_emb_dim=8, verbose=False)
    with pytest.raises(ValueError, match="attn_qk_norm"):
        fold_mem_kv_(build({**base, "attn_num_mem_kv": 2, "attn_qk_norm": True}, 0), 64)
    with pytest.raises(ValueError, match="attn_num_mem_kv"):
        fold_mem_kv_(build(base, 0), 64)
    with pytest.raises(ValueError, match="seq_len"):
        fold_mem_kv_(build({**base, "attn_num_mem_kv": 2}, 0), 0)


# range


def scale_base_options(flash: bool) -> dict[str, Any]:
    """With a scale base of 4 the limit, hundreds of thousands of times 4 / 512, comes within reach of a test."""
    options = dict(dim=64, depth=2, heads=2, attn_dim_head=32, attn_flash=flash, verbose=False)
    return dict(options, rotary_xpos=True, rotary_emb_dim=32, rotary_xpos_scale_base=4)


def limit(dtype: torch.dtype, scale_base: float) -> int:
    """The most queries for which the largest scale, (1 / zeta_0) ** (n // 2 / S), is in the range of the dtype."""
    return 2 * math.floor(scale_base * math.log(torch.finfo(dtype).max) / math.log(1.4 / 0.4)) + 1


@pytest.mark.parametrize("mems", [False, True])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.regression("not refused")
def test_up_to_the_limit_finite_and_right_and_beyond_it_an_error(dtype, flash, mems):
    model = build({**scale_base_options(flash), "attn_num_mem_kv": 2 * (not flash)}, 0, max_mem_len=8)
    for attention in (m for m in model.modules() if isinstance(m, Attention)):
        # nothing is refused that some parameters make right
        attention.to_q.weight.mul_(2**-6)
        attention.to_k.weight.mul_(2**-6)
    rounded, longest = deepcopy(model).to(dtype), limit(dtype, 4)
    x = tokens(0, 2, longest + 1)

    def run(net: TransformerWrapper, length: int) -> Tensor:
        # flash attention adds a mask to the scores with keys ahead if there are mems, see limits.md
        past = net(x[:, :8], return_mems=True)[1] if mems and not flash else None
        return net(x[:, :length], mems=past)

    with pytest.raises(ValueError, match=rf"{longest + 1} queries .* limit of {longest} .*{dtype}"):
        run(rounded, longest + 1)
    actual = run(rounded, longest)

    assert torch.isfinite(actual).all()
    if not mems:  # the first queries meet them with keys scaled down to few digits, so limits.md says to stay at half
        expected = run(model, longest)
        assert (actual.double() - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


@given(st.sampled_from(DTYPES), st.sampled_from([4, 64, 100, 512, 4096]))
def test_the_limit_is_the_same_for_every_rotated_dim(dtype, scale_base):
    longest = limit(dtype, scale_base)
    for dim in (4, 32, 64):
        rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base)
        assert rotary.max_xpos_queries(dtype) == longest
        # the first scale of a window of so many is the last that is in range
        for queries, finite in ((longest, True), (longest + 1, False)):
            _, scale = rotary(torch.arange(1), offset=0, seq_len=queries)
            assert (scale.max().item() <= torch.finfo(dtype).max) == finite


def test_the_limits_that_documents_name():
    rotary = RotaryEmbedding(32, use_xpos=True)
    assert [rotary.max_xpos_queries(dtype) for dtype in DTYPES] == [72_521, 72_519, 9_065]
    with pytest.raises(AssertionError, match="only rotary xpos has a limit"):
        RotaryEmbedding(32).max_xpos_queries(torch.float16)


@pytest.mark.parametrize("scale_base", [0, -5, math.nan, math.inf, "512"])
@pytest.mark.regression("not refused")
def test_a_scale_base_that_is_none_is_refused_when_the_model_is_built(scale_base):
    with pytest.raises(
        AssertionError, match=re.escape(f"`rotary_xpos_scale_base` must be above 0 and finite, not {scale_base!r}")
    ):
        build(dict(scale_base_options(False), rotary_xpos_scale_base=scale_base), 0)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_remedy_in_the_message_works_as_it_is_written(dtype, flash):
    model = build(scale_base_options(flash), 0)
    half, x = deepcopy(model).to(dtype), tokens(0, 1, 2 * limit(dtype, 4) + 5)

    with pytest.raises(ValueError, match="chunks of at most") as error:
        half(x)
    said = r"pass chunks of at most (\d+) through the kv cache, with `input_not_include_cache = True` and `cache_age`"
    (size,) = map(int, re.findall(said, str(error.value)))

    logits, _ = prefill_with_cache(half, x, [len(chunk) for chunk in x[0].split(size)])

    expected = model(x)
    assert (logits.double() - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()
    # and the other
    increased = build(dict(scale_base_options(flash), rotary_xpos_scale_base=16), 0, dtype=dtype)
    assert torch.isfinite(increased(x)).all()


def test_the_error_comes_before_any_layer_runs_and_autocast_decides_the_dtype():
    model = build(scale_base_options(False), 0, dtype=torch.float32)
    ran: list[object] = []
    for layer in model.attn_layers.layers.modules():
        layer.register_forward_pre_hook(lambda module, args: ran.append(module))
    seq_len = limit(torch.float16, 4) + 1

    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16"):
        model(tokens(0, 1, seq_len))

    assert not ran
    model(tokens(0, 1, seq_len))


@pytest.mark.parametrize("new", [1, 2, 31])
@pytest.mark.regression
def test_decoding_is_not_limited_by_what_is_in_the_cache(new):
    model = build(scale_base_options(False), 0)
    half = deepcopy(model).half()
    seq_len = 8 * limit(torch.float16, 4)
    x = tokens(0, 1, seq_len)
    chunks = [32] * ((seq_len - new) // 32) + [(seq_len - new) % 32]

    prefilled, cache = prefill_with_cache(half, x[:, :-new], chunks)
    decoded = half(x, cache=cache, cache_age=new)

    # four layers' worth of float16 roundings
    full = model(x)
    error = (torch.cat((prefilled, decoded), dim=1).double() - full).abs().max()
    assert error <= 64 * torch.finfo(torch.float16).eps * full.abs().max()


# positions and tables that are passed in


@given(decoder_options(), seeds, splits())
def test_a_table_with_a_scale_of_one_is_plain_rotary(options, seed, lens):
    model, plain = build(options, seed), build({**options, "rotary_xpos": False, "rotary_pos_emb": True}, seed)
    x = tokens(seed, 2, sum(lens))
    freqs, _ = model.attn_layers.rotary_pos_emb.forward_from_seq_len(sum(lens))
    # in plain rotary they are rounded to float32
    base = rescaled_base(options["rotary_emb_dim"], options["rotary_base_rescale_factor"])
    plain.attn_layers.rotary_pos_emb.inv_freq = angular_frequency(options["rotary_emb_dim"], base)

    assert_equal_to_rounding(model(x, rotary_pos_emb=(freqs, 1.0)), plain(x))


@given(decoder_options(), seeds, st.integers(1, 12), st.integers(1, 20), st.booleans())
def test_keys_of_one_position_have_no_decay_between_them(options, seed, seq_len, position, per_row):
    # one position for all of them, as upstream broadcasts it
    model, x = build(options, seed), tokens(seed, 2, seq_len)
    pos = torch.full((2, 1) if per_row else (1,), position)

    assert_equal_to_rounding(model(x, pos=pos), model(x, pos=torch.full((seq_len,), position)))


@given(decoder_options(), st.integers(0, 2), seeds, st.integers(3, 30))
def test_too_few_positions_are_an_error(options, num_mem_kv, seed, seq_len):
    model = build({**options, "attn_num_mem_kv": num_mem_kv}, seed)
    x = tokens(seed, 2, seq_len)

    with pytest.raises(RuntimeError, match=f"{seq_len}.* must match .*{seq_len - 1}"):
        model(x, pos=torch.arange(seq_len - 1))
    _, cache = model(x[:, :-1], return_intermediates=True)
    with pytest.raises(RuntimeError, match="must match"):
        model(x, cache=cache, pos=torch.arange(seq_len - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("start", [-3, -500, -40_000])
def test_positions_far_before_0_leave_memory_keys_finite(dtype, start):
    options = dict(scale_base_options(False), rotary_xpos_scale_base=512, attn_num_mem_kv=2)
    model = build(options, 0, dtype=dtype)

    assert torch.isfinite(model(tokens(0, 2, 40), pos=torch.arange(40) + start)).all()


# a window for all shards of a sequence: that they give what the whole gives is in test_distributed.py


@given(decoder_options(), seeds, splits(), st.integers(-3, 50), st.integers(1, 100))
@pytest.mark.regression("no argument")
def test_any_window_is_right_and_its_range_is_checked(options, seed, lens, start, window_len):
    model = build(options, seed)
    x, pos = tokens(seed, 2, sum(lens)), torch.arange(sum(lens))
    _, cache = model(x[:, : lens[0]], return_intermediates=True)
    new = dict(cache=cache, cache_age=sum(lens[1:]))
    expected = model(x, **new)

    for passed in (new, dict(new, pos=pos)):
        assert_equal_to_rounding(model(x, rotary_window=(start, window_len), **passed), expected)
        too_long = limit(torch.float64, options["rotary_xpos_scale_base"]) + 1
        with pytest.raises(ValueError, match=f"{too_long} queries in one call"):
            model(x, rotary_window=(start, too_long), **passed)
