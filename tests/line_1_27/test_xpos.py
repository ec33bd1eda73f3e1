"""The package of the line 1.27.x: what `test_properties` and `test_rotary` state, as far as its older API goes.

Runs where that package is imported, as test_backport.py does: `pytest --package <tree> tests/line_1_27`. Models are in
float64, where a violation of the mathematics stands far above rounding, with every parameter drawn at random.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import angular_frequency, rescaled_base, xpos_score, xpos_score_magnitude
from strategies import NUM_TOKENS, randomize_, seeds, softmax, splits, tokens
from test_properties import assert_equal_to_rounding
from test_rotary import DTYPES, Recorder, half_ulp, randn, score_error_bound
from torch import Tensor
from torch.nn import Module

from x_transformers import (
    Attention,
    AutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
)
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import LayerIntermediates, RotaryEmbedding, apply_rotary_pos_emb
from x_transformers.xpos import fold_mem_kv_

# upstream's own: the release is older than torch's new names
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MAX_SEQ_LEN = 256

lengths = st.integers(2, 40)


@st.composite
def decoder_options(draw: st.DrawFn, flash: bool | None = None, mem_kv: bool = False) -> dict[str, Any]:
    """Keyword arguments of a small `Decoder` with xPos. This release rotates at least 32 dims of a head."""
    dim_head, heads = draw(st.sampled_from([32, 48])), draw(st.sampled_from([2, 4]))
    flash = draw(st.booleans()) if flash is None else flash
    num_mem_kv = draw(st.integers(0, 4)) if mem_kv else 0
    # flash attention with one key head takes no more keys than queries in this release, with any positions; and it has
    # as many memory keys as there are heads of queries
    kv_heads = [heads] if num_mem_kv else [h for h in (1, 2, 4) if h <= heads and not (flash and h == 1)]

    return dict(
        dim=draw(st.sampled_from([8, 16])),
        depth=draw(st.integers(1, 2)),
        heads=heads,
        attn_dim_head=dim_head,
        attn_kv_heads=draw(st.sampled_from(kv_heads)),
        attn_qk_norm=draw(st.booleans()),
        attn_flash=flash,
        attn_num_mem_kv=num_mem_kv,
        rotary_xpos=True,
        rotary_emb_dim=draw(st.sampled_from([32, dim_head])),
        rotary_xpos_scale_base=draw(st.sampled_from([4, 32, 512])),
        rotary_interpolation_factor=draw(st.sampled_from([1.0, 2.5])),
        rotary_base_rescale_factor=draw(st.sampled_from([1.0, 4.0])),
    )


def prepared(module: Module, seed: int, dtype: torch.dtype = torch.float64) -> Any:
    """A randomised module in eval mode, whose softmax does not go through float32."""
    module = randomize_(module.double(), seed).to(dtype).eval()
    for attention in (m for m in module.modules() if isinstance(m, Attention)):
        attention.attend.attn_fn = softmax
    return module.requires_grad_(False)


def build(options: dict[str, Any], seed: int, dtype: torch.dtype = torch.float64, **wrapper_options: Any) -> Any:
    sizes = dict(num_tokens=NUM_TOKENS, max_seq_len=MAX_SEQ_LEN)
    net = TransformerWrapper(attn_layers=Decoder(**options), **{**sizes, **wrapper_options})
    return prepared(net, seed, dtype)


def nets(mem_kv: bool = False, **wrapper_options: Any) -> st.SearchStrategy[Any]:
    options = {name: st.just(value) for name, value in wrapper_options.items()}
    return st.builds(build, decoder_options(mem_kv=mem_kv), seeds, **options)


def prefill(model: Module, x: Tensor, chunk_lens: list[int], **kwargs: Any) -> Tensor:
    """Outputs of consecutive chunks through the cache; all so far are passed, `cache_age` says how many are new."""
    out, cache, end = [], None, 0
    for new in chunk_lens:
        end += new
        logits, cache = model(x[:, :end], cache=cache, cache_age=new, return_intermediates=True, **kwargs)
        out.append(logits)
    return torch.cat(out, dim=1)


def decode(model: Module, x: Tensor, prompt_len: int, **kwargs: Any) -> Tensor:
    return prefill(model, x, [prompt_len, *[1] * (x.shape[1] - prompt_len)], **kwargs)


def segments(model: Module, x: Tensor, lens: list[int], **kwargs: Any) -> tuple[Tensor, Any]:
    out, mems = [], None
    for segment in x.split(lens, dim=1):
        logits, mems = model(segment, mems=mems, return_mems=True, **kwargs)
        out.append(logits)
    return torch.cat(out, dim=1), mems


def in_pairs(t: Tensor, rotated_dim: int) -> Tensor:
    """The rotated dims as the reference has them: this release rotates dim d with d + rotated_dim / 2."""
    halves = t[..., :rotated_dim].unflatten(-1, (2, -1))
    return torch.cat((halves.transpose(-1, -2).flatten(-2), t[..., rotated_dim:]), dim=-1)


# the same at every length


@given(nets(mem_kv=True), seeds, splits())
@pytest.mark.regression
def test_a_prefix_the_cache_and_a_row_alone_give_what_the_full_forward_gives(model, seed, lens):
    x = tokens(seed, 2, sum(lens))
    full = model(x)

    assert_equal_to_rounding(model(x[:, : lens[0]]), full[:, : lens[0]])
    assert_equal_to_rounding(decode(model, x, lens[0]), full)
    assert_equal_to_rounding(prefill(model, x, lens), full)
    assert_equal_to_rounding(model(x[1:]), full[1:])


@given(nets(max_mem_len=1024), seeds, splits(), splits())
@pytest.mark.regression
def test_segments_and_decoding_with_mems_equal_the_full_forward(model, seed, mem_lens, lens):
    # https://github.com/lucidrains/x-transformers/issues/233
    x = tokens(seed, 2, sum(mem_lens) + sum(lens))
    segment = x[:, sum(mem_lens) :]

    expected = model(x)[:, sum(mem_lens) :]
    before, mems = segments(model, x[:, : sum(mem_lens)], mem_lens)

    assert_equal_to_rounding(before, model(x)[:, : sum(mem_lens)])
    assert_equal_to_rounding(model(segment, mems=mems), expected)
    assert_equal_to_rounding(prefill(model, segment, lens, mems=mems), expected)


@given(nets(), seeds, lengths, st.lists(st.integers(0, 20), min_size=1, max_size=3))
@pytest.mark.regression
def test_left_padding_changes_nothing(model, seed, seq_len, pads):
    batch, widest = len(pads), max(pads)
    x = tokens(seed, batch, seq_len)
    padded = torch.cat((tokens(seed + 1, batch, widest), x), dim=1)
    start = torch.full((batch,), widest)

    expected = model(x)

    assert_equal_to_rounding(model(padded, seq_start_pos=start)[:, widest:], expected)
    assert_equal_to_rounding(decode(model, padded, widest + 1, seq_start_pos=start)[:, widest:], expected)


@given(nets(), seeds, splits(), st.integers(1, 12))
@pytest.mark.regression
def test_prepended_embeddings_are_positions_like_any_other(model, seed, lens, num_prepended):
    x = tokens(seed, 2, sum(lens))
    prefix = tokens(seed + 1, 2, num_prepended)
    embeds = model.token_emb(prefix)

    full = model(torch.cat((prefix, x), dim=1))

    assert_equal_to_rounding(model(x, prepend_embeds=embeds), full)


@given(nets(num_memory_tokens=2, memory_tokens_interspersed_every=4), seeds, st.integers(1, 5), st.integers(1, 5))
@pytest.mark.regression
def test_interspersed_memory_tokens_keep_prefix_consistency(model, seed, blocks, more_blocks):
    prefix_len = 4 * blocks
    x = tokens(seed, 2, prefix_len + 4 * more_blocks)

    assert_equal_to_rounding(model(x[:, :prefix_len]), model(x)[:, :prefix_len])


@given(nets(), seeds, st.integers(1, 12), st.integers(1, 24))
@pytest.mark.regression
def test_greedy_generation_is_the_same_with_and_without_a_cache(model, seed, prompt_len, num_new):
    prompt = tokens(seed, 2, prompt_len)
    wrapper = AutoregressiveWrapper(model).eval()

    cached = wrapper.generate(prompt, num_new, temperature=0.0, cache_kv=True)
    uncached = wrapper.generate(prompt, num_new, temperature=0.0, cache_kv=False)

    assert torch.equal(cached, uncached)


@given(nets(mem_kv=True), seeds, splits())
@pytest.mark.regression
def test_gradients_do_not_depend_on_what_follows(model, seed, lens):
    x = tokens(seed, 2, sum(lens))
    params = list(model.requires_grad_(True).parameters())

    outputs = model(x[:, : lens[0]]), model(x)[:, : lens[0]]
    prefix, full = (torch.autograd.grad(out.square().sum(), params, allow_unused=True) for out in outputs)

    assert [grad is None for grad in prefix] == [grad is None for grad in full]
    for actual, expected in zip(prefix, full):
        if actual is not None:
            assert_equal_to_rounding(actual, expected)


@given(decoder_options(mem_kv=True), seeds, seeds, splits())
@pytest.mark.regression
def test_without_a_decay_xpos_is_plain_rotary(options, seed, data_seed, lens):
    options.update(rotary_xpos_scale_base=1e15)
    with_xpos, plain = (
        build({**options, "rotary_xpos": xpos, "rotary_pos_emb": True}, seed, max_mem_len=1024)
        for xpos in (True, False)
    )
    # in place of those of float32
    rotary = plain.attn_layers.rotary_pos_emb
    dim, factor = options["rotary_emb_dim"], options["rotary_base_rescale_factor"]
    rotary.inv_freq.copy_(angular_frequency(dim, rescaled_base(dim, factor)))
    x = tokens(data_seed, 2, sum(lens))

    assert_equal_to_rounding(with_xpos(x), plain(x))
    assert_equal_to_rounding(prefill(with_xpos, x, lens), prefill(plain, x, lens))
    assert_equal_to_rounding(segments(with_xpos, x, lens)[0], segments(plain, x, lens)[0])


# each option of a decoder: what plain rotary keeps with it, xPos keeps too - but those with which this release has no
# answer in float64, or one that changes with the length whatever the positions

OPTIONS = (
    dict(alibi_pos_bias=True),
    dict(attn_add_zero_kv=True),
    dict(attn_gate_value_heads=True),
    dict(attn_gate_values=True),
    dict(attn_head_scale=True),
    dict(attn_max_attend_past=5),
    dict(attn_num_mem_kv=3),
    dict(attn_on_attn=True),
    dict(attn_one_kv_head=True),
    dict(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    dict(attn_shared_kv=True),
    dict(attn_talking_heads=True),
    dict(attn_tensor_product=True),
    dict(attn_value_dim_head=16),
    dict(cross_attend=True),
    dict(gate_residual=True),
    dict(layers_execute_order=(0, 1, 0, 1)),
    dict(pre_norm=False),
    dict(rel_pos_bias=True),
    dict(resi_dual=True),
    dict(residual_attn=True),
    dict(sandwich_coef=1),
    dict(sandwich_norm=True),
    dict(shift_tokens=1),
    dict(use_rmsnorm=True),
    dict(weight_tie_layers=True),
)


def kept(options: dict[str, Any], inputs: dict[str, Tensor]) -> set[str]:
    model = build(options, 0, max_mem_len=64)
    x = tokens(1, 2, 21)
    full = model(x, **inputs)
    ways = {
        "prefix": lambda: (model(x[:, :8], **inputs), full[:, :8]),
        "cache": lambda: (prefill(model, x, [8, 5, *[1] * 8], **inputs), full),
        "mems": lambda: (segments(model, x, [8, 5, 8], **inputs)[0], full),
    }
    found = set()
    for name, way in ways.items():
        # what raises or differs is not kept
        with suppress(RuntimeError, AssertionError, ValueError):
            assert_equal_to_rounding(*way())
            found.add(name)
    return found


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: next(iter(option)))
@pytest.mark.regression
def test_xpos_keeps_with_an_option_what_plain_rotary_keeps(option):
    options = dict(dim=16, depth=2, heads=4, attn_dim_head=32, **option)
    inputs = dict(context=randn(2, 2, 7, 16)) if "cross_attend" in option else {}

    with_xpos = kept(dict(rotary_xpos=True, rotary_xpos_scale_base=8, **options), inputs)
    with_plain_rotary = kept(dict(rotary_pos_emb=True, **options), inputs)

    assert with_plain_rotary
    assert with_plain_rotary <= with_xpos


# equal to the paper's formula


@given(decoder_options(flash=False), seeds, splits())
@pytest.mark.regression
def test_scores_of_a_model_equal_the_formula(options, seed, lens):
    options.update(attn_kv_heads=options["heads"], attn_qk_norm=False)
    model = build(options, seed)
    past, seq_len, dim = sum(lens[:-1]), sum(lens), options["rotary_emb_dim"]
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
        q = queries[ind].unflatten(-1, (options["heads"], -1)).transpose(1, 2)
        expected = xpos_score(
            in_pairs(q, dim),
            in_pairs(inter.cached_kv[0], dim),
            k_pos[past:],
            k_pos,
            scale_base=options["rotary_xpos_scale_base"],
            base=rescaled_base(dim, options["rotary_base_rescale_factor"]),
            interpolation_factor=options["rotary_interpolation_factor"],
            rotated_dim=dim,
        )
        expected = expected * options["attn_dim_head"] ** -0.5
        # float64: at most 48 products of some 10 roundings each, scaled apart by at most 3.5 ** (40 / 4) = 3e5 / 2
        tolerance = 2**9 * half_ulp(torch.float64) * expected.abs().max().item()
        torch.testing.assert_close(inter.qk_similarities[..., met], expected[..., met], rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale_base", [512, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.regression
def test_attention_over_a_cache_of_100_000_equals_the_formula(dtype, scale_base):
    # at the larger scale base distant keys count, and with them what is left of their angles in float32
    context, dim = 100_000, 32
    rotary = dict(rotary_xpos=True, rotary_emb_dim=dim, rotary_xpos_scale_base=scale_base)
    decoder = Decoder(dim=dim, depth=1, heads=1, attn_dim_head=dim, **rotary)
    decoder = decoder.to(dtype).eval().requires_grad_(False)
    attention = next(m for m in decoder.modules() if isinstance(m, Attention))

    # all that is in the cache has to be passed along in this release, and is not read
    x = randn(0, 1, 1, dim).to(dtype).expand(1, context, dim)
    past = randn(1, 1, 1, context - 1, dim).to(dtype)
    queries: list[Tensor] = []
    attention.to_q.register_forward_hook(lambda module, args, out: queries.append(out))

    cache = LayerIntermediates(attn_intermediates=[Intermediates(cached_kv=(past, past))])
    out, after = decoder(x, cache=cache, return_hiddens=True)
    inter = after.attn_intermediates[0]

    q, k = in_pairs(queries[0][0], dim), in_pairs(inter.cached_kv[0][0, 0], dim)
    k_pos = torch.arange(context)
    expected = xpos_score(q, k, k_pos[-1:], k_pos, scale_base=scale_base) * dim**-0.5
    error = inter.qk_similarities[0, 0].double() - expected

    # the dot product comes out of the model in its dtype: one rounding of the score more, and as many
    # roundings of float32 as there are terms
    magnitude = xpos_score_magnitude(q, k, k_pos[-1:], k_pos, scale_base=scale_base)
    bound = score_error_bound(q, k, k_pos[-1:], k_pos, scale_base)
    bound = bound + (half_ulp(dtype) + dim * half_ulp(torch.float32)) * magnitude
    assert torch.isfinite(out).all()
    assert (error.abs() <= bound * dim**-0.5 + 2 * half_ulp(dtype) * expected.abs()).all()


@given(st.sampled_from([32, 64]), st.integers(1, 300), st.integers(0, 1_000_000), st.sampled_from(DTYPES[1:]))
@pytest.mark.regression
def test_angles_are_of_the_positions_and_powers_of_the_distance_to_the_center(dim, seq_len, offset, dtype):
    rotary = RotaryEmbedding(dim, use_xpos=True)
    pos = torch.arange(-5, seq_len)
    rotary(pos)  # where it raises a NameError, that is what to say

    freqs, scale = rotary(pos + offset, offset=offset, seq_len=seq_len)
    cast = deepcopy(rotary).to(dtype)(pos + offset, offset=offset, seq_len=seq_len)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = rotary(pos + offset, offset=offset, seq_len=seq_len)

    # wherever the window is
    assert torch.equal(scale, rotary(pos, offset=0, seq_len=seq_len)[1])
    # in float64, of which an angle of 1,000,000 has 2 ** -33 left, and rounded once
    exact = (pos + offset).double()[:, None] * angular_frequency(dim).repeat(2)
    apart = (freqs.double() - exact + torch.pi).remainder(2 * torch.pi) - torch.pi
    assert apart.abs().max() <= 2 * torch.pi * half_ulp(torch.float32) + 2**-30
    # whatever the dtype
    for table in (cast, under_autocast):
        assert torch.equal(table[0], freqs)
        assert torch.equal(table[1], scale)


@given(st.integers(1, 200))
@pytest.mark.regression
def test_without_a_window_the_center_is_the_middle_of_the_positions(seq_len):
    rotary = RotaryEmbedding(32, use_xpos=True)

    from_positions, from_seq_len = rotary(torch.arange(seq_len)), rotary.forward_from_seq_len(seq_len)
    with_window = rotary(torch.arange(seq_len), offset=0, seq_len=seq_len)

    assert all(torch.equal(a, b) for a, b in zip(from_positions, with_window))
    assert all(torch.equal(a, b) for a, b in zip(from_seq_len, with_window))


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.regression
def test_half_precision_comes_out_as_it_went_in(dtype, flash):
    options = dict(dim=16, depth=2, heads=2, attn_dim_head=48, attn_flash=flash)
    x = tokens(0, 2, 64)

    def errors(**positions: bool) -> list[float]:
        exact = build({**options, **positions}, 0, use_abs_pos_emb=False)
        expected = exact(x)
        outputs = [deepcopy(exact).to(dtype)(x)]
        with torch.autocast("cpu", dtype=dtype):
            outputs.append(deepcopy(exact).float()(x))
        assert all(out.dtype == dtype for out in outputs)
        return [((out.double() - expected).abs().max() / expected.abs().max()).item() for out in outputs]

    # what the dtype forces on the same model without positions, twice for queries and keys that are rounded once more
    # and twice as those have up to twice the size after the rotation
    for error, forced in zip(errors(rotary_xpos=True), errors()):
        assert error <= 4 * forced


# what is known on the host, and what is refused


@given(splits())
@pytest.mark.regression
def test_the_window_is_known_on_the_host(lens):
    model = build(dict(dim=8, depth=1, heads=2, attn_dim_head=32, rotary_xpos=True), 0, max_mem_len=64)
    windows: list[tuple[object, object]] = []
    operators: list[str] = []
    rotary = model.attn_layers.rotary_pos_emb
    forward = rotary.forward

    def record(t, offset=0, seq_len=None):
        windows.append((offset, seq_len))
        with Recorder() as recorder:
            out = forward(t) if seq_len is None else forward(t, offset=offset, seq_len=seq_len)
        operators.extend(recorder.names)
        return out

    rotary.forward = record
    past, new = sum(lens[:-1]), lens[-1]
    x = tokens(0, 1, past + new)

    _, cache = model(x[:, :past], return_intermediates=True)
    model(x, cache=cache, cache_age=new)
    _, mems = model(x[:, :past], return_mems=True)
    model(x[:, past:], mems=mems)

    assert windows == [(0, past), (past, new), (0, past), (0, new)]
    assert all(type(value) is int for window in windows for value in window)
    # neither a maximum over the positions nor a value read back from the device
    assert not [name for name in operators if "max" in name or "_local_scalar_dense" in name]


# 2 * int(4 * ln(largest) / ln(1.4 / 0.4)) + 1, where flash attention adds its mask to the products of two scales
LIMITS = {
    (torch.float32, False): 567,
    (torch.bfloat16, False): 567,
    (torch.float16, False): 71,
    (torch.float32, True): 283,
    (torch.bfloat16, True): 283,
    (torch.float16, True): 71,
}


@pytest.mark.parametrize(("dtype", "flash"), LIMITS)
@pytest.mark.regression
def test_as_many_queries_as_the_dtype_can_represent_and_no_more(dtype, flash):
    limit = LIMITS[dtype, flash]
    options = dict(dim=16, depth=2, heads=2, attn_dim_head=32, attn_flash=flash, rotary_xpos=True)
    model = build(dict(rotary_xpos_scale_base=4, **options), 0, dtype, max_seq_len=1024)
    for attention in (m for m in model.modules() if isinstance(m, Attention)):
        # so that elements of queries and keys are below 1
        for projection in (attention.to_q, attention.to_k):
            projection.weight *= 0.01
    x = tokens(0, 1, limit + 1)

    assert model(x[:, :limit]).isfinite().all()
    assert prefill(model, x, [limit, 1]).isfinite().all()
    too_many = rf"{limit + 1} queries .* the limit of {limit} .* {dtype}, with a scale base of 4 -"
    with pytest.raises(ValueError, match=too_many):
        model(x)
    # autocast decides on the dtype of queries and keys
    if dtype is torch.float16:
        with torch.autocast("cpu", dtype=dtype), pytest.raises(ValueError, match=too_many):
            deepcopy(model).float()(x)


@pytest.mark.regression
def test_values_with_rotary_embeddings_are_refused():
    options = dict(dim=16, depth=1, heads=2, attn_dim_head=32, attn_rotary_embed_values=True)
    build(dict(rotary_pos_emb=True, **options), 0)(tokens(0, 1, 4))

    with pytest.raises(AssertionError, match="attn_rotary_embed_values"):
        build(dict(rotary_xpos=True, **options), 0)(tokens(0, 1, 4))


# the wrappers


@given(decoder_options(), seeds, splits())
@pytest.mark.regression
def test_continuous_wrapper_keeps_prefix_consistency(options, seed, lens):
    net = ContinuousTransformerWrapper(dim_in=3, dim_out=5, max_seq_len=MAX_SEQ_LEN, attn_layers=Decoder(**options))
    model = prepared(net, seed)
    x = randn(seed, 2, sum(lens), 3)

    assert_equal_to_rounding(model(x[:, : lens[0]]), model(x)[:, : lens[0]])


@pytest.mark.regression
def test_encoder_decoder_generates_the_same_with_and_without_a_cache():
    shared = dict(num_tokens=NUM_TOKENS, depth=1, heads=2, max_seq_len=64)
    options = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in shared.items()}
    model = prepared(XTransformer(dim=64, dec_rotary_xpos=True, dec_rotary_xpos_scale_base=8, **options), 0)
    source, start = tokens(0, 2, 9), tokens(1, 2, 3)

    cached, uncached = (model.generate(source, start, 20, temperature=0.0, cache_kv=cache) for cache in (True, False))

    assert torch.equal(cached, uncached)


@given(decoder_options(), seeds, st.integers(3, 24))
@pytest.mark.regression
def test_xl_wrapper_has_the_loss_of_one_call(options, seed, segment_len):
    model = build(options, seed, max_seq_len=segment_len, max_mem_len=1024)
    x = tokens(seed, 2, 25)

    in_segments = XLAutoregressiveWrapper(model)(x)

    assert_equal_to_rounding(in_segments, AutoregressiveWrapper(model)(x))


# checkpoints


@given(decoder_options(flash=False), seeds, st.integers(1, 40), st.integers(1, 4))
@pytest.mark.regression
def test_folded_memory_keys_score_as_unscaled_ones_at_the_length_trained_at(options, seed, seq_len, num_mem_kv):
    options.update(attn_kv_heads=options["heads"], attn_num_mem_kv=num_mem_kv, attn_qk_norm=False, depth=1)
    model = build(options, seed)
    (attention,) = (m for m in model.modules() if isinstance(m, Attention))
    mem_k = attention.mem_k.clone()
    rotated: list[Tensor] = []
    attention.attend.register_forward_pre_hook(lambda module, args: rotated.append(args[0]))

    assert fold_mem_kv_(model, seq_len) == 1
    _, after = model(tokens(seed, 2, seq_len), return_intermediates=True)

    # rotated by the position relative to the center, as the queries are, but not scaled
    rotary = model.attn_layers.rotary_pos_emb
    freqs, _ = rotary(torch.zeros(1), offset=0, seq_len=seq_len)
    expected = rotated[0] @ apply_rotary_pos_emb(mem_k, freqs, torch.ones_like(freqs)).transpose(-1, -2)
    found = after.attn_intermediates[0].qk_similarities[..., :num_mem_kv]
    assert_equal_to_rounding(found, expected * options["attn_dim_head"] ** -0.5)


def test_no_parameter_buffer_or_argument_is_lost():
    layers = Decoder(dim=8, depth=1, heads=2, attn_dim_head=32, rotary_xpos=True)

    assert [name for name in layers.state_dict() if "rotary" in name] == [
        "rotary_pos_emb.inv_freq",
        "rotary_pos_emb.scale",
    ]
    assert list(inspect.signature(RotaryEmbedding.forward).parameters)[:2] == ["self", "t"]
    assert list(inspect.signature(apply_rotary_pos_emb).parameters) == ["t", "freqs", "scale"]
