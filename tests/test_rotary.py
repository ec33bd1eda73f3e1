"""`RotaryEmbedding` and `apply_rotary_pos_emb` against the float64 formula, and what reaches them."""

from __future__ import annotations

import inspect
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import angular_frequency, decay, rescaled_base, xpos_score, xpos_score_magnitude
from strategies import build, decoder_options, randomize_, seeds, shifts, splits, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from x_transformers import Attention, Decoder
from x_transformers import x_transformers as upstream
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import LayerIntermediates, RotaryEmbedding, apply_rotary_pos_emb

# not in the unpatched release, where the tests of it are not run
XPosTable = getattr(upstream, "XPosTable", None)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

dims = st.sampled_from([4, 8, 32, 64])
dtypes = st.sampled_from(DTYPES)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


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


def rotated_scores(rotary: RotaryEmbedding, q: Tensor, k: Tensor, k_pos: Tensor) -> Tensor:
    """Scores (i, j) of queries (i, d), at the last of the positions of the keys (j, d)."""
    freqs, scale = table(rotary, k_pos, int(k_pos[-len(q)]), len(q))

    q = apply_rotary_pos_emb(q[None, None], freqs, scale)
    k = apply_rotary_pos_emb(k[None, None], freqs, scale**-1.0)
    return (q.double() @ k.double().transpose(-1, -2))[0, 0]


@given(
    dims,
    dtypes,
    seeds,
    st.integers(1, 64),
    st.integers(0, 200),
    st.one_of(st.just(0), shifts),
    st.sampled_from([32, 100, 512]),
)
@pytest.mark.regression
def test_scores_equal_the_formula_to_the_rounding_of_the_dtype(dim, dtype, seed, num_queries, past, offset, scale_base):
    rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base).to(dtype)
    k = randn(seed, past + num_queries, dim).to(dtype)
    q = randn(seed + 1, num_queries, dim).to(dtype)
    k_pos = torch.arange(offset, offset + len(k))
    q_pos = k_pos[-num_queries:]

    error = rotated_scores(rotary, q, k, k_pos) - xpos_score(q, k, q_pos, k_pos, scale_base=scale_base)

    # a query never meets the keys after it
    met = k_pos[None, :] <= q_pos[:, None]
    assert torch.isfinite(error[met]).all()
    assert (error.abs() <= score_error_bound(q, k, q_pos, k_pos, scale_base))[met].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [100_000, 1_000_000])
@pytest.mark.regression
def test_one_query_against_a_long_cache_equals_the_formula(dtype, context):
    # unit-normal q and k given in the dtype; relative to the largest score
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    rotary = RotaryEmbedding(64, use_xpos=True).to(dtype)
    # every 97th key, and all that are near
    k_pos = torch.cat((torch.arange(0, context - 1_000, 97), torch.arange(context - 1_000, context)))
    q, k = randn(0, 1, 64).to(dtype), randn(1, len(k_pos), 64).to(dtype)
    expected = xpos_score(q, k, k_pos[-1:], k_pos)

    error = rotated_scores(rotary, q, k, k_pos) - expected

    assert error.abs().max() <= tolerance * expected.abs().max()


def assert_sampled_rows_equal_the_formula(q: Tensor, k: Tensor, rotated_q: Tensor, rotated_k: Tensor) -> None:
    pos = torch.arange(len(q))
    for row in torch.linspace(0, len(q) - 1, 9).long().tolist():
        seen = slice(0, row + 1)
        expected = xpos_score(q[row, None], k[seen], pos[row, None], pos[seen])
        error = rotated_q[row, None].double() @ rotated_k[seen].double().T - expected
        assert error.abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("seq_len", [4_096, 65_536])
@pytest.mark.regression
def test_many_queries_at_once_equal_the_formula(seq_len):
    rotary = RotaryEmbedding(64, use_xpos=True)
    q, k = randn(0, seq_len, 64).float(), randn(1, seq_len, 64).float()
    freqs, scale = table(rotary, torch.arange(seq_len), 0, seq_len)
    rotated_q = apply_rotary_pos_emb(q[None, None], freqs, scale)[0, 0]
    rotated_k = apply_rotary_pos_emb(k[None, None], freqs, scale**-1.0)[0, 0]

    assert_sampled_rows_equal_the_formula(q, k, rotated_q, rotated_k)


@pytest.mark.parametrize("attends", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.regression
def test_many_queries_at_once_through_a_model_equal_the_formula(attends):
    seq_len, dim_head = 65_536, 64
    options = dict(attn_dim_head=dim_head, attn_flash=True, rotary_xpos=True, rotary_emb_dim=dim_head)
    decoder = randomize_(Decoder(dim=dim_head, depth=1, heads=1, **options), 0).eval().requires_grad_(False)
    attention = next(m for m in decoder.modules() if isinstance(m, Attention))
    seen: dict[str, Tensor] = {}
    attention.to_q.register_forward_hook(lambda module, args, out: seen.update(q=out[0].clone()))
    attention.to_k.register_forward_hook(lambda module, args, out: seen.update(k=out[0].clone()))
    attention.attend.register_forward_pre_hook(
        lambda module, args: seen.update(rotated_q=args[0][0, 0], rotated_k=args[1][0, 0])
    )
    if not attends:  # attention itself takes long
        attention.attend.forward = lambda q, k, v, **_: (v, Intermediates())

    assert torch.isfinite(decoder(randn(0, 1, seq_len, dim_head).float())).all()

    assert_sampled_rows_equal_the_formula(**seen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.regression
def test_attention_over_a_cache_of_100_000_equals_the_formula(dtype):
    # the whole of AttentionLayers: one token decoded against a cache that is given
    context, dim_head = 100_000, 32
    decoder = Decoder(dim=dim_head, depth=1, heads=1, attn_dim_head=dim_head, rotary_xpos=True, rotary_emb_dim=dim_head)
    decoder = decoder.to(dtype).eval().requires_grad_(False)
    attention = next(m for m in decoder.modules() if isinstance(m, Attention))

    x = randn(0, 1, 1, dim_head).to(dtype)
    past = randn(1, 1, 1, context - 1, dim_head).to(dtype)
    cached = Intermediates(cached_kv=(past, past), layer_type="a")

    queries: list[Tensor] = []
    attention.to_q.register_forward_hook(lambda module, args, out: queries.append(out))

    cache = LayerIntermediates(attn_intermediates=[cached], cache_length=context - 1)
    out, after = decoder(x, cache=cache, return_hiddens=True)
    inter = after.attn_intermediates[0]

    q, k = queries[0][0], inter.cached_kv[0][0, 0]
    k_pos = torch.arange(context)
    expected = xpos_score(q, k, k_pos[-1:], k_pos) * dim_head**-0.5
    error = inter.qk_similarities[0, 0].double() - expected

    # the dot product comes out of the model in its dtype: one rounding of the score more, and as many
    # roundings of float32 as there are terms
    bound = score_error_bound(q, k, k_pos[-1:], k_pos, 512)
    bound = bound + (half_ulp(dtype) + dim_head * half_ulp(torch.float32)) * xpos_score_magnitude(
        q, k, k_pos[-1:], k_pos
    )
    assert torch.isfinite(out).all()
    assert (error.abs() <= bound * dim_head**-0.5 + 2 * half_ulp(dtype) * expected.abs()).all()


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """How far two angles are apart, whatever multiple of 2 pi is between them."""
    return ((a - b).double() + torch.pi).remainder(2 * torch.pi) - torch.pi


@given(dims, st.integers(1, 100), st.integers(0, 100), st.integers(0, 100), shifts, st.booleans())
@pytest.mark.regression
def test_moving_window_and_positions_together_turns_all_angles_by_the_same(dim, seq_len, past, offset, shift, double):
    rotary = RotaryEmbedding(dim, use_xpos=True)
    rotary = rotary.double() if double else rotary
    pos = torch.arange(offset - past, offset + seq_len)

    freqs, scale = table(rotary, pos, offset, seq_len)
    moved_freqs, moved_scale = table(rotary, pos + shift, offset + shift, seq_len)

    assert torch.equal(moved_scale, scale)
    # an angle is a product, rounded in float64, and then, below 2 pi, to a multiple of half an ulp of 4
    roundings = (shift + 300) * 2 * half_ulp(torch.float64) + 2 * 4 * half_ulp(freqs.dtype)
    turned = angle_between(moved_freqs, freqs)
    assert angle_between(turned, turned[:, :1]).abs().max() <= 2 * roundings


@given(
    dims, st.integers(1, 200), st.sampled_from([1.0, 2.5]), st.sampled_from([1.0, 4.0]), st.sampled_from([8, 100, 512])
)
def test_without_a_window_the_center_is_the_middle_of_the_positions(dim, seq_len, interpolation, rescale, scale_base):
    rotary = RotaryEmbedding(
        dim,
        use_xpos=True,
        scale_base=scale_base,
        interpolation_factor=interpolation,
        base_rescale_factor=rescale,
    )
    pos = torch.arange(seq_len)

    freqs, scale = rotary(pos)

    theta = angular_frequency(dim, rescaled_base(dim, rescale), interpolation)
    power = (pos - (pos.max() + 1) // 2).double() / scale_base
    each = {"repeats": 2, "dim": -1}
    assert freqs.shape == scale.shape == (1, seq_len, dim)
    # one rounding to float32, of angles below 2 pi
    angle = (pos[:, None] * theta).repeat_interleave(**each)
    assert (freqs >= 0).all()
    assert (freqs <= 2 * torch.pi + 1e-6).all()
    assert angle_between(freqs[0], angle).abs().max() <= 4 * half_ulp(torch.float32)
    torch.testing.assert_close(
        scale[0].double(), (decay(dim) ** power[:, None]).repeat_interleave(**each), rtol=6e-8, atol=0
    )


@given(dims, st.floats(16, 1000), st.integers(1, 10_000))
@pytest.mark.regression
def test_the_decay_is_computed_in_float64_for_any_scale_base(dim, scale_base, seq_len):
    rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base).double()
    pos = torch.arange(seq_len)

    _, scale = table(rotary, pos, 0, seq_len)

    power = (pos - seq_len // 2).double() / scale_base
    expected = decay(dim) ** power[:, None]
    # rounding zeta, the power and the result: the first two are multiplied by the power, and by it and the logarithm
    half_ulps = 2 * (2 + power.abs().max() * (1 + decay(dim).log().abs().max()))
    torch.testing.assert_close(scale[0, :, ::2], expected, rtol=half_ulps.item() * half_ulp(torch.float64), atol=0)


@given(dims, st.integers(1, 200))
@pytest.mark.regression("no argument")
def test_forward_from_seq_len_is_the_window_from_zero(dim, seq_len):
    rotary = RotaryEmbedding(dim, use_xpos=True)

    expected = rotary(torch.arange(seq_len), offset=0, seq_len=seq_len)

    assert all(torch.equal(a, b) for a, b in zip(rotary.forward_from_seq_len(seq_len), expected))


@given(dims, st.integers(1, 3), st.integers(1, 40), seeds)
@pytest.mark.regression
def test_each_row_of_positions_has_its_own_window(dim, batch, seq_len, seed):
    generator = torch.Generator().manual_seed(seed)
    rotary = RotaryEmbedding(dim, use_xpos=True)
    offset = torch.randint(0, 1_000_000, (batch, 1), generator=generator)
    pos = torch.arange(seq_len) + offset

    together = table(rotary, pos, offset, seq_len)

    for row in range(batch):
        alone = table(rotary, pos[row], offset[row].item(), seq_len)
        assert all(torch.equal(t[row], a[0]) for t, a in zip(together, alone))


@given(dims, st.integers(1, 300), st.sampled_from([torch.bfloat16, torch.float16]))
@pytest.mark.regression
def test_the_dtype_of_the_module_does_not_reach_the_table(dim, seq_len, dtype):
    rotary = RotaryEmbedding(dim, use_xpos=True)
    cast = deepcopy(rotary).to(dtype)
    loaded = RotaryEmbedding(dim, use_xpos=True)
    loaded.load_state_dict(cast.state_dict())
    pos = torch.arange(seq_len)

    expected = table(rotary, pos, 0, seq_len)

    for module in (cast, loaded):
        assert all(torch.equal(a, b) for a, b in zip(table(module, pos, 0, seq_len), expected))

    # autocast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(table(rotary, pos, 0, seq_len), expected))


@given(dims, st.integers(1, 300), dtypes)
def test_without_xpos_the_window_is_ignored(dim, seq_len, dtype):
    rotary = RotaryEmbedding(dim).to(dtype)
    pos = torch.arange(seq_len)

    freqs, scale = rotary(pos)

    assert scale == 1.0
    assert freqs.dtype == dtype
    expected = pos.to(dtype)[:, None] * rotary.inv_freq[None, :]
    assert torch.equal(freqs[0], expected.repeat_interleave(2, dim=-1))


def test_a_module_pickled_by_an_earlier_version_takes_its_buffers():
    rotary = RotaryEmbedding(32, use_xpos=True)
    earlier = deepcopy(rotary)
    del earlier.base
    pos = torch.arange(300)

    expected, actual = (m(pos, offset=0, seq_len=300) for m in (rotary, earlier))

    # the buffers hold theta and zeta rounded to float32: relative to angle and to power (up to 300) 6e-8
    assert angle_between(actual[0], expected[0]).abs().max() < 300 * 1.2e-7
    torch.testing.assert_close(actual[1], expected[1], rtol=300 * 1.2e-7, atol=0)


@given(dims, st.integers(2, 300), st.floats(0.01, 0.97), st.sampled_from([torch.float32, torch.float64]))
def test_frequencies_that_are_set_are_those_that_are_used(dim, seq_len, factor, dtype):
    # a checkpoint of another base, or a context stretched at inference
    rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=64).to(dtype)
    pos = torch.arange(seq_len)
    rotary.inv_freq = rotary.inv_freq * factor
    rotary.scale.mul_(factor)

    freqs, scale = table(rotary, pos, 0, seq_len)

    angle = pos[:, None] * rotary.inv_freq.double()
    power = (pos - seq_len // 2).double()[:, None] / 64
    assert angle_between(freqs[0, :, ::2], angle).abs().max() <= 4 * half_ulp(freqs.dtype) + 300 * 1e-15
    expected = (rotary.scale.double() ** power).to(dtype)
    torch.testing.assert_close(scale[0, :, ::2], expected, rtol=1e-12 if dtype is torch.float64 else 2e-7, atol=0)


@given(st.integers(3, 45).map(lambda half: 2 * half - 1), st.sampled_from([torch.float32, *DTYPES]))
def test_an_odd_dim_has_the_frequencies_of_upstream(dim, dtype):
    rotary = RotaryEmbedding(dim, use_xpos=True)
    frequencies = 10_000.0 ** -(torch.arange(0, dim, 2).double() / dim)
    decays = (torch.arange(0, dim, 2).double() / dim + 0.4) / 1.4
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=1e-6, atol=0)

    freqs, scale = table(rotary.to(dtype), torch.arange(2), 0, 1)

    torch.testing.assert_close(freqs[0, 1, ::2].double(), frequencies, rtol=1e-7, atol=0)
    torch.testing.assert_close(scale[0, 1, ::2].double(), decays ** (1 / 512), rtol=1e-7, atol=0)


@given(
    st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32, torch.float64]),
    st.integers(1, 120),
    st.booleans(),
)
def test_positions_may_have_any_dtype(dtype, seq_len, per_row):
    model = build(dict(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_xpos=True, verbose=False), 0).attn_layers
    x, pos = randn(0, 2, seq_len, 16), torch.arange(seq_len)
    pos = torch.stack((pos, pos)) if per_row else pos

    assert torch.equal(model(x, pos=pos.to(dtype)), model(x, pos=pos))


@given(decoder_options(flash=False), seeds, splits())
def test_scores_of_a_model_equal_the_formula(options, seed, lens):
    options.update(attn_kv_heads=options["heads"], attn_qk_norm=False)
    model = build(options, seed)
    past, seq_len = sum(lens[:-1]), sum(lens)
    x = tokens(seed, 2, seq_len)
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    queries: dict[int, Tensor] = {}

    for ind, attention in enumerate(attentions):
        attention.to_q.register_forward_hook(lambda module, args, out, ind=ind: queries.update({ind: out}))

    _, cache = model(x[:, :past], return_intermediates=True)
    _, after = model(x, cache=cache, cache_age=lens[-1], return_intermediates=True)

    k_pos = torch.arange(seq_len)
    met = k_pos[None, :] <= k_pos[past:, None]

    for ind, inter in enumerate(after.attn_intermediates):
        q = attentions[ind].split_q_heads(queries[ind])
        expected = xpos_score(
            q,
            inter.cached_kv[0],
            k_pos[past:],
            k_pos,
            scale_base=options["rotary_xpos_scale_base"],
            base=rescaled_base(options["rotary_emb_dim"], options["rotary_base_rescale_factor"]),
            interpolation_factor=options["rotary_interpolation_factor"],
            rotated_dim=options["rotary_emb_dim"],
        )
        expected = expected * options["attn_dim_head"] ** -0.5
        # float64: at most 16 products of some 10 roundings each, scaled apart by at most 3.5 ** (40 / 4) = 3e5 / 2
        tolerance = 2**8 * half_ulp(torch.float64) * expected.abs().max().item()
        torch.testing.assert_close(inter.qk_similarities[..., met], expected[..., met], rtol=0, atol=tolerance)


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@given(splits())
@pytest.mark.regression
def test_for_default_positions_the_window_is_known_on_the_host(lens):
    options = dict(dim=8, depth=1, heads=2, attn_dim_head=8, rotary_xpos=True, verbose=False)
    model = build({**options, "attn_flash": True}, 0, max_mem_len=64)
    windows: list[tuple[object, object]] = []
    rotary = model.attn_layers.rotary_pos_emb
    forward = rotary.forward

    def record(t, **window):
        windows.append((window.get("offset", 0), window.get("seq_len")))
        return forward(t, **window)

    rotary.forward = record
    past, new = sum(lens[:-1]), lens[-1]
    seq_len = past + new
    x = tokens(0, 1, seq_len)

    with Recorder() as recorder:
        _, cache = model(x[:, :past], return_intermediates=True)
        model(x, cache=cache, cache_age=new)
        model(x[:, past:], cache=cache, cache_age=new, input_not_include_cache=True)
        _, mems = model(x[:, :past], return_mems=True)
        model(x[:, past:], mems=mems)

    assert windows
    assert all(type(value) is int for window in windows for value in window)
    # neither a maximum over the positions nor a value read back from the device
    assert not [name for name in recorder.names if name.startswith("aten.max") or "_local_scalar_dense" in name]


# tables, as models use them


@given(dims, st.sampled_from([0, 2, 8]), dtypes, seeds, st.integers(1, 40), st.integers(0, 60))
def test_factors_equal_the_formula_to_the_rounding_of_the_dtype(dim, unrotated, dtype, seed, num_queries, past):
    rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=32).to(dtype)
    pos = torch.arange(past + num_queries)
    k = randn(seed, len(pos), dim + unrotated).to(dtype)
    q = randn(seed + 1, num_queries, dim + unrotated).to(dtype)
    freqs, scale = rotary(torch.cat((pos[:1] * 0, pos)), offset=past, seq_len=num_queries)
    factors = XPosTable(freqs[:, 1:], scale).with_factors(num_queries, dim + unrotated).factors

    assert all(upstream.can_multiply_pairs(t[None, None], factor) for t, factor in zip((q, k), factors))
    rotated_q, rotated_k = (upstream.multiply_pairs(t[None, None], factor) for t, factor in zip((q, k), factors))

    assert rotated_q.dtype == rotated_k.dtype == dtype
    q_pos = pos[past:]
    error = (rotated_q.double() @ rotated_k.double().mT)[0, 0] - xpos_score(
        q, k, q_pos, pos, scale_base=32, rotated_dim=dim
    )
    met = pos[None, :] <= q_pos[:, None]
    bound = score_error_bound(q[:, :dim], k[:, :dim], q_pos, pos, 32)
    # what is not rotated is exact: it is multiplied by one
    assert (error.abs() <= bound + 64 * torch.finfo(torch.float64).eps)[met].all()


@given(st.sampled_from([4, 8]), seeds, st.integers(1, 4), st.booleans())
def test_gradients_through_factors_are_right(dim, seed, seq_len, partial):
    rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=8).double()
    table = XPosTable(*rotary(torch.arange(seq_len), seq_len=seq_len)).with_factors(seq_len, dim + 4 * partial)
    t = randn(seed, 1, 2, seq_len, dim + 4 * partial).requires_grad_()

    assert torch.autograd.gradcheck(upstream.multiply_pairs, (t, table.factors[1]))


class Relaid(torch.nn.Module):
    """The same values in another layout, as a projection of one's own may have."""

    def __init__(self, projection: torch.nn.Module, layout: str) -> None:
        super().__init__()
        self.projection, self.layout = projection, layout

    def forward(self, x: Tensor) -> Tensor:
        t = self.projection(x)
        if self.layout == "odd rows":
            return torch.nn.functional.pad(t, (0, 1))[..., :-1]
        if self.layout == "odd offset":
            return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)
        return t.mT.contiguous().mT


@given(decoder_options(), seeds, splits(), st.sampled_from(["odd rows", "odd offset", "columns first"]))
def test_queries_and_keys_may_have_any_layout(options, seed, lens, layout):
    model, x = build(options, seed), tokens(seed, 2, sum(lens))
    expected = model(x)

    for attention in (m for m in model.modules() if isinstance(m, Attention)):
        attention.to_q, attention.to_k = (Relaid(t, layout) for t in (attention.to_q, attention.to_k))

    _, cache = model(x[:, : lens[0]], return_intermediates=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    decoded = model(x, cache=cache, cache_age=sum(lens[1:]))
    torch.testing.assert_close(decoded, expected[:, lens[0] :], rtol=1e-9, atol=1e-9)


def test_the_signature_is_upstreams_with_seq_len_added():
    parameters = inspect.signature(RotaryEmbedding.forward).parameters

    assert list(parameters) == ["self", "t", "offset", "seq_len"]
    assert parameters["offset"].default == 0
    assert parameters["seq_len"].default is None
