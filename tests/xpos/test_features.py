"""xPos with what else a decoder can have: a context, memory, folding, positions and tables passed in, windows."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pristine import build_both
from strategies import OPTIONS, SMALL, build, decoder_options, few, seeds, shifts, splits, tokens
from torch import Tensor
from ways import Recorder, assert_equal_to_rounding, half_ulp, prefill_with_cache, randn

from x_transformers import Attention
from x_transformers.x_transformers import RotaryEmbedding
from x_transformers.xpos import fold_mem_kv_
from x_transformers.xpos.checker import formula

num_mems = st.integers(1, 5)


@given(decoder_options(flash=False), seeds, splits(), st.integers(0, 3), st.integers(0, 3), st.integers(-40, 60))
@pytest.mark.regression
def test_scores_of_a_model_equal_the_formula(options, seed, lens, num_mem_kv, num_added, context_start):
    # keys of the cache and of this call, memory and additional ones at position 0, and a context with positions
    options.update(attn_kv_heads=options["heads"], attn_qk_norm=False, attn_num_mem_kv=num_mem_kv, cross_attend=True)
    model, x = build(options, seed), tokens(seed, 2, sum(lens))
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    queries: dict[int, Tensor] = {}
    for ind, attention in enumerate(attentions):
        attention.to_q.register_forward_hook(lambda module, args, out, ind=ind: queries.update({ind: out}))

    added = randn(seed, 2, options["heads"], num_added, options["attn_dim_head"])
    beside = dict(context=randn(seed, 2, 7, options["dim"]), context_pos=torch.arange(7) + context_start)
    beside.update(self_attn_additional_kv=[(added, added)] * options["depth"])
    past = sum(lens[:-1])
    _, cache = model(x[:, :past], return_intermediates=True, **beside)
    _, after = model(x, cache=cache, cache_age=lens[-1], return_intermediates=True, **beside)

    q_pos, rotary_dim = torch.arange(past, sum(lens)), options["rotary_emb_dim"]
    for ind, inter in enumerate(after.attn_intermediates):
        is_cross = inter.layer_type == "c"
        without_pos = [attentions[ind].mem_k.expand(2, -1, -1, -1)] if num_mem_kv else []
        without_pos = without_pos if is_cross else [added, *without_pos]
        k = torch.cat((*without_pos, inter.cached_kv[0]), dim=-2)
        own_pos = beside["context_pos"] if is_cross else torch.arange(sum(lens))
        k_pos = torch.cat((torch.zeros(k.shape[-2] - len(own_pos), dtype=torch.long), own_pos))
        expected, _ = formula.scores(
            attentions[ind].split_q_heads(queries[ind]),
            k,
            q_pos,
            k_pos,
            rotary_dim=rotary_dim,
            scale_base=options["rotary_xpos_scale_base"],
            base=formula.rescaled_base(rotary_dim, options["rotary_base_rescale_factor"]),
            interpolation=options["rotary_interpolation_factor"],
        )
        expected = expected * options["attn_dim_head"] ** -0.5
        met = (k_pos[None, :] <= q_pos[:, None]) | torch.tensor(is_cross)
        # float64: at most 16 products of some 10 roundings each, scaled apart by at most 3.5 ** (40 / 4) = 3e5 / 2
        tolerance = 2**8 * half_ulp(torch.float64) * expected[..., met].abs().max().item()
        torch.testing.assert_close(inter.qk_similarities[..., met], expected[..., met], rtol=0, atol=tolerance)


# memory keys


@given(decoder_options(), num_mems, seeds, splits())
def test_memory_key_values_stay_at_position_0_behind_mems(options, num_mem_kv, seed, lens):
    # the mems are at negative positions then; in one layer, as theirs are the same wherever they were computed
    model = build({**options, "depth": 1, "attn_num_mem_kv": num_mem_kv}, seed, max_mem_len=1024)
    x = tokens(seed, 2, sum(lens))

    _, mems = model(x[:, : lens[0]], return_mems=True)
    together = model(x, pos=torch.arange(sum(lens)) - lens[0])

    assert_equal_to_rounding(model(x[:, lens[0] :], mems=mems), together[:, lens[0] :])


@given(decoder_options(), num_mems, seeds, st.integers(2, 40), st.integers(1, 3))
def test_folding_memory_keys_keeps_upstreams_answer_at_the_length_trained_at(
    options, num, seed, seq_len, rotated_heads
):
    options.update(attn_qk_norm=False, attn_num_mem_kv=num, attn_kv_heads=options["heads"])
    options.update(rotate_num_heads=min(rotated_heads, options["heads"]))
    (model, upstreams), x = build_both(options, seed), tokens(seed, 2, seq_len)

    assert fold_mem_kv_(model, seq_len) == options["depth"]
    assert_equal_to_rounding(model(x), upstreams(x))


@pytest.mark.parametrize(
    ("options", "seq_len", "message"),
    [
        (dict(attn_num_mem_kv=2, attn_qk_norm=True), 64, "attn_qk_norm"),
        ({}, 64, "attn_num_mem_kv"),
        (dict(attn_num_mem_kv=2), 0, "seq_len"),
    ],
)
def test_folding_is_refused_where_no_factor_can_be_folded(options, seq_len, message):
    with pytest.raises(ValueError, match=message):
        fold_mem_kv_(build({**OPTIONS, **options}, 0), seq_len)


# range, beside what every_line/test_scores.py says of one call


@pytest.mark.parametrize("new", [1, 2, 31])
@pytest.mark.regression
def test_decoding_is_not_limited_by_what_is_in_the_cache(new):
    model = build({**OPTIONS, "rotary_xpos_scale_base": 4}, 0)
    half = deepcopy(model).half()
    seq_len = 8 * 71  # so many times the limit of one call
    x = tokens(0, 1, seq_len)
    chunks = [32] * ((seq_len - new) // 32) + [(seq_len - new) % 32]

    prefilled, cache = prefill_with_cache(half, x[:, :-new], chunks)
    decoded = half(x, cache=cache, cache_age=new)

    # four layers' worth of float16 roundings
    full = model(x)
    error = (torch.cat((prefilled, decoded), dim=1).double() - full).abs().max()
    assert error <= 64 * torch.finfo(torch.float16).eps * full.abs().max()


def test_plain_rotary_has_no_limit():
    with pytest.raises(AssertionError, match="only rotary xpos has a limit"):
        RotaryEmbedding(32).max_xpos_queries(torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("start", [-3, -500, -40_000])
def test_positions_far_before_0_leave_memory_keys_finite(dtype, start):
    model = build({**OPTIONS, "rotary_xpos_scale_base": 512, "attn_num_mem_kv": 2}, 0, dtype=dtype)

    assert torch.isfinite(model(tokens(0, 2, 40), pos=torch.arange(40) + start)).all()


# positions and tables that are passed in


@given(decoder_options(), seeds, splits(), st.lists(shifts, min_size=2, max_size=3))
@pytest.mark.regression
def test_rows_far_apart_and_with_gaps_answer_as_each_alone_nearby(options, seed, lens, row_shifts):
    model, shape = build(options, seed), (len(row_shifts), sum(lens))
    x = tokens(seed, *shape)
    pos = torch.randint(1, 10, shape, generator=torch.Generator().manual_seed(seed)).cumsum(dim=-1)
    far = pos + torch.tensor(row_shifts)[:, None]

    together = model(x, pos=far)

    assert_equal_to_rounding(prefill_with_cache(model, x, lens, whole=True, pos=far)[0], together, max(row_shifts))
    for row in range(len(row_shifts)):
        assert_equal_to_rounding(together[row, None], model(x[row, None], pos=pos[row]), max(row_shifts))


@given(
    st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32, torch.float64]),
    st.integers(1, 120),
    st.booleans(),
)
def test_positions_may_have_any_dtype(dtype, seq_len, per_row):
    model = build(OPTIONS, 0).attn_layers
    x, pos = randn(0, 2, seq_len, 16), torch.arange(seq_len)
    pos = torch.stack((pos, pos)) if per_row else pos

    assert torch.equal(model(x, pos=pos.to(dtype)), model(x, pos=pos))


def test_no_position_that_is_passed_in_is_read_back_from_the_device():
    model, x, pos = build({**OPTIONS, "attn_flash": True}, 0), tokens(0, 1, 20), torch.arange(20)
    with Recorder() as recorder:
        model(x, pos=pos)
        model(x, pos=pos, rotary_window=(0, 64))
        _, cache = model(x[:, :-1], return_intermediates=True)
        model(x[:, -1:], cache=cache, input_not_include_cache=True)
    assert not [name for name in recorder.names if "_local_scalar_dense" in name]


@given(decoder_options(), seeds, st.integers(1, 12), st.integers(1, 20), st.booleans())
def test_keys_of_one_position_have_no_decay_between_them(options, seed, seq_len, position, per_row):
    # one position for all of them, as upstream broadcasts it
    model, x = build(options, seed), tokens(seed, 2, seq_len)
    pos = torch.full((2, 1) if per_row else (1,), position)

    assert_equal_to_rounding(model(x, pos=pos), model(x, pos=torch.full((seq_len,), position)))


@given(decoder_options(max_mem_kv=2), seeds, st.integers(3, 30))
def test_too_few_positions_are_an_error(options, seed, seq_len):
    model, x = build(options, seed), tokens(seed, 2, seq_len)

    with pytest.raises(RuntimeError, match=f"{seq_len}.* must match .*{seq_len - 1}"):
        model(x, pos=torch.arange(seq_len - 1))
    _, cache = model(x[:, :-1], return_intermediates=True)
    with pytest.raises(RuntimeError, match="must match"):
        model(x, cache=cache, pos=torch.arange(seq_len - 1))


def test_a_table_with_a_scale_of_one_is_plain_rotary():
    model, plain = (build({**SMALL, name: True}, 0, torch.float32) for name in ("rotary_xpos", "rotary_pos_emb"))
    x, (freqs, _) = tokens(0, 2, 20), plain.attn_layers.rotary_pos_emb.forward_from_seq_len(20)

    assert torch.equal(model(x, rotary_pos_emb=(freqs, 1.0)), plain(x))


def test_a_table_of_a_module_that_upstream_pickled_has_the_digits_of_its_buffers():
    rotary, pos = RotaryEmbedding(32, use_xpos=True), torch.arange(9).double()[:, None]
    for name in ("dim", "base"):
        vars(rotary).pop(name)

    freqs, scale = rotary.forward_from_seq_len(9)
    angle, decay = (pos * rotary.inv_freq.double()).remainder(2 * torch.pi), rotary.scale.double() ** ((pos - 4) / 512)
    # roundings of float32, of angles below 2 pi
    torch.testing.assert_close(freqs[0].double(), angle.repeat_interleave(2, dim=-1), rtol=0, atol=4e-7)
    torch.testing.assert_close(scale[0].double(), decay.repeat_interleave(2, dim=-1), rtol=1e-7, atol=0)


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
        too_long = model.attn_layers.rotary_pos_emb.max_xpos_queries(torch.float64) + 1
        with pytest.raises(ValueError, match=f"{too_long} queries in one call"):
            model(x, rotary_window=(start, too_long), **passed)


# queries and keys

LAYOUTS = {
    "odd rows": lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1],
    "odd offset": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "columns first": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.parametrize("relaid", LAYOUTS.values(), ids=LAYOUTS)
@few
@given(decoder_options(), seeds, splits())
def test_queries_and_keys_may_have_any_layout(relaid, options, seed, lens):
    model, x = build(options, seed), tokens(seed, 2, sum(lens))
    expected = model(x)

    # as a projection of one's own may have
    for attention in (m for m in model.modules() if isinstance(m, Attention)):
        for projection in (attention.to_q, attention.to_k):
            projection.register_forward_hook(lambda module, args, out: relaid(out))

    _, cache = model(x[:, : lens[0]], return_intermediates=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    decoded = model(x, cache=cache, cache_age=sum(lens[1:]))
    torch.testing.assert_close(decoded, expected[:, lens[0] :], rtol=1e-9, atol=1e-9)
