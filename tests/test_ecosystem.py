"""xPos in the hands of what people train, store, copy and decode models with."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import build, seeds, tokens
from test_properties import assert_equal_to_rounding
from test_wrappers import mem_kv_options
from torch import Tensor
from torch.utils._pytree import tree_map_only

from x_transformers import AutoregressiveWrapper, XLAutoregressiveWrapper

OPTIONS: dict[str, Any] = dict(
    dim=16,
    depth=2,
    heads=2,
    attn_dim_head=8,
    attn_num_mem_kv=2,
    rotary_emb_dim=8,
    rotary_xpos=True,
    rotary_xpos_scale_base=16,
    verbose=False,
)
LENGTH = 40

few = settings(max_examples=max(settings.default.max_examples // 4, 10))


def trainable(seed: int = 0) -> Any:
    return build(OPTIONS, seed, dtype=torch.float32).requires_grad_(True)


def loss_of(model: Any, seed: int) -> Tensor:
    return AutoregressiveWrapper(model)(tokens(seed, 2, LENGTH))


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    optimizer.step()


def assert_same_model(actual: Any, expected: Any) -> None:
    """Bit for bit, with and without positions and a cache."""
    actual, expected = actual.eval(), expected.eval()
    with torch.no_grad():
        for n in (1, 7, LENGTH):
            x, pos = tokens(n, 2, n), torch.arange(n) + torch.tensor([[3], [90]])
            assert torch.equal(actual(x), expected(x))
            assert torch.equal(actual(x, pos=pos), expected(x, pos=pos))
        generated = (AutoregressiveWrapper(m).generate(tokens(0, 1, 5), 8, temperature=0.0) for m in (actual, expected))
        assert torch.equal(*generated)


# copies


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded_from_safetensors(model: Any, path: Any) -> Any:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, path / "model.safetensors")
    other = trainable(seed=1)
    missing, unexpected = safetensors.load_model(other, path / "model.safetensors")
    assert not missing
    assert not unexpected
    return other


def averaged(model: Any) -> Any:
    """The average of one and the same model, buffers included, is that model."""
    ema_pytorch = pytest.importorskip("ema_pytorch")
    ema = ema_pytorch.EMA(model, beta=0.5, update_every=1, update_after_step=0)
    for _ in range(3):
        ema.update()
    return ema.ema_model


COPIES: dict[str, Callable[..., Any]] = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "pickle": lambda model, path: pickled(model),
    "torch.save": lambda model, path: saved_whole(model),
    "safetensors": loaded_from_safetensors,
    "ema_pytorch": lambda model, path: averaged(model),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_is_the_same_model_and_shares_nothing_with_it(make, tmp_path):
    model = trainable()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)

    other = make(model, tmp_path)

    assert_same_model(other, model)
    addresses = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not any(t.data_ptr() in addresses for t in (*other.parameters(), *other.buffers()))
    x = tokens(0, 2, LENGTH)
    before = other(x)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert torch.equal(other(x), before)
    assert not torch.equal(model(x), before)


# accelerate


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_trains_as_autocast_does_and_goes_on_from_a_saved_state(mixed_precision, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    model, expected = trainable(), trainable()
    optimizer, expected_optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, expected))
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    # as accelerate does with what a model returns, so that the loss is not in bfloat16
    expected.register_forward_hook(lambda _model, _args, out: tree_map_only(Tensor, lambda t: t.float(), out))
    x = tokens(9, 2, LENGTH)

    def prepared_step(seed: int) -> None:
        prepared_optimizer.zero_grad()
        with accelerator.autocast():
            loss = loss_of(prepared, seed)
        accelerator.backward(loss)
        prepared_optimizer.step()

    for seed in range(2):
        prepared_step(seed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed_precision == "bf16"):
            step(expected, expected_optimizer, seed)
    for actual, parameter in zip(accelerator.unwrap_model(prepared).parameters(), expected.parameters()):
        assert torch.equal(actual, parameter)

    accelerator.save_state(str(tmp_path))
    prepared_step(2)
    after = prepared(x).detach()
    prepared_step(3)
    accelerator.load_state(str(tmp_path))
    prepared_step(2)

    assert torch.equal(prepared(x).detach(), after)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


# decoding. What it sees of logits is in test_wrappers.py, what it chooses is here

GENERATE = {
    "greedy": dict(temperature=0.0),
    "top k": dict(filter_logits_fn="top_k", filter_kwargs=dict(k=5)),
    "top p": dict(filter_logits_fn="top_p", filter_kwargs=dict(thres=0.9)),
}


@few
@given(mem_kv_options(), seeds, st.integers(1, 8), st.integers(1, 12), st.sampled_from(sorted(GENERATE)))
def test_with_and_without_a_cache_the_same_tokens_are_generated(options, seed, prompt_len, num_new, how):
    # in float64, where no tie is so close that rounding would decide it
    wrapper, prompt = AutoregressiveWrapper(build(options, seed)), tokens(seed, 2, prompt_len)

    def generate(cache_kv: bool) -> Tensor:
        torch.manual_seed(seed)
        return wrapper.generate(prompt, num_new, cache_kv=cache_kv, **GENERATE[how])

    assert torch.equal(generate(cache_kv=True), generate(cache_kv=False))


@few
@given(mem_kv_options(), seeds, st.integers(1, 8), st.integers(1, 5))
def test_the_best_beam_of_one_is_the_greedy_one(options, seed, prompt_len, num_new):
    wrapper, prompt = AutoregressiveWrapper(build(options, seed)), tokens(seed, 2, prompt_len)

    greedy = wrapper.generate(prompt, num_new, temperature=0.0)

    assert torch.equal(wrapper.beam_search(prompt, num_new, beams=1), greedy)


@few
@given(mem_kv_options(), seeds, st.integers(1, 12), st.integers(2, 8), st.data())
def test_verifying_drafted_tokens_in_one_call_accepts_what_decoding_one_by_one_does(
    options, seed, prompt_len, num_drafted, data
):
    model, prompt = build(options, seed), tokens(seed, 1, prompt_len)
    greedy = AutoregressiveWrapper(model).generate(prompt, num_drafted, temperature=0.0)
    wrong_from = data.draw(st.integers(0, num_drafted))
    draft = torch.cat((greedy[:, :wrong_from], (greedy[:, wrong_from:] + 1) % 32), dim=1)

    def read(x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        new_alone = {} if cache is None else dict(cache=cache, cache_age=x.shape[1], input_not_include_cache=True)
        return model(x, **new_alone, return_intermediates=True)

    # the last token of the prompt goes with the draft, so that the first of the draft is verified too
    cache = read(prompt[:, :-1], None)[1] if prompt_len > 1 else None
    x = torch.cat((prompt[:, -1:], draft), dim=1)
    together, _ = read(x, cache)
    one_by_one = []
    for token in x.split(1, dim=1):
        logits, cache = read(token, cache)
        one_by_one.append(logits)

    assert_equal_to_rounding(together, torch.cat(one_by_one, dim=1))
    accepted = (together[:, :-1].argmax(dim=-1) == draft).long().cumprod(dim=-1).sum()
    assert accepted == wrong_from


@few
@given(mem_kv_options(), seeds, st.integers(3, 6), st.integers(1, 14))
def test_segments_generate_the_tokens_of_the_whole(options, seed, segment_len, prompt_len):
    # keys without a position would move with the segments, which start at 0 anew
    model = build({**options, "attn_num_mem_kv": 0}, seed, max_mem_len=1024)
    prompt = tokens(seed, 2, prompt_len)
    num_new = segment_len - prompt_len % segment_len
    whole = AutoregressiveWrapper(model).generate(prompt, num_new, temperature=0.0)

    def only_the_largest(logits: Tensor) -> Tensor:
        values, indices = logits.topk(1)
        return torch.full_like(logits, float("-inf")).scatter(-1, indices, values)

    model.max_seq_len = segment_len
    new = XLAutoregressiveWrapper(model).generate(prompt, num_new, filter_logits_fn=only_the_largest)

    assert torch.equal(new, whole)
