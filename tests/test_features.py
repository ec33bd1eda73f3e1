"""xPos with what else a decoder can have: keys without a position, context positions, shards, limits, refusals."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import angular_frequency, rescaled_base, xpos_score
from strategies import build, decoder_options, seeds, shifts, softmax, splits, tokens
from test_properties import assert_equal_to_rounding, decode, prefill, prefill_with_cache
from test_rotary import DTYPES, Recorder, randn
from torch import Tensor
from torch.nn import Module

from x_transformers import Attention, TransformerWrapper
from x_transformers.x_transformers import RotaryEmbedding
from x_transformers.xpos import fold_mem_kv_

lengths = st.integers(2, 40)
num_mems = st.integers(1, 5)


# keys without a position


def added(seed: int, options: dict, num: int, heads: int) -> dict[str, Any]:
    shape = (2, heads, num, options["attn_dim_head"])
    layers = range(options["depth"])
    return {"self_attn_additional_kv": [(randn(seed + 2 * i, *shape), randn(seed + 2 * i + 1, *shape)) for i in layers]}


def of_another_model(seed: int, options: dict, num: int) -> dict[str, Any]:
    _, intermediates = build(options, seed + 1)(tokens(seed + 1, 2, num), return_intermediates=True)
    return {"self_attn_additional_kv": intermediates}


def context_with_positions(seed: int, options: dict, num: int) -> dict[str, Any]:
    return {"context": randn(seed, 2, 4 * num, options["dim"]), "context_pos": torch.arange(4 * num)}


# what is passed, and the options that it needs
OTHER_KEYS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[int], dict[str, Any]]]] = {
    "memory": (lambda *_: {}, lambda num: {"attn_num_mem_kv": num}),
    "additional": (lambda seed, options, num: added(seed, options, num, options["attn_kv_heads"]), lambda num: {}),
    "additional, of one head": (lambda *args: added(*args, 1), lambda num: {}),
    "of another model": (of_another_model, lambda num: {}),
    "context": (context_with_positions, lambda num: {"cross_attend": True}),
    "context and memory": (context_with_positions, lambda num: {"cross_attend": True, "attn_num_mem_kv": num}),
}


@pytest.mark.parametrize("kind", OTHER_KEYS)
@given(decoder_options(), num_mems, seeds, splits(max_len=20))
@pytest.mark.regression
def test_keys_beside_the_text_keep_prefix_consistency_and_cache(kind, options, num, seed, lens):
    passed, needed = OTHER_KEYS[kind]
    model, x = build({**options, **needed(num)}, seed), tokens(seed, 2, sum(lens))
    beside = passed(seed, options, num)

    full = model(x, **beside)

    assert_equal_to_rounding(model(x[:, : lens[0]], **beside), full[:, : lens[0]])
    assert_equal_to_rounding(decode(model, x, lens[0], **beside), full)
    if "context" not in beside:  # in chunks the cache of its keys is passed over
        assert_equal_to_rounding(prefill(model, x, lens, **beside), full)


@given(decoder_options(), num_mems, seeds, splits())
def test_memory_key_values_stay_at_position_0_behind_mems(options, num_mem_kv, seed, lens):
    # the mems are at negative positions then; in one layer, as theirs are the same wherever they were computed
    model = build({**options, "depth": 1, "attn_num_mem_kv": num_mem_kv}, seed, max_mem_len=1024)
    x = tokens(seed, 2, sum(lens))

    _, mems = model(x[:, : lens[0]], return_mems=True)
    together = model(x, pos=torch.arange(sum(lens)) - lens[0])

    assert_equal_to_rounding(model(x[:, lens[0] :], mems=mems), together[:, lens[0] :])


@given(decoder_options(flash=False), num_mems, seeds, st.integers(1, 30), st.integers(0, 30))
@pytest.mark.regression
def test_a_memory_key_scores_as_a_key_at_position_0(options, num_mem_kv, seed, new, past):
    options.update(attn_kv_heads=options["heads"], attn_qk_norm=False, attn_num_mem_kv=num_mem_kv, depth=1)
    model = build(options, seed)
    x = tokens(seed, 2, past + new)
    attention = next(m for m in model.modules() if isinstance(m, Attention))
    queries: list[Tensor] = []
    cache = model(x[:, :past], return_intermediates=True)[1] if past else None
    attention.to_q.register_forward_hook(lambda module, args, out: queries.append(out))

    _, after = model(x, cache=cache, cache_age=new, return_intermediates=True)

    expected = xpos_score(
        attention.split_q_heads(queries[0]),
        attention.mem_k[None],
        torch.arange(past, past + new),
        torch.zeros(num_mem_kv),
        scale_base=options["rotary_xpos_scale_base"],
        base=rescaled_base(options["rotary_emb_dim"], options["rotary_base_rescale_factor"]),
        interpolation_factor=options["rotary_interpolation_factor"],
        rotated_dim=options["rotary_emb_dim"],
    )
    actual = after.attn_intermediates[0].qk_similarities[..., :num_mem_kv]
    assert_equal_to_rounding(actual, expected * options["attn_dim_head"] ** -0.5)


@given(decoder_options(), num_mems, seeds, lengths, st.integers(1, 3))
def test_folding_memory_keys_keeps_upstreams_answer_at_the_length_trained_at(
    options, num, seed, seq_len, rotated_heads
):
    options.update(attn_qk_norm=False, attn_num_mem_kv=num, attn_kv_heads=options["heads"])
    options.update(rotate_num_heads=min(rotated_heads, options["heads"]))
    model = build(options, seed)
    x = tokens(seed, 2, seq_len)
    expected = upstreams_answer(model, x)

    changed = fold_mem_kv_(model, seq_len)

    assert changed == options["depth"]
    assert_equal_to_rounding(model(x), expected)


def upstreams_answer(model: TransformerWrapper, x: Tensor) -> Tensor:
    """Memory keys without rotation and scale, against queries at absolute angles, centered on n // 2.

    Keys are scaled in the opposite direction by what this fork is going to give them.
    """
    model = deepcopy(model)
    rotary = model.attn_layers.rotary_pos_emb
    freqs, scale = rotary(torch.arange(x.shape[1]))
    # a table passed in starts with the position of the memory keys: here one that leaves them as they are
    freqs, scale = (
        torch.cat((start, t), dim=1) for start, t in ((freqs[:, :1] * 0, freqs), (scale[:, :1] * 0 + 1, scale))
    )
    return model(x, rotary_pos_emb=(freqs, scale))


def test_folding_is_refused_where_no_factor_can_be_folded():
    base = dict(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_xpos=True, rotary_emb_dim=8, verbose=False)
    with pytest.raises(ValueError, match="attn_qk_norm"):
        fold_mem_kv_(build({**base, "attn_num_mem_kv": 2, "attn_qk_norm": True}, 0), 64)
    with pytest.raises(ValueError, match="attn_num_mem_kv"):
        fold_mem_kv_(build(base, 0), 64)
    with pytest.raises(ValueError, match="seq_len"):
        fold_mem_kv_(build({**base, "attn_num_mem_kv": 2}, 0), 0)


# context positions


@given(seeds, st.integers(1, 30), st.integers(1, 60), st.integers(-40, 60))
@pytest.mark.regression
def test_cross_attention_scores_equal_the_formula(seed, seq_len, context_len, context_offset):
    # context positions may lie beyond those of the queries
    options = dict(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_emb_dim=8, verbose=False)
    options.update(rotary_xpos=True, rotary_xpos_scale_base=16, attn_custom_attn_fn=softmax)
    model = build({**options, "cross_attend": True}, seed)
    x = tokens(seed, 2, seq_len)
    context_pos = torch.arange(context_offset, context_offset + context_len)
    attention = [m for m in model.modules() if isinstance(m, Attention)][1]
    projected: dict[str, Tensor] = {}
    attention.to_q.register_forward_hook(lambda module, args, out: projected.update(q=out))
    attention.to_k.register_forward_hook(lambda module, args, out: projected.update(k=out))

    _, inter = model(x, context=randn(seed, 2, context_len, 16), context_pos=context_pos, return_intermediates=True)

    q, k = attention.split_q_heads(projected["q"]), attention.split_k_heads(projected["k"])
    expected = xpos_score(q, k, torch.arange(seq_len), context_pos, scale_base=16) * 8**-0.5
    assert_equal_to_rounding(inter.attn_intermediates[1].qk_similarities, expected)


# rows with positions of their own


@given(decoder_options(), seeds, splits(), st.lists(shifts, min_size=2, max_size=3))
@pytest.mark.regression
def test_rows_far_apart_decode_as_each_alone(options, seed, lens, row_shifts):
    model = build(options, seed)
    seq_len = sum(lens)
    x = tokens(seed, len(row_shifts), seq_len)
    pos = torch.arange(seq_len) + torch.tensor(row_shifts)[:, None]

    _, cache = model(x[:, : lens[0]], pos=pos[:, : lens[0]], return_intermediates=True)
    together = model(x, pos=pos, cache=cache, cache_age=seq_len - lens[0])

    assert_equal_to_rounding(together, model(x)[:, lens[0] :], max(row_shifts))


# range


def scale_base_options(dtype: torch.dtype, flash: bool) -> dict:
    """With a scale base of 4 the limit, hundreds of thousands of times 4 / 512, comes within reach of a test."""
    options = dict(dim=64, depth=2, heads=2, attn_dim_head=32, attn_flash=flash, verbose=False)
    return dict(options, rotary_xpos=True, rotary_emb_dim=32, rotary_xpos_scale_base=4)


def limit(dtype: torch.dtype, scale_base: float, *, masked: bool = False) -> int:
    """The most queries for which the largest scale, (1 / zeta_0) ** (n // 2 / S), is in the range of the dtype.

    And, if `masked`, the score of the query and the key furthest apart, in float32 or wider, for values of 1.
    """
    largest = torch.finfo(dtype).max
    if masked:
        largest = min(largest, math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max))
    return 2 * math.floor(scale_base * math.log(largest) / math.log(1.4 / 0.4)) + 1


# as many as leave room for values of up to 64, of queries and of keys
def well_within(dtype: torch.dtype, scale_base: float, *, masked: bool = False) -> int:
    room = (2 if masked else 1) * math.log(64) / math.log(1.4 / 0.4)
    return limit(dtype, scale_base, masked=masked) - 2 * math.ceil(scale_base * room)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("num_mem_kv", [0, 2])
@pytest.mark.regression("not refused")
def test_within_the_limit_finite_and_accurate_and_beyond_it_an_error(dtype, flash, num_mem_kv):
    options = dict(scale_base_options(dtype, flash), attn_num_mem_kv=num_mem_kv)
    masked = flash and num_mem_kv > 0
    seq_len, longest = (of(dtype, 4, masked=masked) for of in (well_within, limit))
    model = build(options, 0)
    nearby = build(dict(options, rotary_xpos_scale_base=4 * 64), 0)
    rounded, nearby_rounded = deepcopy(model).to(dtype), deepcopy(nearby).to(dtype)
    x = tokens(0, 1, longest + 1)

    error = (rounded(x[:, :seq_len]).double() - model(x[:, :seq_len])).abs().max()

    # what the dtype does to the same model with a scale base for which this length is nothing; another model, so
    # the same only in kind: within a factor of 4
    forced = (nearby_rounded(x[:, :seq_len]).double() - nearby(x[:, :seq_len])).abs().max()
    assert error <= 4 * forced

    rounded(x[:, :longest])
    with pytest.raises(ValueError, match=rf"{longest + 1} queries .* limit of {longest} .*{dtype}.*scale base of 4 "):
        rounded(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flash", [False, True])
def test_at_the_limit_small_values_are_finite_and_right(dtype, flash):
    # nothing is refused that some parameters make right
    model = build(scale_base_options(dtype, flash), 0)
    for attention in (m for m in model.modules() if isinstance(m, Attention)):
        attention.to_q.weight.mul_(2**-6)
        attention.to_k.weight.mul_(2**-6)
    x = tokens(0, 1, limit(dtype, 4))

    logits, expected = deepcopy(model).to(dtype)(x).double(), model(x)

    assert (logits - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


MASKED: dict[str, dict] = {
    "mask": {},
    "seq_start_pos": {},
    "mems": {},
    "cache": {},
    "num_mem_kv": dict(attn_num_mem_kv=2),
    "zero_kv": dict(attn_add_zero_kv=True),
    "max_attend_past": dict(attn_max_attend_past=10_000),
    "alibi": dict(alibi_pos_bias=True),
    "forgetting": dict(attn_data_dependent_alibi=True),
    "dropout": dict(attn_dropout=0.1),
}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("feature", MASKED)
def test_with_a_mask_no_key_ahead_turns_a_score_into_nan(flash, feature):
    # scores of keys ahead overflow at half the window, and flash attention adds the mask to them
    options = {**scale_base_options(torch.float32, flash), **MASKED[feature]}
    seq_len, longest = (of(torch.float32, 4, masked=flash) for of in (well_within, limit))
    model = build(options, 0, dtype=torch.float32, max_mem_len=8).train(feature == "dropout")
    x = tokens(0, 2, longest + 9)

    def run(length: int) -> Tensor:
        kwargs = {
            "mask": lambda: dict(mask=torch.ones(2, length, dtype=torch.bool)),
            "seq_start_pos": lambda: dict(seq_start_pos=torch.tensor([0, 3])),
            "mems": lambda: dict(mems=model(x[:, :8], return_mems=True)[1]),
            "cache": lambda: dict(
                cache=model(x[:, :8], return_intermediates=True)[1], cache_age=length, input_not_include_cache=True
            ),
        }.get(feature, dict)()
        return model(x[:, :length], **kwargs)

    assert torch.isfinite(run(seq_len)).all()
    with pytest.raises(ValueError, match=f"{longest + 1} queries in one call exceed the limit of {longest} "):
        run(longest + 1)


@given(st.sampled_from(DTYPES), st.sampled_from([4, 64, 100, 512, 4096]))
def test_the_limit_is_the_same_for_every_rotated_dim(dtype, scale_base):
    for dim in (4, 32, 64):
        rotary = RotaryEmbedding(dim, use_xpos=True, scale_base=scale_base)
        for masked in (False, True):
            longest = limit(dtype, scale_base, masked=masked)
            assert rotary.max_seq_len(dtype, is_masked=masked) == longest
        # the first scale of a window of so many is the last that is in range
        for queries, finite in ((limit(dtype, scale_base), True), (limit(dtype, scale_base) + 1, False)):
            _, scale = rotary(torch.arange(1), offset=0, seq_len=queries)
            assert (scale.max().item() <= torch.finfo(dtype).max) == finite


def test_limits_at_the_default_scale_base():
    rotary = RotaryEmbedding(32, use_xpos=True)

    assert [rotary.max_seq_len(dtype, is_masked=False) for dtype in DTYPES] == [72_521, 72_519, 9_065]
    assert [rotary.max_seq_len(dtype) for dtype in DTYPES] == [36_261, 36_261, 9_065]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_remedy_in_the_message_works_as_it_is_written(dtype, flash):
    model = build(scale_base_options(dtype, flash), 0)
    half, x = deepcopy(model).to(dtype), tokens(0, 1, 2 * limit(dtype, 4) + 5)

    with pytest.raises(ValueError, match="chunks of at most") as error:
        half(x)
    size = int(
        re.search(
            r"in chunks of at most (\d+), with `input_not_include_cache = True` and `cache_age`", str(error.value)
        )[1]
    )

    logits, cache = [], None
    for chunk in x.split(size, dim=1):
        out, cache = half(
            chunk, cache=cache, input_not_include_cache=True, cache_age=chunk.shape[1], return_intermediates=True
        )
        logits.append(out)

    expected = model(x)
    error = (torch.cat(logits, dim=1).double() - expected).abs().max()
    assert error <= 64 * torch.finfo(dtype).eps * expected.abs().max()
    # and the other two
    increased = build(dict(scale_base_options(dtype, flash), rotary_xpos_scale_base=16), 0, dtype=dtype)
    assert torch.isfinite(increased(x)).all()
    if dtype is torch.float16:
        assert torch.isfinite(half.bfloat16()(x)).all()


def test_the_error_comes_before_any_layer_runs_and_autocast_decides_the_dtype():
    model = build(scale_base_options(torch.float32, False), 0, dtype=torch.float32)
    ran: list[object] = []
    for layer in model.attn_layers.layers.modules():
        layer.register_forward_pre_hook(lambda module, args: ran.append(module))
    seq_len = limit(torch.float16, 4) + 1

    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16"):
        model(tokens(0, 1, seq_len))

    assert not ran
    model(tokens(0, 1, seq_len))


@pytest.mark.parametrize("table", [False, pytest.param(True, marks=pytest.mark.regression)])
@pytest.mark.parametrize("new", [1, 2, 31])
def test_decoding_is_not_limited_by_what_is_in_the_cache(new, table):
    model = build(scale_base_options(torch.float16, False), 0)
    half = deepcopy(model).half()
    seq_len = 8 * limit(torch.float16, 4)
    x = tokens(0, 1, seq_len)
    chunks = [32] * ((seq_len - new) // 32) + [(seq_len - new) % 32]
    passed = {"rotary_pos_emb": half.attn_layers.rotary_pos_emb(torch.arange(seq_len))} if table else {}

    prefilled, cache = prefill_with_cache(half, x[:, :-new], chunks)
    decoded = half(x, cache=cache, cache_age=new, **passed)

    # four layers' worth of float16 roundings
    full = model(x)
    error = (torch.cat((prefilled, decoded), dim=1).double() - full).abs().max()
    assert error <= 64 * torch.finfo(torch.float16).eps * full.abs().max()


# a table that is passed in


@given(decoder_options(), num_mems, seeds, splits())
@pytest.mark.regression
def test_a_table_passed_in_gives_what_its_positions_give(options, num_mem_kv, seed, lens):
    model = build({**options, "attn_num_mem_kv": num_mem_kv}, seed)
    x, rotary = tokens(seed, 2, sum(lens)), model.attn_layers.rotary_pos_emb

    _, cache = model(x[:, : lens[0]], return_intermediates=True)
    new = dict(cache=cache, cache_age=sum(lens[1:]), rotary_pos_emb=rotary(torch.arange(sum(lens))))

    assert_equal_to_rounding(model(x, rotary_pos_emb=rotary.forward_from_seq_len(sum(lens))), model(x))
    assert_equal_to_rounding(model(x, **new), model(x)[:, lens[0] :])


@given(decoder_options(), seeds, splits())
def test_a_table_with_a_scale_of_one_is_plain_rotary(options, seed, lens):
    model, plain = build(options, seed), build({**options, "rotary_xpos": False, "rotary_pos_emb": True}, seed)
    x = tokens(seed, 2, sum(lens))
    freqs, _ = model.attn_layers.rotary_pos_emb.forward_from_seq_len(sum(lens))
    # in plain rotary they are rounded to float32
    base = rescaled_base(options["rotary_emb_dim"], options["rotary_base_rescale_factor"])
    plain.attn_layers.rotary_pos_emb.inv_freq = angular_frequency(options["rotary_emb_dim"], base)

    assert_equal_to_rounding(model(x, rotary_pos_emb=(freqs, 1.0)), plain(x))


@given(decoder_options(), seeds, st.integers(1, 12), st.integers(1, 20), st.booleans())
def test_keys_of_one_position_have_no_decay_between_them(options, seed, seq_len, position, per_row):
    # one position for all of them, as upstream broadcasts it
    model, x = build(options, seed), tokens(seed, 2, seq_len)
    pos = torch.full((2, 1) if per_row else (1,), position)

    assert_equal_to_rounding(model(x, pos=pos), model(x, pos=torch.full((seq_len,), position)))


@given(decoder_options(), st.integers(0, 2), seeds, st.integers(3, 30))
def test_too_few_positions_are_an_error(options, num_mem_kv, seed, seq_len):
    model = build({**options, "attn_num_mem_kv": num_mem_kv}, seed)
    x = tokens(seed, 2, seq_len)

    with pytest.raises(RuntimeError, match=f"{seq_len}.* must match .*{seq_len - 1}"):
        model(x, pos=torch.arange(seq_len - 1))
    _, cache = model(x[:, :-1], return_intermediates=True)
    with pytest.raises(RuntimeError, match="must match"):
        model(x, cache=cache, pos=torch.arange(seq_len - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("start", [-3, -500, -40_000])
def test_positions_far_before_0_leave_memory_keys_finite(dtype, start):
    options = dict(scale_base_options(dtype, False), rotary_xpos_scale_base=512, attn_num_mem_kv=2)
    model = build(options, 0, dtype=dtype)

    assert torch.isfinite(model(tokens(0, 2, 40), pos=torch.arange(40) + start)).all()


@given(splits())
def test_the_limit_is_checked_without_reading_back_from_the_device(lens):
    layers = build(dict(scale_base_options(torch.float32, True), cross_attend=True), 0, dtype=torch.float32).attn_layers
    x, context = torch.randn(1, sum(lens), 64), torch.randn(1, 5, 64)

    with Recorder() as recorder:
        layers(x, context=context, context_pos=torch.arange(5))
        layers(x, pos=torch.arange(sum(lens)), context=context, context_pos=torch.arange(5))
        layers(x, pos=torch.arange(sum(lens)), context=context, rotary_window=(0, 64))

    assert not [name for name in recorder.names if "_local_scalar_dense" in name]


# shards


class GatheredKeys:
    """Runs shards of one sequence side by side; each attention gets the keys and values of all, as from all-gather."""

    def __init__(self, models: list[Module]) -> None:
        self.barrier = threading.Barrier(len(models), timeout=60)
        self.shared: list[tuple[Tensor, Tensor] | None] = [None] * len(models)
        for rank, model in enumerate(models):
            for attention in (m for m in model.modules() if isinstance(m, Attention)):
                attention.attend.forward = self.gathering(rank, attention.attend.forward)

    def gathering(self, rank, forward):
        def attend(q, k, v, **kwargs):
            self.shared[rank] = (k, v)
            self.barrier.wait()
            # causal: a shard sees those before it and itself
            k, v = (torch.cat(t, dim=-2) for t in zip(*self.shared[: rank + 1]))
            self.barrier.wait()
            return forward(q, k, v, **kwargs)

        return attend


def run_shards(models: list, inputs: list[Tensor], per_shard: list[dict]) -> Tensor:
    GatheredKeys(models)
    out: list[Tensor | BaseException] = [None] * len(models)

    def run(rank: int) -> None:
        try:
            with torch.no_grad():
                out[rank] = models[rank](inputs[rank], **per_shard[rank])
        except BaseException as error:
            out[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in out:
        if isinstance(result, BaseException):
            raise result
    return torch.cat(out, dim=1)


@settings(max_examples=20)
@given(decoder_options(), seeds, st.lists(st.integers(1, 12), min_size=2, max_size=4), st.booleans())
@pytest.mark.regression("no argument")
def test_the_same_window_on_every_shard_equals_the_unsharded_model(options, seed, lens, layers_alone):
    seq_len = sum(lens)
    model, x = build(options, seed), tokens(seed, 2, seq_len)
    if layers_alone:
        model, x = model.attn_layers, randn(seed, 2, seq_len, options["dim"])

    starts = [sum(lens[:rank]) for rank in range(len(lens))]
    per_shard = [dict(pos=torch.arange(start, start + n), rotary_window=(0, seq_len)) for start, n in zip(starts, lens)]

    expected = model(x)

    sharded = run_shards([deepcopy(model) for _ in lens], list(x.split(lens, dim=1)), per_shard)

    assert_equal_to_rounding(sharded, expected)


@given(decoder_options(), seeds, splits(), st.integers(0, 100))
@pytest.mark.regression("no argument")
def test_a_wider_window_changes_nothing_but_rounding(options, seed, lens, wider):
    model = build(options, seed)
    x = tokens(seed, 2, sum(lens))

    full = model(x)

    assert_equal_to_rounding(model(x, rotary_window=(0, sum(lens) + wider)), full)
    _, cache = model(x[:, : lens[0]], return_intermediates=True)
    new = sum(lens[1:])
    decoded = model(x, cache=cache, cache_age=new, rotary_window=(0, sum(lens)))
    assert_equal_to_rounding(decoded, full[:, lens[0] :])


@given(decoder_options(), seeds, splits(), st.integers(-3, 50), st.integers(1, 50))
def test_a_window_that_holds_all_queries_is_taken_and_another_is_an_error(options, seed, lens, start, window_len):
    model = build(options, seed)
    past, seq_len = lens[0], sum(lens)
    x = tokens(seed, 2, seq_len)
    _, cache = model(x[:, :past], return_intermediates=True)
    new = dict(cache=cache, cache_age=seq_len - past)

    if start <= past and seq_len <= start + window_len:
        assert_equal_to_rounding(model(x, rotary_window=(start, window_len), **new), model(x, **new))
    else:
        message = rf"`rotary_window` = \({start}, {window_len}\).* from {past} to {seq_len - 1}"
        with pytest.raises(AssertionError, match=message):
            model(x, rotary_window=(start, window_len), **new)
        # the host knows positions on the CPU too
        with pytest.raises(AssertionError, match=message):
            model(x, rotary_window=(start, window_len), pos=torch.arange(seq_len), **new)
