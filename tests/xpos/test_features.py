"""xPos with what else a decoder can have: a context, memory, folding, positions and tables passed in, windows."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pristine import build_both
from strategies import OPTIONS, SMALL, build, decoder_options, few, seeds, shifts, splits, tokens
from torch import Tensor
from ways import assert_equal_to_rounding, half_ulp, prefill_with_cache, randn

from x_transformers import Attention
from x_transformers.x_transformers import RotaryEmbedding
from x_transformers.xpos import fold_mem_kv_
from x_transformers.xpos.checker import formula

# of queries and keys, as a projection of one's own may have
LAYOUTS = {
    "upstream's": lambda t: t,
    "odd rows": lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1],
    "odd offset": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "columns first": lambda t: t.mT.contiguous().mT,
}
few_mems, context_starts = st.integers(0, 3), st.integers(-40, 60)


@pytest.mark.parametrize("relaid", LAYOUTS.values(), ids=LAYOUTS)
@few
@given(decoder_options(flash=False), seeds, splits(), few_mems, few_mems, context_starts)
@pytest.mark.regression
def test_scores_of_a_model_equal_the_formula(relaid, options, seed, lens, num_mem_kv, num_added, context_start):
    # keys of the cache and of this call, memory and additional ones at position 0, and a context with positions
    options.update(attn_kv_heads=options["heads"], attn_qk_norm=False, attn_num_mem_kv=num_mem_kv, cross_attend=True)
    model, x = build(options, seed), tokens(seed, 2, sum(lens))
    attentions, queries = [m for m in model.modules() if isinstance(m, Attention)], list[Tensor]()
    for attention in attentions:
        attention.to_q.register_forward_hook(lambda module, args, out: queries.append(out))
        for projection in (attention.to_q, attention.to_k):
            projection.register_forward_hook(lambda module, args, out: relaid(out))

    added = randn(seed, 2, options["heads"], num_added, options["attn_dim_head"])
    beside = dict(context=randn(seed, 2, 7, options["dim"]), context_pos=torch.arange(7) + context_start)
    beside.update(self_attn_additional_kv=[(added, added)] * options["depth"])
    past = sum(lens[:-1])
    _, cache = model(x[:, :past], return_intermediates=True, **beside)
    _, after = model(x, cache=cache, cache_age=lens[-1], return_intermediates=True, **beside)

    dim, factor = options["rotary_emb_dim"], options["rotary_base_rescale_factor"]
    of_rotary: dict[str, Any] = dict(rotary_dim=dim, base=formula.rescaled_base(dim, factor))
    of_rotary.update(scale_base=options["rotary_xpos_scale_base"], interpolation=options["rotary_interpolation_factor"])
    q_pos = torch.arange(past, sum(lens))
    for attention, q, inter in zip(attentions, queries[-len(attentions) :], after.attn_intermediates):
        is_cross = inter.layer_type == "c"
        without_pos = [attention.mem_k.expand(2, -1, -1, -1)] if num_mem_kv else []
        without_pos = without_pos if is_cross else [added, *without_pos]
        k = torch.cat((*without_pos, inter.cached_kv[0]), dim=-2)
        own_pos = beside["context_pos"] if is_cross else torch.arange(sum(lens))
        k_pos = torch.cat((torch.zeros(k.shape[-2] - len(own_pos), dtype=torch.long), own_pos))
        expected, _ = formula.scores(attention.split_q_heads(q), k, q_pos, k_pos, **of_rotary)
        expected = expected * options["attn_dim_head"] ** -0.5
        met = (k_pos[None, :] <= q_pos[:, None]) | torch.tensor(is_cross)
        # float64: at most 16 products of some 10 roundings each, scaled apart by at most 3.5 ** (40 / 4) = 3e5 / 2
        tolerance = 2**8 * half_ulp(torch.float64) * expected[..., met].abs().max().item()
        torch.testing.assert_close(inter.qk_similarities[..., met], expected[..., met], rtol=0, atol=tolerance)


# memory keys


@given(decoder_options(), st.integers(1, 5), seeds, splits())
def test_memory_key_values_stay_at_position_0_behind_mems(options, num_mem_kv, seed, lens):
    # the mems are at negative positions then; in one layer, as theirs are the same wherever they were computed
    model = build({**options, "depth": 1, "attn_num_mem_kv": num_mem_kv}, seed, max_mem_len=1024)
    x = tokens(seed, 2, sum(lens))

    _, mems = model(x[:, : lens[0]], return_mems=True)
    together = model(x, pos=torch.arange(sum(lens)) - lens[0])

    assert_equal_to_rounding(model(x[:, lens[0] :], mems=mems), together[:, lens[0] :])


@given(decoder_options(), st.integers(1, 5), seeds, st.integers(2, 40), st.integers(1, 3))
def test_folding_memory_keys_keeps_upstreams_answer_at_the_length_trained_at(options, num, seed, length, rotated):
    options.update(attn_qk_norm=False, attn_num_mem_kv=num, attn_kv_heads=options["heads"])
    options.update(rotate_num_heads=min(rotated, options["heads"]))
    (model, upstreams), x = build_both(options, seed), tokens(seed, 2, length)

    assert fold_mem_kv_(model, length) == options["depth"]
    assert_equal_to_rounding(model(x), upstreams(x))


REFUSED = [(2, True, 64, "attn_qk_norm"), (0, False, 64, "attn_num_mem_kv"), (2, False, 0, "seq_len")]


@pytest.mark.parametrize(("num_mem_kv", "qk_norm", "seq_len", "message"), REFUSED)
def test_folding_is_refused_where_no_factor_can_be_folded(num_mem_kv, qk_norm, seq_len, message):
    model = build({**OPTIONS, "attn_num_mem_kv": num_mem_kv, "attn_qk_norm": qk_norm}, 0)
    with pytest.raises(ValueError, match=message):
        fold_mem_kv_(model, seq_len)


# range, beside what every_line/test_scores.py says of one call


@pytest.mark.parametrize("new", [1, 2, 31])
@pytest.mark.regression
def test_decoding_is_not_limited_by_what_is_in_the_cache(new):
    model = build({**OPTIONS, "rotary_xpos_scale_base": 4}, 0)
    before = 8 * 71 - new  # so many times the limit of one call
    x, chunks = tokens(0, 1, before + new), [32] * (before // 32) + [before % 32, new]

    out, _ = prefill_with_cache(deepcopy(model).half(), x, chunks)

    # four layers' worth of float16 roundings
    full = model(x)
    assert (out.double() - full).abs().max() <= 64 * torch.finfo(torch.float16).eps * full.abs().max()


def test_plain_rotary_has_no_limit():
    with pytest.raises(AssertionError, match="only rotary xpos has a limit"):
        RotaryEmbedding(32).max_xpos_queries(torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("start", [-3, -500, -40_000])
def test_positions_far_before_0_leave_memory_keys_finite(dtype, start):
    model = build({**OPTIONS, "rotary_xpos_scale_base": 512, "attn_num_mem_kv": 2}, 0, dtype=dtype)

    assert torch.isfinite(model(tokens(0, 2, 40), pos=torch.arange(40) + start)).all()


# positions and tables that are passed in


@given(decoder_options(), seeds, splits(), shifts)
@pytest.mark.regression
def test_rows_far_apart_and_with_gaps_answer_as_each_alone_nearby(options, seed, lens, shift):
    model, x = build(options, seed), tokens(seed, 2, sum(lens))
    pos = torch.randint(1, 10, x.shape, generator=torch.Generator().manual_seed(seed)).cumsum(dim=-1)
    far = pos + torch.tensor([[0], [shift]])

    alone = torch.cat([model(row[None], pos=of_row) for row, of_row in zip(x, pos)])
    for together in (model(x, pos=far), prefill_with_cache(model, x, lens, whole=True, pos=far)[0]):
        assert_equal_to_rounding(together, alone, shift)


INTEGERS, FLOATS = (torch.int8, torch.uint8, torch.int16, torch.int32), (torch.float16, torch.float32, torch.float64)


@given(decoder_options(), seeds, st.sampled_from(INTEGERS + FLOATS), st.integers(1, 120), st.booleans(), st.booleans())
def test_positions_may_have_any_dtype_and_be_one_for_all(options, seed, dtype, seq_len, one_for_all, per_row):
    model, x = build(options, seed).attn_layers, randn(seed, 2, seq_len, options["dim"])
    pos = torch.tensor([seq_len]) if one_for_all else torch.arange(seq_len)
    pos = torch.stack((pos, pos)) if per_row else pos

    assert_equal_to_rounding(model(x, pos=pos.to(dtype)), model(x, pos=pos.expand(2, seq_len)))


@given(decoder_options(max_mem_kv=2), seeds, st.integers(3, 30))
def test_too_few_positions_are_an_error(options, seed, seq_len):
    model, x = build(options, seed), tokens(seed, 2, seq_len)

    _, cache = model(x[:, :-1], return_intermediates=True)
    for passed in ({}, dict(cache=cache)):
        with pytest.raises(RuntimeError, match=f"{seq_len}.* must match .*{seq_len - 1}"):
            model(x, pos=torch.arange(seq_len - 1), **passed)


def test_a_table_with_a_scale_of_one_is_plain_rotary():
    model, plain = (build({**SMALL, name: True}, 0, torch.float32) for name in ("rotary_xpos", "rotary_pos_emb"))
    x, (freqs, _) = tokens(0, 2, 20), plain.attn_layers.rotary_pos_emb.forward_from_seq_len(20)

    assert torch.equal(model(x, rotary_pos_emb=(freqs, 1.0)), plain(x))


@pytest.mark.parametrize("passed", [{}, dict(pos=torch.arange(9))])
def test_the_range_of_a_window_for_all_shards_is_checked(passed):
    # that any window is right is said of the option, and of shards in test_distributed.py
    model = build(OPTIONS, 0)
    too_long = model.attn_layers.rotary_pos_emb.max_xpos_queries(torch.float64) + 1
    with pytest.raises(ValueError, match=f"{too_long} queries in one call"):
        model(tokens(0, 2, 9), rotary_window=(-3, too_long), **passed)
