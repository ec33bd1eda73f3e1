"""xPos in the hands of what people train, store and copy models with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from strategies import OPTIONS, build, tokens
from torch import Tensor
from torch.utils._pytree import tree_map_only

from x_transformers import AutoregressiveWrapper

LENGTH = 40


def trainable(seed: int = 0) -> Any:
    options = {**OPTIONS, "attn_num_mem_kv": 2, "rotary_xpos_scale_base": 16}
    return build(options, seed, dtype=torch.float32).requires_grad_(True)


def step(model: Any, optimizer: Any, seed: int, autocast: Any = None, backward: Any = Tensor.backward) -> None:
    optimizer.zero_grad()
    with autocast or nullcontext():
        loss = AutoregressiveWrapper(model)(tokens(seed, 2, LENGTH))
    backward(loss)
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


def loaded_from_safetensors(model: Any, path: Any) -> Any:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, path / "model.safetensors")
    other = trainable(seed=1)
    assert safetensors.load_model(other, path / "model.safetensors") == (set(), [])
    return other


def averaged(model: Any, path: Any) -> Any:
    """The average of one and the same model, buffers included, is that model."""
    ema_pytorch = pytest.importorskip("ema_pytorch")
    ema = ema_pytorch.EMA(model, beta=0.5, update_every=1, update_after_step=0)
    for _ in range(3):
        ema.update()
    return ema.ema_model


COPIES: dict[str, Callable[..., Any]] = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "safetensors": loaded_from_safetensors,
    "ema_pytorch": averaged,
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
def test_accelerate_trains_as_autocast_does(mixed_precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    model, expected = trainable(), trainable()
    optimizer, expected_optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, expected))
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    # as accelerate does with what a model returns, so that the loss is not in bfloat16
    expected.register_forward_hook(lambda _model, _args, out: tree_map_only(Tensor, lambda t: t.float(), out))

    for seed in range(2):
        step(prepared, prepared_optimizer, seed, accelerator.autocast(), accelerator.backward)
        step(expected, expected_optimizer, seed, torch.autocast("cpu", torch.bfloat16, mixed_precision == "bf16"))
    for actual, parameter in zip(accelerator.unwrap_model(prepared).parameters(), expected.parameters()):
        assert torch.equal(actual, parameter)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
