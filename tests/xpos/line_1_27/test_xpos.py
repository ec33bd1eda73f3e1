"""The package of the line 1.27.x: what `test_properties` and `test_rotary` state, as far as its older API goes.

Runs where that package is imported, as test_backport.py does: `pytest --package <tree> tests/line_1_27`. The check runs
there too, and says that scores are those of the formula, in every dtype, and what is refused. Models are in float64,
where a violation of the mathematics stands far above rounding, with every parameter drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from pristine import MODULES, build_both
from reference import angular_frequency, decay, rescaled_base
from strategies import NUM_TOKENS, randomize_, seeds, softmax, splits, tokens
from torch import Tensor
from torch.nn import Module
from ways import DTYPES, WAYS, Recorder, assert_equal_to_rounding, half_ulp, randn, segments

import x_transformers
from x_transformers import Attention, AutoregressiveWrapper, ContinuousTransformerWrapper, Decoder
from x_transformers.x_transformers import RotaryEmbedding
from x_transformers.xpos import prefill

# upstream's own: the release is older than torch's new names
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SMALL: dict[str, Any] = dict(dim=16, depth=2, heads=4, attn_dim_head=32)


@st.composite
def decoder_options(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of a small `Decoder` with xPos. This release rotates at least 32 dims of a head."""
    options = draw(strategies.decoder_options())
    del options["verbose"], options["attn_custom_attn_fn"]
    num_mem_kv = draw(st.integers(0, 4))
    if num_mem_kv:  # it has as many of them as there are heads of queries
        options["attn_kv_heads"] = options["heads"]
    elif options["attn_flash"]:  # with one key head that takes no more keys than queries here, with any positions
        options["attn_kv_heads"] = max(2, options["attn_kv_heads"])
    dim_head = draw(st.sampled_from([32, 48]))
    rotated = draw(st.sampled_from([32, dim_head]))
    return {**options, "attn_dim_head": dim_head, "rotary_emb_dim": rotated, "attn_num_mem_kv": num_mem_kv}


def exact(module: Module) -> Any:
    """The module, with a softmax that does not go through float32."""
    for attention in (m for m in module.modules() if isinstance(m, Attention)):
        attention.attend.attn_fn = softmax
    return module


def build(options: dict[str, Any], seed: int, dtype: torch.dtype = torch.float64, **wrapper_options: Any) -> Any:
    return exact(strategies.build(options, seed, dtype, **wrapper_options))


# the same at every length, in every way that this release has


def in_chunks(model: Module, x: Tensor, lens: list[int]) -> Tensor:
    logits, cache = prefill(model, x[:, :-1], lens[0])
    return torch.cat((logits, model(x, cache=cache)), dim=1)


def in_steps(model: Module, x: Tensor, lens: list[int], **kwargs: Any) -> Tensor:
    """Through the cache; all so far are passed, and `cache_age` says how many are new."""
    out, cache, end = [], None, 0
    for new in lens:
        end += new
        logits, cache = model(x[:, :end], cache=cache, cache_age=new, return_intermediates=True, **kwargs)
        out.append(logits)
    return torch.cat(out, dim=1)


def one_at_a_time(model: Module, x: Tensor, lens: list[int], **kwargs: Any) -> Tensor:
    return in_steps(model, x, [lens[0]] + [1] * (x.shape[1] - lens[0]), **kwargs)


def behind_mems(model: Module, x: Tensor, lens: list[int]) -> Tensor:
    before, mems = model(x[:, : lens[0]], return_mems=True)
    return torch.cat((before, one_at_a_time(model, x[:, lens[0] :], lens[1:], mems=mems)), dim=1)


def left_padded(model: Module, x: Tensor, lens: list[int]) -> Tensor:
    padded, start = torch.cat((x[:, : lens[0]], x), dim=1), torch.full((len(x),), lens[0])
    return one_at_a_time(model, padded, [lens[0] + 1], seq_start_pos=start)[:, lens[0] :]


OWN_WAYS = {
    # the others pass what is new without what is cached
    **{name: WAYS[name] for name in ("prefix, then all", "segments with mems", "prefix prepended")},
    "one token at a time": one_at_a_time,
    "several tokens at once": in_steps,
    "prefill": in_chunks,
    "decoding behind mems": behind_mems,  # https://github.com/lucidrains/x-transformers/issues/233
    "left padding": left_padded,
    "rows": lambda model, x, lens: torch.cat([model(row[None]) for row in x]),
}


@pytest.mark.parametrize("way", OWN_WAYS)
@given(decoder_options(), seeds, splits())
@pytest.mark.regression
def test_what_is_computed_in_parts_equals_the_full_forward(way, options, seed, lens):
    if "mems" in way or "padding" in way:  # do not go together with memory keys in this release, with any positions
        options["attn_num_mem_kv"] = 0
    model, x = build(options, seed, max_mem_len=64), tokens(seed, 2, sum(lens))

    assert_equal_to_rounding(OWN_WAYS[way](model, x, lens), model(x))


@given(decoder_options(), seeds, splits())
@pytest.mark.regression
def test_without_a_decay_xpos_is_plain_rotary(options, seed, lens):
    options.update(rotary_xpos_scale_base=1e15, rotary_pos_emb=True)
    with_xpos, plain = (build({**options, "rotary_xpos": xpos}, seed, max_mem_len=64) for xpos in (True, False))
    dim, factor = options["rotary_emb_dim"], options["rotary_base_rescale_factor"]
    plain.attn_layers.rotary_pos_emb.inv_freq.copy_(angular_frequency(dim, rescaled_base(dim, factor)))
    x = tokens(seed, 2, sum(lens))

    for way in (in_steps, segments):
        assert_equal_to_rounding(way(with_xpos, x, lens), way(plain, x, lens))


# what plain rotary keeps with an option of a decoder, xPos keeps too - but for those with which this release has no
# answer in float64, or one that changes with the length whatever the positions

SWITCHES = """
    alibi_pos_bias attn_add_zero_kv attn_gate_value_heads attn_gate_values attn_head_scale attn_on_attn
    attn_one_kv_head attn_shared_kv attn_talking_heads attn_tensor_product gate_residual rel_pos_bias resi_dual
    residual_attn sandwich_norm use_rmsnorm weight_tie_layers
"""
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {name: True} for name in SWITCHES.split()},
    "cross attention": dict(cross_attend=True, attn_num_mem_kv=3),
    "execute order": dict(layers_execute_order=(0, 1, 0, 1)),
    "max attend past": dict(attn_max_attend_past=5),
    "memory tokens": dict(num_memory_tokens=2, memory_tokens_interspersed_every=4),
    "post norm": dict(pre_norm=False),
    "qk norm": dict(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    "sandwich": dict(sandwich_coef=1),
    "shifted tokens": dict(shift_tokens=1),
    "value dim": dict(attn_value_dim_head=16),
}


def kept(options: dict[str, Any], positions: dict[str, Any]) -> set[str]:
    of_wrapper = {name: value for name, value in options.items() if "memory_tokens" in name}
    of_layers = {name: value for name, value in options.items() if name not in of_wrapper}
    model, x = build({**SMALL, **of_layers, **positions}, 0, max_mem_len=64, **of_wrapper), tokens(1, 2, 21)
    # a call for it all has a context, where there is one
    model.forward = partial(model.forward, context=randn(2, 2, 7, 16)) if "cross_attend" in options else model.forward
    found = set()
    for name, way in OWN_WAYS.items():
        with suppress(RuntimeError, AssertionError, ValueError):  # what raises or differs is not kept
            assert_equal_to_rounding(way(model, x, [8, 5, 8]), model(x))
            found.add(name)
    return found


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.regression
def test_xpos_keeps_with_an_option_what_plain_rotary_keeps(option):
    with_xpos = kept(OPTIONS[option], dict(rotary_xpos=True, rotary_xpos_scale_base=8))
    with_plain_rotary = kept(OPTIONS[option], dict(rotary_pos_emb=True))

    assert with_plain_rotary
    assert with_plain_rotary <= with_xpos


# the table


@given(
    st.sampled_from([32, 64]),
    st.integers(1, 300),
    st.integers(0, 1_000_000),
    st.sampled_from([4, 512]),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from([1.0, 4.0]),
    st.sampled_from(DTYPES[1:]),
)
@pytest.mark.regression
def test_the_table_is_that_of_the_formula(dim, seq_len, offset, scale_base, interpolation, rescale, dtype):
    options = dict(scale_base=scale_base, interpolation_factor=interpolation, base_rescale_factor=rescale)
    rotary = RotaryEmbedding(dim, use_xpos=True, **options)
    pos = torch.arange(-5, seq_len) + offset
    rotary(pos)  # where it raises a NameError, that is what to say

    def table(rotary: RotaryEmbedding = rotary) -> tuple[Tensor, Tensor]:
        return rotary(pos, offset=offset, seq_len=seq_len)

    freqs, scale = table()

    # angles of the positions, in float64, of which 1,000,000 has 2 ** -33 left; rounded once, below 2 pi
    angles = pos.double()[:, None] / interpolation * angular_frequency(dim, rescaled_base(dim, rescale)).repeat(2)
    apart = (freqs.double() - angles + torch.pi).remainder(2 * torch.pi) - torch.pi
    assert apart.abs().max() <= 2 * torch.pi * half_ulp(torch.float32) + 2**-30
    # powers of the distance to the center of the window, wherever that is
    powers = (pos - offset - seq_len // 2).double()[:, None] / scale_base
    torch.testing.assert_close(scale.double(), decay(dim).repeat(2) ** powers, rtol=2 * half_ulp(torch.float32), atol=0)
    # whatever the dtype of the module
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = table()
    for other in (table(deepcopy(rotary).to(dtype)), under_autocast):
        assert all(map(torch.equal, other, (freqs, scale)))
    # without a window it is that of the positions
    pos, offset = torch.arange(seq_len), 0
    for other in (rotary(pos), rotary.forward_from_seq_len(seq_len)):
        assert all(map(torch.equal, other, table()))


@given(splits())
@pytest.mark.regression
def test_the_window_is_known_on_the_host(lens):
    model, x = build(dict(SMALL, rotary_xpos=True, attn_flash=True), 0, max_mem_len=64), tokens(0, 1, sum(lens))
    rotary, past, new, windows = model.attn_layers.rotary_pos_emb, sum(lens[:-1]), lens[-1], list[Any]()
    rotary.register_forward_pre_hook(lambda _rotary, _args, window: windows.append(window), with_kwargs=True)

    with Recorder() as recorder:
        _, cache = model(x[:, :past], return_intermediates=True)
        model(x, cache=cache, cache_age=new)
        _, mems = model(x[:, :past], return_mems=True)
        model(x[:, past:], mems=mems)

    assert windows == [dict(offset=at, seq_len=n) for at, n in ((0, past), (past, new), (0, past), (0, new))]
    assert all(type(value) is int for window in windows for value in window.values())
    # neither a maximum over the positions nor a value read back from the device
    assert not [name for name in recorder.names if name.startswith("aten.max") or "_local_scalar_dense" in name]


# 2 * int(4 * ln(largest) / ln(1.4 / 0.4)) + 1
LIMITS = {torch.float32: 567, torch.bfloat16: 567, torch.float16: 71}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.regression
def test_as_many_queries_as_the_dtype_can_represent_and_no_more(dtype, flash):
    limit, options = LIMITS[dtype], dict(SMALL, rotary_xpos=True, rotary_xpos_scale_base=4, attn_flash=flash)
    model, x = build(options, 0, dtype, use_abs_pos_emb=False), tokens(0, 1, limit + 1)
    for attention in (m for m in model.modules() if isinstance(m, Attention)):
        for projection in (attention.to_q, attention.to_k):
            projection.weight *= 0.01  # so that elements of queries and keys are below 1

    assert model(x[:, :limit]).isfinite().all()
    assert prefill(model, x, limit)[0].isfinite().all()
    too_many = rf"{limit + 1} queries .* the limit of {limit} .* {dtype} - .*xpos\.prefill"
    with pytest.raises(ValueError, match=too_many):
        model(x)
    # autocast decides on the dtype of queries and keys
    if dtype is torch.float16:
        with torch.autocast("cpu", dtype=dtype), pytest.raises(ValueError, match=too_many):
            deepcopy(model).float()(x)


# the wrappers, and what is upstream's


@pytest.mark.regression
def test_other_wrappers() -> None:
    positions, x = dict(rotary_xpos=True, rotary_xpos_scale_base=8), tokens(0, 2, 25)
    embeddings = randn(0, 2, 25, 3)
    net = ContinuousTransformerWrapper(dim_in=3, dim_out=5, max_seq_len=64, attn_layers=Decoder(**SMALL, **positions))
    net = exact(randomize_(net.double(), 0).eval())
    assert_equal_to_rounding(net(embeddings[:, :8]), net(embeddings)[:, :8])

    both = encoder_decoder(x_transformers, **{f"dec_{name}": value for name, value in positions.items()}).double()
    ways = (both.generate(x, x[:, :3], 20, temperature=0.0, cache_kv=cache_kv) for cache_kv in (True, False))
    assert torch.equal(*ways)


def encoder_decoder(package: Any, **options: Any) -> Any:
    sizes = dict(num_tokens=NUM_TOKENS, max_seq_len=64, depth=1, heads=2, rotary_pos_emb=True)
    sides = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in sizes.items()}
    return randomize_(package.XTransformer(dim=64, **sides, **options), 0).eval()


ROTARY = dict(rotary_pos_emb=True, rotary_emb_dim=32)
PLAIN: dict[str, dict[str, Any]] = {
    "no positions": {},
    "alibi": dict(alibi_pos_bias=True),
    "flash": dict(ROTARY, attn_flash=True),
    "factors": dict(ROTARY, rotary_interpolation_factor=2.5, rotary_base_rescale_factor=4.0),
    "memory keys": dict(ROTARY, attn_num_mem_kv=3, attn_qk_norm=True),
    "values": dict(ROTARY, attn_rotary_embed_values=True),
    "grouped keys": dict(ROTARY, attn_kv_heads=2),
}


def answers(net: Any, x: Tensor) -> Iterator[Tensor]:
    half = x.shape[1] // 2
    yield net(x)
    parameters = [parameter.requires_grad_(True) for parameter in net.parameters()]
    yield from torch.autograd.grad(net(x).square().sum(), parameters, allow_unused=True, materialize_grads=True)
    yield net(x, cache=net(x[:, :half], return_intermediates=True)[1], cache_age=half)
    yield net(x[:, half:], mems=net(x[:, :half], return_mems=True)[1])
    yield net(x, seq_start_pos=torch.tensor([3, 0]))
    yield AutoregressiveWrapper(net).generate(x, 20, temperature=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield net(x)
    for dtype in (torch.bfloat16, torch.float64):
        yield net.to(dtype)(x)


@pytest.mark.parametrize("positions", PLAIN)
def test_without_xpos_every_bit_is_upstreams(positions):
    models = build_both({**SMALL, **PLAIN[positions]}, 0, torch.float32, max_mem_len=64)
    for number, pair in enumerate(zip(*(answers(net, tokens(0, 2, 40)) for net in models))):
        assert torch.equal(*pair), number


def test_without_xpos_every_bit_of_an_encoder_and_a_decoder_is_upstreams():
    x, nets = tokens(0, 2, 40), [encoder_decoder(package) for package in (x_transformers, MODULES["x_transformers"])]
    assert torch.equal(*(net(x, x) for net in nets))
    assert torch.equal(*(net.generate(x, x[:, :3], 9, temperature=0.0) for net in nets))


def test_a_checkpoint_with_xpos_loads_from_upstream():
    ours, theirs = build_both(dict(SMALL, rotary_xpos=True, attn_num_mem_kv=3), 0, torch.float32)
    ours.load_state_dict(theirs.state_dict(), strict=True)
