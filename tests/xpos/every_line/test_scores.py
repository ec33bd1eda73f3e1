"""The table of `RotaryEmbedding`, scores and their range, against the float64 formula, on every line."""

from __future__ import annotations

import inspect
import math
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import IS_OLDER, OPTIONS, build, decoder_options, few, seeds, shifts, splits, tokens
from torch import Tensor
from ways import DTYPES, Recorder, assert_equal_to_rounding, half_ulp, randn

from x_transformers import Attention, TransformerWrapper
from x_transformers import x_transformers as upstream
from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb
from x_transformers.xpos.checker import formula, runs
from x_transformers.xpos.checker.models import Model, Text
from x_transformers.xpos.release import NEIGHBORS_ROTATE, rotated_pairs_first

# neither in the unpatched release nor in the older line
XPosTable: Any = getattr(upstream, "XPosTable", None)

# the older release raises a NameError whatever is called
pytestmark = [pytest.mark.regression] * IS_OLDER


def table(rotary: RotaryEmbedding, pos: Tensor, offset: int | Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """The table of positions in the window `[offset, offset + seq_len)`, which the unpatched release cannot be told."""
    has_window = "seq_len" in inspect.signature(rotary.forward).parameters
    return rotary(pos, **(dict(offset=offset, seq_len=seq_len) if has_window else {}))


def score_errors(
    rotary: RotaryEmbedding, q: Tensor, k: Tensor, k_pos: Tensor, rows: Tensor, by: str = "table"
) -> tuple[Tensor, Tensor, Tensor]:
    """How far scores are from the formula, what they are, and the sizes of their terms, all (i, j).

    Of all queries, from the first of `rows` to the last key, those at `rows` (i,) are compared.
    """
    first, dim = int(rows[0]), 2 * len(rotary.inv_freq)
    window = (int(k_pos[first]), len(k) - first)
    if by == "table":
        freqs, scale = table(rotary, k_pos, *window)
        rotated_q = apply_rotary_pos_emb(q[None, None], freqs[..., rows, :], scale[..., rows, :])[0, 0]
        rotated_k = apply_rotary_pos_emb(k[None, None], freqs, scale**-1.0)[0, 0]
    else:
        freqs, scale = table(rotary, torch.cat((k_pos[:1] * 0, k_pos)), *window)
        complex_table = XPosTable(freqs[:, 1:], scale)
        complex_table.query_len, complex_table.dim = q.shape
        multiplied = map(upstream.multiply_pairs, (q[None, None], k[None, None]), complex_table.factors)
        rotated_q, rotated_k = (t[0, 0] for t in multiplied)
    assert rotated_q.dtype == rotated_k.dtype == q.dtype
    q, k = (rotated_pairs_first(t, dim) for t in (q, k))
    exact, size = formula.scores(q, k, k_pos[rows], k_pos, rotary_dim=dim, scale_base=rotary.scale_base)
    return (rotated_q.double() @ rotated_k.double().mT - exact).abs(), exact, size


@pytest.mark.parametrize(
    "by", [pytest.param("table", marks=pytest.mark.regression), *([] if IS_OLDER else ["factors"])]
)
@given(
    st.sampled_from([32, 64] if IS_OLDER else [4, 8, 32, 64]),
    st.sampled_from([0, 2, 8]),
    st.sampled_from(DTYPES),
    seeds,
    st.integers(1, 64),
    st.integers(0, 200),
    st.one_of(st.just(0), shifts),
    st.sampled_from([32, 100, 512]),
)
def test_scores_equal_the_formula_to_the_rounding_of_the_dtype(
    by, dim, unrotated, dtype, seed, num_queries, past, offset, scale_base
):
    rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base).to(dtype)
    k = randn(seed, past + num_queries, dim + unrotated).to(dtype)
    q = randn(seed + 1, num_queries, dim + unrotated).to(dtype)
    k_pos = torch.arange(offset, offset + len(k))

    error, _, size = score_errors(rotary, q, k, k_pos, torch.arange(past, len(k)), by)

    # The rotated query and key are rounded to their dtype once each. Before that, each component is made in float32
    # from an angle below 2 pi (rounded to 4 half ulps of 1), its cosine or sine, the power and its inverse, three
    # products and a sum: 16 half ulps of float32 of the size of the pair; |x| + |y| of each may be sqrt(2) times it.
    relative = 2 * 2 * (half_ulp(dtype) + 16 * half_ulp(torch.float32))
    # A result below the normal range is rounded to a multiple of the smallest subnormal number instead: a key scaled
    # down to nothing meets a query whose scale is at most that of the first query.
    absolute = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2 * dim
    largest = (
        2 * float(q.abs().amax() + k.abs().amax()) * float(formula.decays(dim).min()) ** -(len(k) / 2 / scale_base)
    )
    # a query never meets the keys after it
    met = k_pos <= k_pos[past:, None]
    # what is not rotated is exact, but for the sum
    bound = relative * size + absolute * largest + 64 * half_ulp(torch.float64)
    assert (error <= bound)[met].all()


# of many queries, and of one against a long cache: every 97th key, and all that are near
EVERY = torch.arange(65_536)
SPARSE = torch.cat((torch.arange(0, 999_000, 97), torch.arange(999_000, 1_000_000)))


@pytest.mark.parametrize(
    ("dtype", "num_queries", "k_pos", "tolerance"),
    [
        (torch.float32, 1, SPARSE, 1e-6),
        (torch.bfloat16, 1, SPARSE, 4e-3),
        (torch.float16, 1, SPARSE, 6e-4),
        (torch.float32, 4_096, EVERY[:4_096], 1e-6),
        (torch.float32, 65_536, EVERY, 1e-6),
    ],
)
@pytest.mark.regression
def test_scores_of_long_sequences_equal_the_formula(dtype, num_queries, k_pos, tolerance):
    rotary = RotaryEmbedding(64, use_xpos=True).to(dtype)
    # some of the queries
    rows = torch.linspace(len(k_pos) - num_queries, len(k_pos) - 1, 9).long().unique()
    q, k = randn(0, len(rows), 64).to(dtype), randn(1, len(k_pos), 64).to(dtype)

    error, exact, _ = score_errors(rotary, q, k, k_pos, rows)

    # relative to the largest score of each that it meets
    met = k_pos <= k_pos[rows, None]
    error, largest = (t.where(met, 0.0).amax(dim=-1) for t in (error, exact.abs()))
    assert (error <= tolerance * largest).all()


# tables


def of_both(pair: Tensor) -> Tensor:
    """(..., d / 2) to (..., d): what a table has for the two dims of each pair."""
    return pair.repeat_interleave(2, dim=-1) if NEIGHBORS_ROTATE else torch.cat((pair, pair), dim=-1)


def assert_table_equals(actual: tuple[Tensor, Tensor], angle: Tensor, zeta: Tensor, power: Tensor) -> None:
    """Angles (b, n, d), and decays (d,) to the power (b, n, 1), each in the table twice."""
    freqs, scale = actual
    assert ((freqs >= 0) & (freqs <= 2 * torch.pi + 1e-6)).all()
    # one rounding of angles below 2 pi, and those of product and quotient in float64, here and there
    allowed = 4 * half_ulp(freqs.dtype) + 4 * half_ulp(torch.float64) * angle.abs().max()
    apart = (freqs.double() - of_both(angle) + torch.pi).remainder(2 * torch.pi) - torch.pi
    assert apart.abs().max() <= allowed
    # rounding zeta, the power and the result: the first two are multiplied by the power, and by it and the logarithm
    half_ulps = 2 * (2 + power.abs().max() * (1 + zeta.log().abs().max()))
    rtol = half_ulps.item() * half_ulp(torch.float64) + (scale.dtype is not torch.float64) * half_ulp(scale.dtype)
    torch.testing.assert_close(scale.double(), of_both(zeta**power), rtol=rtol, atol=0)


@given(
    st.sampled_from([32, 64] if IS_OLDER else [4, 5, 8, 32, 64, 89]),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from([1.0, 4.0]),
    st.floats(8, 1000),
    st.sampled_from([*DTYPES, torch.float64]),
    st.sampled_from(["cast", "autocast", *([] if IS_OLDER else ["loaded", "set", "set nearby"])]),
    st.integers(1, 200),
    st.integers(0, 200),
    st.lists(st.integers(0, 1_000_000), max_size=0 if IS_OLDER else 3),
)
@pytest.mark.regression
def test_a_table_equals_the_formula_whatever_was_done_with_the_module(
    dim, interpolation, rescale, scale_base, dtype, how, seq_len, past, offsets
):
    options = dict(scale_base=scale_base, interpolation_factor=interpolation, base_rescale_factor=rescale)
    rotary = RotaryEmbedding(dim, use_xpos=True, **options)
    cast = deepcopy(rotary).to(dtype)
    theta, zeta = formula.angles(dim, formula.rescaled_base(dim, rescale)) / interpolation, formula.decays(dim)
    if how == "loaded":
        rotary.load_state_dict(cast.state_dict())
    else:
        rotary = cast
    if how == "set":  # a checkpoint of another base, or a context stretched at inference
        rotary.inv_freq = rotary.inv_freq * 0.97
        rotary.scale.mul_(0.97)
    if how == "set nearby":  # in the digits of float32, which no rounding to half precision leaves
        rotary.inv_freq = (rotary.inv_freq.double() * (1 + 2e-4)).float()
        rotary.scale = (rotary.scale.double() * (1 - 2e-4)).float()
    if how in ("set", "set nearby"):
        theta, zeta = rotary.inv_freq.double() / interpolation, rotary.scale.double()
    # a window for each row; without one its center is the middle of the positions
    offset = torch.tensor(offsets)[:, None]
    pos = torch.arange(-past, seq_len) + offset if offsets else torch.arange(seq_len)
    center = offset + seq_len // 2 if offsets else seq_len // 2

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        actual = table(rotary, pos, offset, seq_len) if offsets else rotary(pos)

    assert {t.dtype for t in actual} == {torch.promote_types(rotary.inv_freq.dtype, torch.float32)}
    rows = pos if IS_OLDER else pos.expand(len(actual[0]), -1)
    at = rows[..., None].double()
    assert_table_equals(actual, at * theta, zeta, (at - torch.as_tensor(center)[..., None]) / scale_base)
    if not offsets and "seq_len" in inspect.signature(rotary.forward).parameters:
        for same in (rotary.forward_from_seq_len(seq_len), rotary(pos, offset=0, seq_len=seq_len)):
            assert all(map(torch.equal, actual, same))


@few
@given(splits())
@pytest.mark.regression
def test_for_default_positions_the_window_is_known_on_the_host(lens):
    model = build({**OPTIONS, "attn_flash": True, "cross_attend": not IS_OLDER}, 0, max_mem_len=64)
    context = {} if IS_OLDER else dict(context=randn(0, 1, 5, 16), context_pos=torch.arange(5))
    x, past, new = tokens(0, 1, sum(lens)), sum(lens[:-1]), lens[-1]

    with Recorder() as recorder:
        _, cache = model(x[:, :past], return_intermediates=True, **context)
        model(x, cache=cache, cache_age=new, **context)
        _, mems = model(x[:, :past], return_mems=True, **context)
        model(x[:, past:], mems=mems, **context)
    # neither a maximum over the positions nor a value read back from the device
    assert not [name for name in recorder.names if name.startswith("aten.max") or "_local_scalar_dense" in name]


# the range of the dtype


def limit(dtype: torch.dtype, scale_base: float) -> int:
    """The most queries for which the largest scale, (1 / zeta_0) ** (n // 2 / S), is in the range of the dtype."""
    return 2 * math.floor(scale_base * math.log(torch.finfo(dtype).max) / math.log(1.4 / 0.4)) + 1


@pytest.mark.parametrize("mems", [False] if IS_OLDER else [False, True])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.regression("not refused")
def test_up_to_the_limit_finite_and_right_and_beyond_it_an_error(dtype, flash, mems):
    options = {**OPTIONS, "attn_flash": flash, "rotary_xpos_scale_base": 4, "attn_num_mem_kv": 2 * (not flash)}
    model, longest = build(options, 0, max_mem_len=8), limit(dtype, 4)
    for attention in (m for m in model.modules() if isinstance(m, Attention)):
        # nothing is refused that some parameters make right
        attention.to_q.weight.mul_(2**-6)
        attention.to_k.weight.mul_(2**-6)
    rounded, x = deepcopy(model).to(dtype), tokens(0, 2, longest + 1)

    def run(net: TransformerWrapper, length: int) -> Tensor:
        # flash attention adds a mask to the scores with keys ahead if there are mems, see limits.md
        past = net(x[:, :8], return_mems=True)[1] if mems and not flash else None
        return net(x[:, :length], mems=past)

    too_many = rf"{longest + 1} queries .* limit of {longest} .*{dtype}" + r" - .*xpos\.prefill" * IS_OLDER
    with pytest.raises(ValueError, match=too_many):
        run(rounded, longest + 1)
    actual = run(rounded, longest)
    assert torch.isfinite(actual).all()
    if not mems:  # the first queries meet them with keys scaled down to few digits, so limits.md says to stay at half
        expected = run(model, longest)
        assert (actual.double() - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.regression("not refused")
def test_the_error_comes_before_any_layer_runs_and_autocast_decides_the_dtype():
    model = build({**OPTIONS, "rotary_xpos_scale_base": 4}, 0, dtype=torch.float32)
    x, ran = tokens(0, 1, limit(torch.float16, 4) + 1), list[object]()
    for layer in model.attn_layers.layers.modules():
        layer.register_forward_pre_hook(lambda module, args: ran.append(module))

    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16"):
        model(x)
    assert not ran
    model(x)


@given(st.sampled_from(DTYPES), st.sampled_from([4, 64, 100, 512, 4096]))
def test_the_limit_is_the_same_for_every_rotated_dim(dtype, scale_base):
    longest = limit(dtype, scale_base)
    for dim in (32, 64) if IS_OLDER else (4, 32, 64):
        rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base)
        rotary(torch.arange(1))  # where it raises a NameError, that is what to say
        assert rotary.max_xpos_queries(dtype) == longest
        # the first scale of a window of so many is the last that is in range
        for queries, finite in ((longest, True), (longest + 1, False)):
            _, scale = rotary(torch.arange(1), offset=0, seq_len=queries)
            assert (scale.max().item() <= torch.finfo(dtype).max) == finite


REFUSED = [dict(rotary_xpos_scale_base=0), dict(rotary_xpos_scale_base=-5), dict(rotary_xpos_scale_base=math.nan)]


@pytest.mark.parametrize("options", REFUSED + [dict(attn_rotary_embed_values=True)] * IS_OLDER)
@pytest.mark.regression("not refused")
def test_what_cannot_be_right_is_refused_when_the_model_is_built(options):
    with pytest.raises(AssertionError, match=r"must be above 0|not compatible"):
        build({**OPTIONS, **options}, 0)(tokens(0, 1, 9))


@few
@given(decoder_options(), seeds, splits())
def test_without_a_decay_xpos_is_plain_rotary(options, seed, lens):
    options.update(rotary_xpos_scale_base=1e15, rotary_pos_emb=True)
    with_xpos, plain = (build({**options, "rotary_xpos": xpos}, seed, max_mem_len=64) for xpos in (True, False))
    # in plain rotary they are rounded to float32
    base = formula.rescaled_base(options["rotary_emb_dim"], options["rotary_base_rescale_factor"])
    plain.attn_layers.rotary_pos_emb.inv_freq.copy_(formula.angles(options["rotary_emb_dim"], base))
    text = Text(tokens(seed, 2, sum(lens)))

    for way in (partial(runs.in_segments, sizes=lens), partial(runs.in_chunks, size=lens[0])):
        assert_equal_to_rounding(way(Model(with_xpos), text), way(Model(plain), text))
