"""`RotaryEmbedding` and `apply_rotary_pos_emb` against the float64 formula, and what reaches them."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import angular_frequency, decay, rescaled_base, xpos_score, xpos_score_magnitude
from strategies import OPTIONS, build, decoder_options, few, seeds, shifts, splits, tokens
from torch import Tensor
from ways import DTYPES, Recorder, half_ulp, randn

from x_transformers import Attention
from x_transformers import x_transformers as upstream
from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb

# not in the unpatched release, where the tests of it are not run
XPosTable: Any = getattr(upstream, "XPosTable", None)


dims = st.sampled_from([4, 8, 32, 64])
dtypes = st.sampled_from(DTYPES)


def score_error_bound(q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, scale_base: float) -> Tensor:
    """The error that rounding alone forces on a score, (i, j).

    The rotated query and key are rounded to their dtype once each. Before that, each component is made
    in float32 from an angle below 2 pi (rounded to 4 half ulps of 1), its cosine or sine, the power and
    its inverse, three products and a sum: 16 half ulps of float32 of the size of the pair. A result
    below the dtype's normal range is rounded to a multiple of its smallest subnormal number instead.
    """
    relative = 2 * (half_ulp(q.dtype) + 16 * half_ulp(torch.float32))
    absolute = torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps / 2
    magnitude = xpos_score_magnitude(q, k, q_pos, k_pos, scale_base=scale_base)

    # a key scaled down to nothing meets a query whose scale is at most that of the first query
    span = (q_pos.max() - q_pos.min() + 1).double() / 2 / scale_base
    largest = 2 * (q.double().abs().amax() + k.double().abs().amax()) * decay(q.shape[-1]).min() ** -span
    return relative * magnitude + absolute * largest * q.shape[-1]


def table(rotary: RotaryEmbedding, pos: Tensor, offset: int | Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """The table of positions in the window `[offset, offset + seq_len)`, which the unpatched release cannot be told."""
    has_window = "seq_len" in inspect.signature(rotary.forward).parameters
    return rotary(pos, **(dict(offset=offset, seq_len=seq_len) if has_window else {}))


def rotated(rotary: RotaryEmbedding, q: Tensor, k: Tensor, k_pos: Tensor, by: str = "table") -> tuple[Tensor, Tensor]:
    """Queries (i, d), at the last of the positions of the keys, and keys (j, d)."""
    window = (int(k_pos[-len(q)]), len(q))
    q, k = q[None, None], k[None, None]
    if by == "table":
        freqs, scale = table(rotary, k_pos, *window)
        return apply_rotary_pos_emb(q, freqs, scale)[0, 0], apply_rotary_pos_emb(k, freqs, scale**-1.0)[0, 0]

    freqs, scale = table(rotary, torch.cat((k_pos[:1] * 0, k_pos)), *window)
    complex_table = XPosTable(freqs[:, 1:], scale)
    complex_table.query_len, complex_table.dim = q.shape[-2:]
    return tuple(t[0, 0] for t in map(upstream.multiply_pairs, (q, k), complex_table.factors))


# scores


@pytest.mark.parametrize("by", [pytest.param("table", marks=pytest.mark.regression), "factors"])
@given(
    dims,
    st.sampled_from([0, 2, 8]),
    dtypes,
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
    q_pos = k_pos[-num_queries:]

    rotated_q, rotated_k = rotated(rotary, q, k, k_pos, by)

    assert rotated_q.dtype == rotated_k.dtype == dtype
    expected = xpos_score(q, k, q_pos, k_pos, scale_base=scale_base, rotated_dim=dim)
    error = rotated_q.double() @ rotated_k.double().T - expected
    # a query never meets the keys after it
    met = k_pos[None, :] <= q_pos[:, None]
    assert torch.isfinite(error[met]).all()
    # what is not rotated is exact, but for the sum
    bound = score_error_bound(q[:, :dim], k[:, :dim], q_pos, k_pos, scale_base) + 64 * half_ulp(torch.float64)
    assert (error.abs() <= bound)[met].all()


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
    q, k, q_pos = randn(0, num_queries, 64).to(dtype), randn(1, len(k_pos), 64).to(dtype), k_pos[-num_queries:]

    rotated_q, rotated_k = rotated(rotary, q, k, k_pos)

    # some of the rows, relative to the largest score of each
    for row in torch.linspace(0, num_queries - 1, 9).long().unique():
        seen = k_pos <= q_pos[row]
        expected = xpos_score(q[row, None], k[seen], q_pos[row, None], k_pos[seen])
        error = rotated_q[row, None].double() @ rotated_k[seen].double().T - expected
        assert error.abs().max() <= tolerance * expected.abs().max()


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

    q_pos = torch.arange(past, sum(lens))
    for ind, inter in enumerate(after.attn_intermediates):
        is_cross = inter.layer_type == "c"
        without_pos = [attentions[ind].mem_k.expand(2, -1, -1, -1)] if num_mem_kv else []
        without_pos = without_pos if is_cross else [added, *without_pos]
        k = torch.cat((*without_pos, inter.cached_kv[0]), dim=-2)
        own_pos = beside["context_pos"] if is_cross else torch.arange(sum(lens))
        k_pos = torch.cat((torch.zeros(k.shape[-2] - len(own_pos), dtype=torch.long), own_pos))
        expected = xpos_score(
            attentions[ind].split_q_heads(queries[ind]),
            k,
            q_pos,
            k_pos,
            scale_base=options["rotary_xpos_scale_base"],
            base=rescaled_base(options["rotary_emb_dim"], options["rotary_base_rescale_factor"]),
            interpolation_factor=options["rotary_interpolation_factor"],
            rotated_dim=options["rotary_emb_dim"],
        )
        expected = expected * options["attn_dim_head"] ** -0.5
        met = (k_pos[None, :] <= q_pos[:, None]) | torch.tensor(is_cross)
        # float64: at most 16 products of some 10 roundings each, scaled apart by at most 3.5 ** (40 / 4) = 3e5 / 2
        tolerance = 2**8 * half_ulp(torch.float64) * expected[..., met].abs().max().item()
        torch.testing.assert_close(inter.qk_similarities[..., met], expected[..., met], rtol=0, atol=tolerance)


# tables


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """How far two angles are apart, whatever multiple of 2 pi is between them."""
    return ((a - b).double() + torch.pi).remainder(2 * torch.pi) - torch.pi


def assert_table_equals(actual: tuple[Tensor, Tensor], angle: Tensor, zeta: Tensor, power: Tensor) -> None:
    """Angles (b, n, d), and decays (d,) to the power (b, n, 1), each in the table twice."""
    freqs, scale = actual
    each = {"repeats": 2, "dim": -1}
    assert ((freqs >= 0) & (freqs <= 2 * torch.pi + 1e-6)).all()
    # one rounding of angles below 2 pi, and those of product and quotient in float64, here and there
    apart = 4 * half_ulp(freqs.dtype) + 4 * half_ulp(torch.float64) * angle.abs().max()
    assert angle_between(freqs, angle.repeat_interleave(**each)).abs().max() <= apart
    # rounding zeta, the power and the result: the first two are multiplied by the power, and by it and the logarithm
    half_ulps = 2 * (2 + power.abs().max() * (1 + zeta.log().abs().max()))
    rtol = half_ulps.item() * half_ulp(torch.float64) + (scale.dtype is not torch.float64) * half_ulp(scale.dtype)
    torch.testing.assert_close(scale.double(), (zeta**power).repeat_interleave(**each), rtol=rtol, atol=0)


@given(
    st.sampled_from([4, 5, 8, 32, 64, 89]),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from([1.0, 4.0]),
    st.floats(8, 1000),
    st.sampled_from([*DTYPES, torch.float64]),
    st.sampled_from(["cast", "loaded", "autocast", "set", "set nearby"]),
    st.integers(1, 200),
    st.integers(0, 200),
    st.lists(st.integers(0, 1_000_000), max_size=3),
)
@pytest.mark.regression
def test_a_table_equals_the_formula_whatever_was_done_with_the_module(
    dim, interpolation, rescale, scale_base, dtype, how, seq_len, past, offsets
):
    options = dict(scale_base=scale_base, interpolation_factor=interpolation, base_rescale_factor=rescale)
    rotary = RotaryEmbedding(dim, use_xpos=True, **options)
    cast = deepcopy(rotary).to(dtype)
    theta, zeta = angular_frequency(dim, rescaled_base(dim, rescale), interpolation), decay(dim)
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

    pos = pos.expand(len(actual[0]), -1)[..., None].double()
    assert_table_equals(actual, pos * theta, zeta, (pos - torch.as_tensor(center)[..., None]) / scale_base)
    if not offsets and "seq_len" in inspect.signature(rotary.forward).parameters:
        for same in (rotary.forward_from_seq_len(seq_len), rotary(torch.arange(seq_len), offset=0, seq_len=seq_len)):
            assert all(map(torch.equal, actual, same))


def test_a_table_of_a_module_that_upstream_pickled():
    rotary, pos = RotaryEmbedding(32, use_xpos=True), torch.arange(9)[None, :, None].double()
    for name in ("dim", "base"):
        vars(rotary).pop(name)

    # its digits are those of float32
    theta, zeta = rotary.inv_freq.double(), rotary.scale.double()
    assert_table_equals(rotary.forward_from_seq_len(9), pos * theta, zeta, (pos - 4) / 512)


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


@few
@given(splits())
@pytest.mark.regression
def test_for_default_positions_the_window_is_known_on_the_host(lens):
    model = build({**OPTIONS, "attn_flash": True, "cross_attend": True}, 0, max_mem_len=64)
    context = dict(context=randn(0, 1, 5, 16), context_pos=torch.arange(5))
    x, past, new = tokens(0, 1, sum(lens)), sum(lens[:-1]), lens[-1]

    with Recorder() as recorder:
        _, cache = model(x[:, :past], return_intermediates=True, **context)
        model(x, cache=cache, cache_age=new, **context)
        model(x[:, past:], cache=cache, cache_age=new, input_not_include_cache=True, **context)
        _, mems = model(x[:, :past], return_mems=True, **context)
        model(x[:, past:], mems=mems, **context)
    # neither a maximum over the positions nor a value read back from the device
    assert not [name for name in recorder.names if name.startswith("aten.max") or "_local_scalar_dense" in name]

    with Recorder() as recorder:
        model(x, pos=torch.arange(sum(lens)), **context)
        model(x, pos=torch.arange(sum(lens)), rotary_window=(0, 64), **context)
    assert not [name for name in recorder.names if "_local_scalar_dense" in name]


# factors, as models use them

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
