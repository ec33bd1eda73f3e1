"""What a causal model's answer may not depend on, stated once and run over generated models.

Models are in float64, where a violation of the mathematics stands far above rounding.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import build, decoder_options, few, models, seeds, shifts, splits, tokens
from torch import Tensor

from x_transformers import TransformerWrapper
from x_transformers.x_transformers import LayerIntermediates

lengths = st.integers(2, 40)


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, position: int = 0) -> None:
    """Equal but for float64 rounding, at positions up to `position`.

    One output is the end of some 2 ** 10 dependent roundings (3 layers of normalisation, projections,
    scores and softmax over at most 80 positions), and attention logits of size up to 2 ** 6 turn an
    error of theirs into a relative one of the weights: 2 ** 16 half ulps of the largest output.
    An angle is at most the position, and wrong by half an ulp of it: of the scores that is as many
    half ulps as the position is large, which goes through the weights of 3 layers, 2 ** 8 times.
    """
    assert actual.dtype == expected.dtype == torch.float64
    assert torch.isfinite(expected).all()
    half_ulps = 2**16 + 2**8 * abs(position)
    tolerance = half_ulps * torch.finfo(torch.float64).eps / 2 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def prefill_with_cache(
    model: TransformerWrapper, x: Tensor, lens: list[int], *, whole: bool = False, pos: Tensor | None = None, **kwargs
) -> tuple[Tensor, LayerIntermediates]:
    """Logits (b, n, c) of consecutive parts, and the cache; each is passed alone, or as the end of the `whole`."""
    out, cache, end = [], None, 0

    for new in lens:
        end += new
        passed = slice(0 if whole else end - new, end)
        if pos is not None:
            kwargs["pos"] = pos[..., passed]
        kwargs.update(cache=cache, cache_age=new, input_not_include_cache=not whole, return_intermediates=True)
        logits, cache = model(x[:, passed], **kwargs)
        out.append(logits)

    return torch.cat(out, dim=1), cache


def one_at_a_time(model: TransformerWrapper, x: Tensor, lens: list[int]) -> Tensor:
    return prefill_with_cache(model, x, [lens[0]] + [1] * sum(lens[1:]), whole=True)[0]


def segments(model: TransformerWrapper, x: Tensor, lens: list[int]) -> Tensor:
    out, mems = [], None
    for segment in x.split(lens, dim=1):
        logits, mems = model(segment, mems=mems, return_mems=True)
        out.append(logits)
    return torch.cat(out, dim=1)


def behind_mems(model: TransformerWrapper, x: Tensor, lens: list[int], whole: bool) -> Tensor:
    first, mems = model(x[:, : lens[0]], return_mems=True)
    rest, _ = prefill_with_cache(model, x[:, lens[0] :], lens[1:], whole=whole, mems=mems)
    return torch.cat((first, rest), dim=1)


def layers_alone(model: TransformerWrapper, x: Tensor, lens: list[int]) -> Tensor:
    """Without the wrapper, that gives them the offset otherwise, the layers take it from the cache."""
    out, cache = [], None
    for chunk in model.token_emb(x).split(lens, dim=1):
        hidden, cache = model.attn_layers(chunk, cache=cache, cache_age=chunk.shape[1], return_hiddens=True)
        out.append(hidden)
    return model.to_logits(torch.cat(out, dim=1))


WAYS = {
    "prefix, then all": lambda model, x, lens: torch.cat((model(x[:, : lens[0]]), model(x)[:, lens[0] :]), dim=1),
    "one token at a time": one_at_a_time,
    "several tokens at once": lambda model, x, lens: prefill_with_cache(model, x, lens, whole=True)[0],
    "chunks": lambda model, x, lens: prefill_with_cache(model, x, lens)[0],
    "segments with mems": segments,
    "several tokens at once behind mems": lambda model, x, lens: behind_mems(model, x, lens, whole=True),
    "chunks behind mems": lambda model, x, lens: behind_mems(model, x, lens, whole=False),
    "layers alone": layers_alone,
    "prefix prepended": lambda model, x, lens: model(x[:, lens[0] :], prepend_embeds=model.token_emb(x[:, : lens[0]])),
}


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
