"""xPos in the hands of what people train, store and copy models with, in one process."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import strategies
import torch
from strategies import build, gradients, tokens
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from x_transformers import Attention, AutoregressiveWrapper, FeedForward

LENGTH = 40
POS = torch.arange(LENGTH) + torch.tensor([[3], [90]])
OPTIONS: dict[str, Any] = {**strategies.OPTIONS, "rotary_xpos_scale_base": 16, "attn_num_mem_kv": 2}


def trainable(seed: int = 0, **options: Any) -> Any:
    return build({**OPTIONS, **options}, seed, dtype=torch.float32).requires_grad_(True)


def step(model: Any, seed: int, optimizer: Any, autocast: Any, backward: Any = Tensor.backward) -> None:
    optimizer.zero_grad()
    with autocast:
        loss = AutoregressiveWrapper(model)(tokens(seed, 2, LENGTH))
    backward(loss)
    optimizer.step()


# copies


def loaded_from_safetensors(model: Any, path: Any) -> Any:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, path / "model.safetensors")
    other = trainable(seed=1)
    assert safetensors.load_model(other, path / "model.safetensors") == (set(), [])
    return other


def averaged(model: Any, path: Any) -> Any:
    """The average of one and the same model, buffers included, is that model."""
    ema = pytest.importorskip("ema_pytorch").EMA(model, beta=0.5, update_every=1, update_after_step=0)
    for _ in range(3):
        ema.update()
    return ema.ema_model


@torch.no_grad()
def answers(model: Any) -> list[Tensor]:
    """With and without positions and a cache."""
    x = tokens(0, 2, LENGTH)
    generated = AutoregressiveWrapper(model.eval()).generate(x[:1, :5], 8, temperature=0.0)
    return [model(x), model(x, pos=POS), model(x[:, :1]), generated]


@pytest.mark.parametrize("make", [lambda model, path: copy.deepcopy(model), loaded_from_safetensors, averaged])
def test_a_copy_is_the_same_model_bit_for_bit_and_shares_nothing_with_it(make, tmp_path):
    model = trainable()
    AutoregressiveWrapper(model)(tokens(0, 2, LENGTH)).backward()

    other = make(model, tmp_path)

    before = answers(other)
    assert all(map(torch.equal, before, answers(model)))
    addresses = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert addresses.isdisjoint(t.data_ptr() for t in (*other.parameters(), *other.buffers()))
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.mul_(0.5)
    assert all(map(torch.equal, before, answers(other)))
    assert not torch.equal(before[0], answers(model)[0])


# training


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_trains_as_autocast_does(mixed_precision):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    model, expected = trainable(), trainable()
    optimizer, expected_optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, expected))
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    # as accelerate does with what a model returns, so that the loss is not in bfloat16
    expected.register_forward_hook(lambda _model, _args, out: tree_map_only(Tensor, lambda t: t.float(), out))

    for seed in range(2):
        step(prepared, seed, prepared_optimizer, accelerator.autocast(), accelerator.backward)
        step(expected, seed, expected_optimizer, torch.autocast("cpu", torch.bfloat16, mixed_precision == "bf16"))
    assert all(map(torch.equal, accelerator.unwrap_model(prepared).parameters(), expected.parameters()))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("what", ["layers", "model"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(("flash", "pos"), [(True, None), (False, POS)])
def test_gradients_with_activation_checkpoints_are_the_same_bit_for_bit(what, autocast, flash, pos):
    model, x, recomputed = trainable(attn_flash=flash), tokens(0, 2, LENGTH), list[int]()
    checkpointed = copy.deepcopy(model)
    checkpointed.attn_layers.layers[0][1].to_q.register_forward_hook(lambda *_: recomputed.append(1))
    layers = [module for module in checkpointed.modules() if isinstance(module, (Attention, FeedForward))]
    for module in layers if what == "layers" else [checkpointed]:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)

    found = []
    for each in (model, checkpointed):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = each(x, pos=pos)
        found.append([out, *gradients(each, out.float())])
    assert all(map(torch.equal, *found))
    assert len(recomputed) == 2
