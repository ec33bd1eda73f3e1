"""A KV cache is a value: for whoever has it, in whatever form, it holds what it held, and a step reads what is in it.

Most of this is told beside the unpatched release, which makes a new copy at every step: the same program of steps and
of what people do with a cache runs on a model of each, and all that is held has to be the same after every line of it.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pristine import build_both, pristine_imports
from strategies import OPTIONS, build, decoder_options, few, gradients, seeds, splits, tokens
from torch import Tensor, nn
from ways import assert_equal_to_rounding, continue_with, keys_values, prefill_with_cache

from x_transformers import AutoregressiveWrapper
from x_transformers.x_transformers import Intermediates, LayerIntermediates


def replace_kv(cache: LayerIntermediates, function: Callable[..., Tensor], *args: int) -> None:
    for inter in cache.attn_intermediates:
        inter.cached_kv = tuple(function(t, *args) for t in inter.cached_kv)


# what people do with a cache, with a number. Some take other keys and values for those that are in it
REPLACING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "detach": lambda t, n: t.detach(),
    "parameter": lambda t, n: nn.Parameter(t, requires_grad=False),
    "clone": lambda t, n: t.clone(),
    "swap rows": lambda t, n: t[torch.tensor([1, 0])],
    "one row for all": lambda t, n: t[:1].expand(2, -1, -1, -1),
    "forget the oldest": lambda t, n: t[..., min(n, t.shape[-2] - 1) :, :],
    "other layout": lambda t, n: t.transpose(1, 2).contiguous().transpose(1, 2),
}
# others edit them in place, or hold something of them
HOLDING: dict[str, Callable[[Tensor, int], Any]] = {
    # in inference mode, which alone edits what was made in it
    "edit": torch.inference_mode()(lambda t, n: t[..., : n + 1, :].mul_(0.5)),
    "edit in numpy": lambda t, n: np.multiply(t.numpy(), 1.25, out=t.numpy()),
    "shift": torch.inference_mode()(lambda t, n: t.copy_(t.roll(-1, -2))),
    "hold views": lambda t, n: t.view(torch.int64),
    "hold numpy": lambda t, n: t.numpy(),
    "hold the storage": lambda t, n: t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride()),
}


# others change some of it alone, or go on from a copy as well


def replace_one(cache: LayerIntermediates, n: int) -> None:
    """The keys or the values of one layer, and they are in a list then."""
    inter = cache.attn_intermediates[0]
    inter.cached_kv = list(inter.cached_kv)
    inter.cached_kv[n % 2] = inter.cached_kv[n % 2].roll(1, -2)


def roll_back(cache: LayerIntermediates, n: int) -> None:
    n = min(n, keys_values(cache)[0].shape[-2] - 1)
    replace_kv(cache, lambda t: t[..., : t.shape[-2] - n, :])
    cache.cache_length -= n


def save(cache: LayerIntermediates, _n: int) -> LayerIntermediates:
    torch.save(cache, file := io.BytesIO())
    for imports in (pristine_imports, nullcontext):  # the file loads where the fork is not installed too
        file.seek(0)
        with imports():
            loaded = torch.load(file, weights_only=False)
    return loaded


OTHERS: dict[str, Callable[[LayerIntermediates, int], LayerIntermediates | None]] = {
    "replace one": replace_one,
    "roll back": roll_back,
    "copy": lambda cache, n: copy.copy(cache),
    "deep copy": lambda cache, n: copy.deepcopy(cache),
    "pickle": lambda cache, n: pickle.loads(pickle.dumps(cache)),
    # as a queue does, which moves what is sent into shared memory
    "send to a process": lambda cache, n: pickle.loads(bytes(ForkingPickler.dumps(cache))),
    "save": save,
}
# half of the lines go on from a cache, by one token or several; not all get through
STEPS = ("step", "step", "step with a wrong batch", "step that is interrupted")
actions = st.one_of(st.sampled_from(STEPS), st.sampled_from([*REPLACING, *HOLDING, *OTHERS]))
programs = st.lists(st.tuples(actions, st.integers(0, 9), st.integers(1, 3)), min_size=2, max_size=10)

# of each line, again and again
MODES = {"no grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
modes_in_turn = st.lists(st.sampled_from([*MODES]), min_size=1, max_size=3)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def step(model: Any, action: str, x: Tensor, cache: LayerIntermediates) -> tuple[Tensor, LayerIntermediates]:
    if torch.is_grad_enabled():  # autograd does not take what was made in inference mode
        replace_kv(cache, lambda t: t.clone() if t.is_inference() else t)
    # out of memory, or Ctrl-C, in the last layer: the others have gone on
    last = [m for m in model.modules() if hasattr(m, "attend")][-1]
    with last.attend.register_forward_pre_hook(interrupt if "interrupted" in action else lambda *_: None):
        return continue_with(model, x, cache)


def session(model: Any, imports: Any, prompt: Tensor, program: Any, modes: list[str], look: bool) -> Iterator[Any]:
    """After each line: what torch says against it, and all that anyone can see, at last or whenever they `look`."""
    with MODES[modes[0]]():
        logits, cache = model(prompt, return_intermediates=True)
    caches, held, error = [cache], list[Any](), ""

    for number, (action, which, n) in enumerate(program):
        cache, x = caches[which % len(caches)], tokens(number, 1 if "batch" in action else 2, n)
        # `pickle` finds classes by name
        with MODES[modes[number % len(modes)]](), imports():
            try:
                if action in STEPS:
                    logits, after = step(model, action, x, cache)
                    caches.append(after)
                elif action in REPLACING:
                    replace_kv(cache, REPLACING[action], n)
                elif action in HOLDING:
                    held += [HOLDING[action](t, n) for t in keys_values(cache)]
                # torch leaves arrays without their memory where it moves that
                elif "process" not in action or not any(isinstance(t, np.ndarray) for t in held):
                    caches += filter(None, [OTHERS[action](cache, n)])
                error = ""
            except (RuntimeError, KeyboardInterrupt) as raised:
                error = repr(raised)
            seen = [logits, *(t for c in caches for t in keys_values(c))] if look or number == len(program) - 1 else []
        yield error, [*seen, *(torch.as_tensor(t).view(torch.float64) for t in held)]


@given(decoder_options(), seeds, st.integers(1, 12), programs, modes_in_turn, st.booleans())
# these fail where caches share memory: an older one is edited in place, or two steps go on from one
@example(OPTIONS, 0, 4, [("step", 0, 1), ("step", 1, 1), ("edit", 1, 2), ("step", 2, 1)], ["no grad"], False)
@example(OPTIONS, 0, 4, [("step", 0, 1), ("step", 1, 1), ("step", 1, 1), ("step", 2, 1)], ["no grad"], False)
@example(OPTIONS, 0, 4, [("step", 0, 1), ("step", 1, 1), ("hold views", 1, 2), ("edit", 2, 2)], ["no grad"], False)
@example(OPTIONS, 0, 4, [("step", 0, 1), ("copy", 1, 1), *[("step", n, 1) for n in (1, 2, 2)]], ["no grad"], False)
# where a step appends what does not fit
@example(OPTIONS, 0, 4, [("step", 0, 1), ("step with a wrong batch", 1, 1)], ["no grad"], False)
# and where it appends to what was made in another mode
@example(OPTIONS, 0, 4, [("step", n, 1) for n in range(6)], ["inference", "no grad", "grad"], False)
def test_whatever_is_done_with_a_cache_it_is_as_if_every_step_copied(options, seed, prompt_len, program, modes, look):
    models = build_both(options, seed)
    for attention in (m for model in models for m in model.modules() if hasattr(m, "to_v")):
        attention.to_v.requires_grad_(True)  # as when values are trained and keys are not

    both = zip(models, (nullcontext, pristine_imports))
    ours, theirs = (session(*each, tokens(seed, 2, prompt_len), program, modes, look) for each in both)
    for (our_error, our_tensors), (error, tensors) in zip(ours, theirs, strict=True):
        assert our_error == error
        for actual, expected in zip(our_tensors, tensors, strict=True):
            assert actual.shape == expected.shape
            # nobody is handed memory with room for more
            assert actual.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
            # an edit may make what comes after it anything
            if expected.isfinite().all():
                assert_equal_to_rounding(actual.detach(), expected.detach())


@pytest.mark.parametrize("steps_before", [0, 3])
@torch.no_grad()
def test_threads_that_share_a_prompt_answer_as_each_alone(steps_before):
    model = build({**OPTIONS, "attn_flash": True}, 0)

    def prompt() -> LayerIntermediates:
        return prefill_with_cache(model, tokens(0, 1, 20 + steps_before), [20] + [1] * steps_before)[1]

    @torch.no_grad()
    def answer(seed: int, cache: LayerIntermediates) -> Tensor:
        found = keys_values(cache) if seed == 3 else []
        for token in tokens(seed, 1, 6).split(1, dim=1):
            logits, cache = continue_with(model, token, cache)
            found += [logits, *(keys_values(cache) if seed % 3 == 0 else [])]
        return torch.cat([t.flatten() for t in found])

    expected = [answer(seed, prompt()) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for shared in (prompt() for _ in range(20)):
            assert all(map(torch.equal, pool.map(answer, range(8), [shared] * 8), expected))


@given(decoder_options(), seeds, splits())
def test_gradients_through_a_cache_are_those_of_the_full_forward(options, seed, lens):
    x = tokens(seed, 2, sum(lens))
    model = build(options, seed).requires_grad_(True)
    logits, _ = prefill_with_cache(model, x, lens)

    for decoded, full in zip(gradients(model, logits), gradients(model, model(x))):
        assert_equal_to_rounding(decoded, full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, dict(attn_value_rmsnorm=True), dict(attn_num_mem_kv=2)])
@torch.no_grad()
def test_under_autocast_every_cached_tensor_keeps_its_dtype_and_its_values(dtype, options):
    # a norm of the values leaves them in float32, beside keys in half precision
    x, dtypes = tokens(0, 2, 12), []
    for model in build_both({**OPTIONS, **options}, 0, torch.float32):
        caches = [model(x[:, :6], return_intermediates=True)[1]]
        for position in range(6, 12):
            # in and out of it, as `torch.cat` promotes
            with torch.autocast("cpu", dtype=dtype, enabled=position not in (6, 10)):
                caches.append(continue_with(model, x[:, position, None], caches[-1])[1])
        found = [*map(keys_values, caches)]
        for before, after in zip(found, found[1:]):
            assert all(torch.equal(a[..., : b.shape[-2], :].to(b.dtype), b) for a, b in zip(after, before))
        dtypes.append([t.dtype for kv in found for t in kv])

    assert dtypes[0] == dtypes[1]


# memory


def tensors_alive() -> int:
    """Bytes in all storages of tensors that are alive."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


@torch.no_grad()
def test_no_memory_is_kept_that_nobody_can_read():
    before = tensors_alive()

    for scale_base in (8, 32):
        model = build({**OPTIONS, "rotary_xpos_scale_base": scale_base, "attn_num_mem_kv": 2}, 0)
        cache = prefill_with_cache(model, tokens(0, 2, 400), [370] + [1] * 30)[1]
        branches = [continue_with(model, tokens(i, 2, 1), cache)[1] for i in range(4)]
        # with room for more, in one that has it for itself, once it is read or something else is in its place
        is_read, is_set = branches[1].attn_intermediates
        memory = [weakref.ref(t) for inter in (is_read, is_set) for t in inter.kv_memory]
        is_set.cached_kv = is_read.cached_kv
        gc.collect()
        assert not any(ref() is not None for ref in memory)
        del model, cache, branches, is_read, is_set

    assert tensors_alive() == before


PADDED, SLIDING = "generate from rows of two lengths", "generate past `max_seq_len`"


@pytest.mark.parametrize("way", ["steps", "generate", PADDED, SLIDING])
@few
@given(decoder_options(), seeds, st.integers(4, 40), st.integers(5, 18))
@torch.no_grad()
def test_from_the_second_step_on_nothing_that_is_cached_is_copied(way, options, seed, prompt_len, num_new):
    model = build(options, seed, torch.float32)  # in float64 upstream has nan for rows of padding alone
    model.max_seq_len = prompt_len + 4 if way == SLIDING else model.max_seq_len
    appended = []

    def addresses(cache: Any) -> list[int]:
        assert all(isinstance(inter, Intermediates) for inter in cache.attn_intermediates)
        return [t.data_ptr() for inter in cache.attn_intermediates for t in getattr(inter, "kv_memory", None) or ()]

    def note(layers: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        after = addresses(output[1])
        appended.append(kwargs["cache"] is not None and addresses(kwargs["cache"]) == after != [])

    model.attn_layers.register_forward_hook(note, with_kwargs=True)
    x = tokens(seed, 2, prompt_len + num_new)
    if way == "steps":
        prefill_with_cache(model, x, [prompt_len] + [1] * (num_new - 1))
    else:
        lens = dict(prompt_lens=torch.tensor([prompt_len, prompt_len // 4])) if way == PADDED else {}
        AutoregressiveWrapper(model).generate(x[:, :prompt_len], num_new, **lens)

    # the prompt, a first step that copies, and all others, as there is room for 16 more; what slides is copied
    num_appended = min(3, num_new - 2) if way == SLIDING else num_new - 2
    assert appended == [False] * 2 + [True] * num_appended + [False] * (num_new - 2 - num_appended)


# generate


@given(decoder_options(max_mem_kv=2), seeds, st.integers(1, 8), st.integers(1, 8), st.integers(0, 3), st.booleans())
@pytest.mark.regression("no argument")
@torch.no_grad()
def test_generate_continues_from_a_cache(options, seed, prompt_len, num_new, more, cache_kv):
    model = build(options, seed)
    wrapper, first = AutoregressiveWrapper(model), tokens(seed, 2, prompt_len)
    greedy = dict(temperature=0.0, return_intermediates=True)

    # of another turn, or of any part of the prompt
    turn, cache = wrapper.generate(first, num_new, cache=None, **greedy)
    prompt = torch.cat((first, turn, tokens(seed + 1, 2, more)), dim=1)
    held = [t.clone() for t in keys_values(cache)]
    wrapper.max_seq_len = prompt.shape[1]  # so that the window slides from the second token on
    expected, _ = wrapper.generate(prompt, num_new, cache_kv=cache_kv, **greedy)
    for each in (cache, model(first, return_intermediates=True)[1]):
        generated, after = wrapper.generate(prompt, num_new, cache=each, cache_kv=cache_kv, **greedy)
        assert torch.equal(generated, expected)

    assert all(map(torch.equal, held, keys_values(cache)))
    assert not cache_kv or after.cache_length == prompt.shape[1] + num_new - 1
    # of the prompts there is none new, a row is missing, there are too many tokens, or others are in front
    for misfit, kwargs in (
        (prompt[:, : cache.cache_length], {}),
        (prompt[:1], {}),
        (prompt.repeat(1, model.max_seq_len), {}),
        (prompt, dict(prepend_embeds=torch.zeros(2, 1, options["dim"]).double())),
    ):
        with pytest.raises(ValueError, match=rf"^`cache`, of 2 x {cache.cache_length} tokens, must"):
            wrapper.generate(misfit, num_new, cache=cache, **kwargs)
