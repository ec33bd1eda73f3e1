"""What a causal model's answer may not depend on, stated once and run over generated models.

Models are in float64, where a violation of the mathematics stands far above rounding.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import build, decoder_options, few, models, seeds, shifts, splits, tokens
from ways import WAYS, assert_equal_to_rounding, prefill_with_cache

lengths = st.integers(2, 40)


@pytest.mark.parametrize("way", WAYS)
@few
@given(models(max_mem_len=1024), seeds, splits())
def test_what_is_computed_in_parts_equals_the_full_forward(way, model, seed, lens):
    x = tokens(seed, 2, sum(lens))

    assert_equal_to_rounding(WAYS[way](model, x, lens), model(x))


@given(models(), seeds, st.lists(st.integers(1, 24), min_size=1, max_size=3), st.integers(1, 4))
def test_rows_padded_on_the_left_decode_as_each_alone(model, seed, lens, new):
    widest = max(lens)
    x, starts = tokens(seed, len(lens), widest + new), [widest - n for n in lens]

    together, _ = prefill_with_cache(model, x, [widest] + [1] * new, whole=True, seq_start_pos=torch.tensor(starts))

    for row, start in enumerate(starts):
        assert_equal_to_rounding(together[row, None, start:], model(x[row, None, start:]))


# decays fast enough that a center which does not move with the positions is out of range
FAST_DECAY = {"rotary_xpos": True, "rotary_emb_dim": 4, "rotary_xpos_scale_base": 4, "attn_flash": True}


@given(models(), seeds, lengths, shifts)
@example(build({**FAST_DECAY, "dim": 8, "depth": 1, "attn_dim_head": 8}, 0), 0, 2, 4520)
@pytest.mark.regression
def test_shifting_all_positions_changes_rounding_alone(model, seed, seq_len, shift):
    x = tokens(seed, 2, seq_len)
    pos = torch.arange(seq_len)

    default = model(x)

    assert torch.equal(model(x, pos=pos), default)
    assert_equal_to_rounding(model(x, pos=pos + shift), default, shift)
    assert_equal_to_rounding(model(x, pos=pos - shift), default, shift)


@given(models(), seeds, splits(), st.lists(shifts, min_size=2, max_size=3))
@pytest.mark.regression
def test_rows_far_apart_and_with_gaps_answer_as_each_alone_nearby(model, seed, lens, row_shifts):
    shape = len(row_shifts), sum(lens)
    x = tokens(seed, *shape)
    pos = torch.randint(1, 10, shape, generator=torch.Generator().manual_seed(seed)).cumsum(dim=-1)
    far = pos + torch.tensor(row_shifts)[:, None]

    together = model(x, pos=far)

    assert_equal_to_rounding(prefill_with_cache(model, x, lens, whole=True, pos=far)[0], together, max(row_shifts))
    for row in range(len(row_shifts)):
        assert_equal_to_rounding(together[row, None], model(x[row, None], pos=pos[row]), max(row_shifts))


@given(decoder_options(), seeds, seeds, splits())
def test_gradients_do_not_depend_on_what_follows(options, seed, data_seed, lens):
    x = tokens(data_seed, 2, sum(lens))
    model = build(options, seed).requires_grad_(True)
    params = list(model.parameters())

    prefix = torch.autograd.grad(model(x[:, : lens[0]]).square().sum(), params, allow_unused=True)
    full = torch.autograd.grad(model(x)[:, : lens[0]].square().sum(), params, allow_unused=True)

    for p, f in zip(prefix, full):
        assert (p is None) == (f is None)
        if p is not None:
            assert_equal_to_rounding(p, f)
