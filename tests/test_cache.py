"""A KV cache is a value: for whoever has it, in whatever form, it holds what it held, and a step reads what is in it.

Most of this is told beside the unpatched release, which makes a new copy at every step: the same program of steps and
of what people do with a cache runs on a model of each, and all that is held has to be the same after every line of it.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pristine import build_both, pristine_imports
from strategies import build, decoder_options, seeds, splits, tokens
from test_properties import assert_equal_to_rounding, prefill_with_cache
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper
from x_transformers.x_transformers import Intermediates, LayerIntermediates

OPTIONS: dict[str, Any] = dict(
    dim=16,
    depth=2,
    heads=2,
    attn_dim_head=8,
    rotary_emb_dim=6,
    rotary_xpos=True,
    rotary_xpos_scale_base=32,
    verbose=False,
)


def continue_with(model: Any, x: Tensor, cache: LayerIntermediates) -> tuple[Tensor, LayerIntermediates]:
    return model(x, cache=cache, cache_age=x.shape[1], input_not_include_cache=True, return_intermediates=True)


def keys_values(cache: LayerIntermediates) -> list[Tensor]:
    return [t for inter in cache.attn_intermediates for t in inter.cached_kv]


def replace_kv(cache: LayerIntermediates, function: Callable[[Tensor], Tensor]) -> None:
    for inter in cache.attn_intermediates:
        inter.cached_kv = tuple(function(t) for t in inter.cached_kv)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """To rounding, where the expected is finite; an edit may make what comes after it anything."""
    assert actual.shape == expected.shape
    if expected.isfinite().all():
        assert_equal_to_rounding(actual.detach(), expected.detach())


# what people do with a cache: each changes the one that it is given, or returns another, or something to be held


def detach(cache, n):
    replace_kv(cache, Tensor.detach)


def data(cache, n):
    replace_kv(cache, lambda t: t.data)


def parameter(cache, n):
    replace_kv(cache, lambda t: nn.Parameter(t, requires_grad=False))


def clone(cache, n):
    replace_kv(cache, torch.clone)


def as_list(cache, n):
    for inter in cache.attn_intermediates:
        inter.cached_kv = list(inter.cached_kv)


def edit_in_place(cache, n):
    for t in keys_values(cache):
        t[..., : n + 1, :] *= 0.5


def edit_in_numpy(cache, n):
    for t in keys_values(cache):
        t.numpy()[...] *= 1.25


def refill(cache, n):
    for t in keys_values(cache):
        t.copy_(t.flip(-2))


def shift_in_place(cache, n):
    for t in keys_values(cache):
        t[..., :-1, :] = t[..., 1:, :].clone()


def replace_values(cache, n):
    for inter in cache.attn_intermediates:
        k, v = inter.cached_kv
        inter.cached_kv = (k, v * 0.5)


def replace_keys_of_one_layer(cache, n):
    inter = cache.attn_intermediates[0]
    k, v = inter.cached_kv
    inter.cached_kv = (k.roll(1, -2), v)


def swap_rows(cache, n):
    replace_kv(cache, lambda t: t[torch.tensor([1, 0])])


def one_row_for_all(cache, n):
    replace_kv(cache, lambda t: t[:1].expand(2, -1, -1, -1))


def rows_from_two(cache, n):
    replace_kv(cache, lambda t: torch.cat((t[1:], t[:1])))


def roll_back(cache, n):
    n = min(n, keys_values(cache)[0].shape[-2] - 1)
    replace_kv(cache, lambda t: t[..., : t.shape[-2] - n, :])
    cache.cache_length -= n


def forget_the_oldest(cache, n):
    n = min(n, keys_values(cache)[0].shape[-2] - 1)
    replace_kv(cache, lambda t: t[..., n:, :])


def other_layout(cache, n):
    replace_kv(cache, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))


def shallow_copy(cache, n):
    return copy.copy(cache)


def deep_copy(cache, n):
    return copy.deepcopy(cache)


def pickled(cache, n):
    return pickle.loads(pickle.dumps(cache))


def saved(cache, n):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def sent_to_a_process(cache, n):
    # as a queue does, which moves what is sent into shared memory
    return pickle.loads(bytes(ForkingPickler.dumps(cache)))


def shared_with_processes(cache, n):
    for t in keys_values(cache):
        t.share_memory_()


def hold_views(cache, n):
    return [t.view(torch.int64) for t in keys_values(cache)]


def hold_part(cache, n):
    return [t[..., -n:, 2:] for t in keys_values(cache)]


def hold_numpy(cache, n):
    return [t.numpy() for t in keys_values(cache)]


def hold_storage(cache, n):
    return [
        t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride()) for t in keys_values(cache)
    ]


def read_fields(cache, n):
    assert all("cached_kv" in repr(inter) for inter in cache.attn_intermediates)


ACTIONS = (
    *(detach, data, parameter, clone, as_list, edit_in_place, edit_in_numpy, refill, shift_in_place),
    *(replace_values, replace_keys_of_one_layer, swap_rows, one_row_for_all, rows_from_two, roll_back),
    *(forget_the_oldest, other_layout, shallow_copy, deep_copy, pickled, saved, sent_to_a_process),
    *(shared_with_processes, hold_views, hold_part, hold_numpy, hold_storage, read_fields),
)
# half of the lines go on from a cache, by one token or several
lines = st.tuples(st.one_of(st.just(None), st.sampled_from(ACTIONS)), st.integers(0, 9), st.integers(1, 3))


class Session:
    """A model, and the caches that came of a prompt and of one line of a program after another."""

    def __init__(self, model: Any, imports: Callable[[], Any], prompt: Tensor) -> None:
        self.model, self.imports = model, imports
        self.logits, cache = model(prompt, return_intermediates=True)
        self.caches = [cache]
        self.held: list[Any] = []

    def run(self, action: Callable[..., Any] | None, which: int, n: int, seed: int) -> str:
        """What torch says against it: rows that share their memory, say, cannot be edited in place."""
        try:
            self.do(action, which, n, seed)
        except RuntimeError as error:
            return str(error)
        return ""

    def do(self, action: Callable[..., Any] | None, which: int, n: int, seed: int) -> None:
        if action in (sent_to_a_process, shared_with_processes) and any(isinstance(t, np.ndarray) for t in self.held):
            return  # torch leaves them without their memory
        cache = self.caches[which % len(self.caches)]
        if action is None:
            self.logits, found = continue_with(self.model, tokens(seed, 2, n), cache)
        else:
            with self.imports():  # pickle finds classes by name
                found = action(cache, n)
        if isinstance(found, list):
            self.held += found
        elif found is not None:
            self.caches.append(found)

    def everything(self) -> list[Tensor]:
        """All that anyone can see: the last output, what is cached, and what was taken from it."""
        return [
            self.logits,
            *(t for cache in self.caches for t in keys_values(cache)),
            *(torch.as_tensor(t).view(torch.float64) for t in self.held),
        ]


@given(
    decoder_options(), seeds, st.integers(1, 12), st.lists(lines, min_size=2, max_size=10), st.booleans(), st.booleans()
)
def test_whatever_is_done_with_a_cache_it_is_as_if_every_step_made_a_copy(
    options, seed, prompt_len, program, look, inference
):
    with torch.no_grad(), torch.inference_mode(inference):
        models = zip(build_both(options, seed), (nullcontext, pristine_imports))
        sessions = [Session(model, imports, tokens(seed, 2, prompt_len)) for model, imports in models]

        for number, (action, which, n) in enumerate(program):
            errors = [session.run(action, which, n, seed + number) for session in sessions]
            assert errors[0] == errors[1]
            # to look at a cache is one of the things that may be done with it
            if look or number == len(program) - 1:
                ours, theirs = (session.everything() for session in sessions)
                for actual, expected in zip(ours, theirs, strict=True):
                    assert_same(actual, expected)


@given(decoder_options(), seeds, splits())
def test_what_is_cached_is_not_rotated(options, seed, lens):
    # as with plain rotary and the same parameters, in the first layer, which no attention precedes
    model, plain = build(options, seed), build({**options, "rotary_xpos": False, "rotary_pos_emb": True}, seed)
    x = tokens(seed, 2, sum(lens))

    _, cache = prefill_with_cache(model, x, lens)
    _, expected = prefill_with_cache(plain, x, lens)

    for actual, t in zip(keys_values(cache)[:2], keys_values(expected)[:2]):
        assert_equal_to_rounding(actual, t)


# requests side by side, and steps that fail


@pytest.mark.parametrize("steps_before", [0, 3])
@torch.no_grad()
def test_threads_that_share_a_prompt_answer_as_each_alone(steps_before):
    model, threads = build({**OPTIONS, "attn_flash": True}, 0), 8
    _, prompt = prefill_with_cache(model, tokens(0, 1, 20 + steps_before), [20] + [1] * steps_before)

    def answer(seed: int) -> Tensor:
        with torch.no_grad():
            cache, logits = prompt, []
            for token in tokens(seed, 1, 6).split(1, dim=1):
                out, cache = continue_with(model, token, cache)
                logits.append(out)
                if seed % 3 == 0:
                    keys_values(cache)
            return torch.cat(logits, dim=1)

    expected = [answer(seed) for seed in range(40)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2):
            found = list(pool.map(answer, range(40)))
            assert all(torch.equal(a, b) for a, b in zip(found, expected))


@given(decoder_options(), seeds, st.integers(1, 12), st.integers(0, 3), st.sampled_from(["batch", "interrupted"]))
def test_after_a_step_that_failed_the_cache_is_as_it_was(options, seed, prompt_len, steps_before, how):
    lens = [prompt_len] + [1] * steps_before
    for model in build_both(options, seed):
        _, cache = prefill_with_cache(model, tokens(seed, 2, sum(lens)), lens)
        before = copy.deepcopy(keys_values(cache))
        x = tokens(seed + 1, 2, 2)
        expected, _ = continue_with(model, x, copy.deepcopy(cache))

        if how == "batch":
            with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
                continue_with(model, tokens(seed, 3, 1), cache)
        else:
            # out of memory, or Ctrl-C, in the last layer: the others have gone on
            last = [m for m in model.modules() if hasattr(m, "attend")][-1]
            hook = last.attend.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                continue_with(model, x, cache)
            hook.remove()

        assert torch.equal(continue_with(model, x, cache)[0], expected)
        assert all(torch.equal(a, b) for a, b in zip(keys_values(cache), before))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# gradients, modes and dtypes


@given(decoder_options(), seeds, splits())
def test_with_gradients_they_are_those_of_the_full_forward(options, seed, lens):
    x = tokens(seed, 2, sum(lens))
    model = build(options, seed).requires_grad_(True)
    params = list(model.parameters())

    logits, _ = prefill_with_cache(model, x, lens)

    decoded = torch.autograd.grad(logits.square().sum(), params, allow_unused=True)
    full = torch.autograd.grad(model(x).square().sum(), params, allow_unused=True)
    for d, f in zip(decoded, full):
        assert (d is None) == (f is None)
        if d is not None:
            assert_equal_to_rounding(d, f)


@given(decoder_options(), seeds, splits(), st.lists(st.sampled_from(["grad", "no grad", "inference"]), min_size=6))
def test_a_cache_may_cross_from_any_mode_to_any(options, seed, lens, modes):
    x = tokens(seed, 2, sum(lens))
    model = build(options, seed)
    expected = model(x)
    # as when values are trained and keys are not
    for attention in (m for m in model.modules() if hasattr(m, "to_v")):
        attention.to_v.requires_grad_(True)

    logits, cache = [], None
    for chunk, mode in zip(x.split(lens, dim=1), modes):
        with {"grad": torch.enable_grad, "no grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            if cache is not None and mode == "grad" and any(t.is_inference() for t in keys_values(cache)):
                replace_kv(cache, torch.clone)  # autograd does not take them
            out, cache = continue_with(model, chunk, cache)
            logits.append(out.detach())

    assert_equal_to_rounding(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, dict(attn_value_rmsnorm=True), dict(attn_num_mem_kv=2)])
@torch.no_grad()
def test_under_autocast_every_cached_tensor_keeps_its_dtype_and_its_values(dtype, options):
    # a norm of the values leaves them in float32, beside keys in half precision
    x = tokens(0, 2, 12)
    found = []
    for model in build_both({**OPTIONS, **options}, 0, torch.float32):
        _, cache = model(x[:, :6], return_intermediates=True)
        states = []
        for position in range(6, 12):
            # in and out of it, as `torch.cat` promotes
            with torch.autocast("cpu", dtype=dtype, enabled=position not in (6, 10)):
                _, cache = continue_with(model, x[:, position, None], cache)
            states.append([t.clone() for t in keys_values(cache)])
        for before, after in zip(states, states[1:]):
            assert all(torch.equal(a[..., : b.shape[-2], :].to(b.dtype), b) for a, b in zip(after, before))
        found.append(states)

    for ours, theirs in zip(*found):
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]


@given(decoder_options(), seeds, st.integers(1, 8), st.integers(1, 8))
def test_generation_leaves_the_cache_that_it_is_given_to_others(options, seed, prompt_len, num_new):
    prompt = tokens(seed, 2, prompt_len)
    ours, theirs = (AutoregressiveWrapper(model) for model in (build(options, seed), build(options, seed)))

    assert torch.equal(
        ours.generate(prompt, num_new, temperature=0.0, cache_kv=True),
        theirs.generate(prompt, num_new, temperature=0.0, cache_kv=False),
    )


# memory


@torch.no_grad()
def test_what_is_read_saved_or_sent_holds_no_more_than_the_cache():
    model, x = build(OPTIONS, 0), tokens(0, 2, 40)
    _, early = prefill_with_cache(model, x[:, :16], [4] + [1] * 12)
    cache = early
    for token in x[:, 16:].split(1, dim=1):
        _, cache = continue_with(model, token, cache)

    for held in (early, copy.deepcopy(early), pickle.loads(pickle.dumps(early))):
        for t in keys_values(held):
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
    # a file loads where the fork is not installed
    assert b"CachedIntermediates" not in pickle.dumps(cache)
    assert b"Room" not in pickle.dumps(cache)


def tensors_alive() -> int:
    """Bytes in all storages of tensors that are alive."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


@torch.no_grad()
def test_nothing_is_kept_once_a_model_and_its_caches_are_gone():
    before = tensors_alive()

    for scale_base in (8, 32):
        model = build({**OPTIONS, "rotary_xpos_scale_base": scale_base, "attn_num_mem_kv": 2}, 0)
        cache = prefill_with_cache(model, tokens(0, 2, 2_000), [1_900] + [1] * 100)[1]
        branches = [continue_with(model, tokens(i, 2, 1), cache)[1] for i in range(4)]
        assert tensors_alive() > before
        del model, cache, branches

    assert tensors_alive() == before


# appending


@given(decoder_options(), seeds, st.integers(1, 40), st.integers(3, 20))
@torch.no_grad()
def test_from_the_third_step_on_nothing_that_is_cached_is_copied(options, seed, prompt_len, num_steps):
    model = build(options, seed)
    x = tokens(seed, 2, prompt_len + num_steps)
    _, cache = model(x[:, :prompt_len], return_intermediates=True)
    memory = []

    for step in range(num_steps):
        _, cache = continue_with(model, x[:, prompt_len + step, None], cache)
        rooms = [vars(inter)["cached_kv"] for inter in cache.attn_intermediates]
        memory.append([t.data_ptr() for room in rooms for t in room.kv])

    # there is room for 16 more
    assert all(addresses == memory[1] for addresses in memory[1:17])
    replace_kv(cache, torch.clone)
    _, cache = continue_with(model, x[:, :1], cache)
    assert [inter.cached_kv[0].shape[-2] for inter in cache.attn_intermediates] == [prompt_len + num_steps + 1] * len(
        cache.attn_intermediates
    )
    assert all(isinstance(inter, Intermediates) for inter in cache.attn_intermediates)
