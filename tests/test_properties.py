"""What a causal model's answer may not depend on, stated once and run over generated models.

Models are in float64, where a violation of the mathematics stands far above rounding.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import build, decoder_options, models, seeds, shifts, splits, tokens
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


def decode(model: TransformerWrapper, x: Tensor, prompt_len: int, **kwargs) -> Tensor:
    """Logits (b, n, c) of a prompt and then one token at a time, the whole sequence passed at each step."""
    logits, cache = model(x[:, :prompt_len], return_intermediates=True, **kwargs)
    out = [logits]

    for end in range(prompt_len + 1, x.shape[1] + 1):
        logits, cache = model(x[:, :end], cache=cache, return_intermediates=True, **kwargs)
        out.append(logits)

    return torch.cat(out, dim=1)


def prefill(model: TransformerWrapper, x: Tensor, chunk_lens: list[int], **kwargs) -> Tensor:
    """Logits (b, n, c) of consecutive chunks, each passed without what is in the cache."""
    return prefill_with_cache(model, x, chunk_lens, **kwargs)[0]


def prefill_with_cache(
    model: TransformerWrapper, x: Tensor, chunk_lens: list[int], **kwargs
) -> tuple[Tensor, LayerIntermediates]:
    out, cache = [], None

    for chunk in x.split(chunk_lens, dim=1):
        logits, cache = model(
            chunk,
            cache=cache,
            cache_age=chunk.shape[1],
            input_not_include_cache=True,
            return_intermediates=True,
            **kwargs,
        )
        out.append(logits)

    return torch.cat(out, dim=1), cache


def whole_sequence_and_how_much_is_new(model: TransformerWrapper, x: Tensor, lens: list[int]) -> Tensor:
    """As in speculative decoding: `cache_age` says how much of it is new."""
    out, cache, end = [], None, 0
    for new in lens:
        end += new
        logits, cache = model(x[:, :end], cache=cache, cache_age=new, return_intermediates=True)
        out.append(logits)
    return torch.cat(out, dim=1)


def segments(model: TransformerWrapper, x: Tensor, lens: list[int]) -> Tensor:
    out, mems = [], None
    for segment in x.split(lens, dim=1):
        logits, mems = model(segment, mems=mems, return_mems=True)
        out.append(logits)
    return torch.cat(out, dim=1)


def layers_alone(model: TransformerWrapper, x: Tensor, lens: list[int]) -> Tensor:
    """Without the wrapper, that gives them the offset otherwise, the layers take it from the cache."""
    out, cache = [], None
    for chunk in model.token_emb(x).split(lens, dim=1):
        hidden, cache = model.attn_layers(chunk, cache=cache, cache_age=chunk.shape[1], return_hiddens=True)
        out.append(hidden)
    return model.to_logits(torch.cat(out, dim=1))


WAYS = {
    "prefix, then all": lambda model, x, lens: torch.cat((model(x[:, : lens[0]]), model(x)[:, lens[0] :]), dim=1),
    "one token at a time": lambda model, x, lens: decode(model, x, lens[0]),
    "several tokens at once": whole_sequence_and_how_much_is_new,
    "chunks": prefill,
    "segments with mems": segments,
    "layers alone": layers_alone,
    "prefix prepended": lambda model, x, lens: model(x[:, lens[0] :], prepend_embeds=model.token_emb(x[:, : lens[0]])),
}


@pytest.mark.parametrize("way", WAYS)
@given(models(max_mem_len=1024), seeds, splits())
def test_what_is_computed_in_parts_equals_the_full_forward(way, model, seed, lens):
    x = tokens(seed, 2, sum(lens))

    assert_equal_to_rounding(WAYS[way](model, x, lens), model(x))


@given(models(max_mem_len=1024), seeds, splits(max_len=12), splits(max_len=12))
def test_decoding_with_mems_equals_the_full_forward(model, seed, mem_lens, lens):
    x = tokens(seed, 2, sum(mem_lens) + sum(lens))
    mems = None

    for segment in x[:, : sum(mem_lens)].split(mem_lens, dim=1):
        _, mems = model(segment, mems=mems, return_mems=True)

    segment = x[:, sum(mem_lens) :]
    expected = model(x)[:, sum(mem_lens) :]

    assert_equal_to_rounding(decode(model, segment, lens[0], mems=mems), expected)
    assert_equal_to_rounding(prefill(model, segment, lens, mems=mems), expected)


@given(models(), seeds, st.integers(2, 12), st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_left_padding_changes_nothing(model, seed, seq_len, pads):
    batch, widest = len(pads), max(pads)
    x = tokens(seed, batch, seq_len)
    filler = tokens(seed + 1, batch, widest)
    padded = torch.stack([torch.cat((filler[i], x[i])) for i in range(batch)])
    start = torch.full((batch,), widest)

    expected = model(x)

    assert_equal_to_rounding(model(padded, seq_start_pos=start)[:, widest:], expected)
    assert_equal_to_rounding(decode(model, padded, widest + 1, seq_start_pos=start)[:, widest:], expected)


@given(models(), seeds, st.lists(st.integers(1, 24), min_size=2, max_size=3))
def test_prompts_of_several_lengths_decode_as_each_alone(model, seed, lens):
    widest = max(lens)
    x = tokens(seed, len(lens), widest)
    start = torch.tensor([widest - n for n in lens])

    together = model(x, seq_start_pos=start)

    for row, n in enumerate(lens):
        alone = model(x[row : row + 1, widest - n :])
        assert_equal_to_rounding(together[row : row + 1, widest - n :], alone)


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


@given(models(), seeds, lengths, st.lists(shifts, min_size=2, max_size=3))
@pytest.mark.regression
def test_positions_of_one_row_do_not_touch_another(model, seed, seq_len, row_shifts):
    x = tokens(seed, len(row_shifts), seq_len)
    pos = torch.arange(seq_len) + torch.tensor(row_shifts)[:, None]

    together = model(x, pos=pos)

    assert_equal_to_rounding(together, model(x), max(row_shifts))
    for row in range(len(row_shifts)):
        assert_equal_to_rounding(together[row, None], model(x[row, None], pos=pos[row]))


@given(models(), seeds, splits(), st.data())
def test_positions_with_gaps_decode_as_the_full_forward(model, seed, lens, data):
    seq_len = sum(lens)
    x = tokens(seed, 2, seq_len)
    gaps = st.lists(st.integers(1, 9), min_size=seq_len, max_size=seq_len)
    pos = torch.tensor([data.draw(gaps), data.draw(gaps)]).cumsum(dim=-1)

    full = model(x, pos=pos)
    _, cache = model(x[:, : lens[0]], pos=pos[:, : lens[0]], return_intermediates=True)
    rest = model(x, pos=pos, cache=cache, cache_age=seq_len - lens[0])

    assert_equal_to_rounding(rest, full[:, lens[0] :])


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
