"""What test_distributed.py runs in several processes: `torchrun tests/distributed_worker.py FOLDER`.

Each scenario gives pairs of what was computed by all processes and what one process computes. Every process leaves in
FOLDER how far apart they are, or the traceback where a scenario failed.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from strategies import NUM_TOKENS, build, tokens
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from x_transformers.x_transformers import Attention, FeedForward

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from sharded_sequence import forward_shard, gradients, shard_attention_  # type: ignore[import-not-found]

OPTIONS: dict[str, Any] = dict(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_emb_dim=8, verbose=False)
# the other softmax works in float32
OPTIONS.update(rotary_xpos=True, rotary_xpos_scale_base=16, attn_flash=True)
STEPS, BATCH, LENGTH = 3, 8, 48

# kinds of keys: of each token, memory without a position, shared by heads
SHARDED = {"plain": {}, "mem_kv": dict(attn_num_mem_kv=2), "one kv head": dict(attn_kv_heads=1)}

Pairs = Iterator[tuple[str, Tensor, Tensor]]


def model_with_gradients(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return build({**OPTIONS, **options}, seed, dtype=dtype).requires_grad_(True)


def deviation(actual: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value expected."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    largest = expected.double().abs().max()
    assert largest > 0
    return float((actual.double() - expected.double()).abs().max() / largest)


def of_this_process(length: int) -> slice:
    size = length // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def changes(model: Any, share: slice = slice(None)) -> list[Tensor]:
    """Of the parameters in some steps of training, each with a batch of its own."""
    # an optimizer with state; Adam would turn the rounding of a gradient near zero into a step of full size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        x = tokens(step, BATCH, LENGTH)[share]
        optimizer.zero_grad()
        cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
    after = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [a - before for a, before in zip(after, model_with_gradients().parameters(), strict=True)]


def shard_parameters(model: Any, **kwargs: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, (Attention, FeedForward)):
            fully_shard(module, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def trained(wrap: Callable[[Any], Any]) -> Pairs:
    expected = changes(model_with_gradients())
    actual = changes(wrap(model_with_gradients()), of_this_process(BATCH))
    for number, pair in enumerate(zip(actual, expected)):
        yield f"parameter {number}", *pair


def fsdp_in_bfloat16() -> Pairs:
    """Logits with parameters gathered in bfloat16, and those in float64; with plain rotary embeddings first."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    x = tokens(0, 2, LENGTH)
    for name, options in dict(rotary=dict(rotary_xpos=False, rotary_pos_emb=True), xpos={}).items():
        model = shard_parameters(model_with_gradients(dtype=torch.float32, **options), mp_policy=policy)
        exact = model_with_gradients(dtype=torch.float32, **options).double()
        full = model(x)
        assert full.dtype == torch.bfloat16
        yield f"{name} full", full, exact(x)
        for stop in (1, 5, 17, LENGTH - 1):
            yield f"{name} prefix", model(x[:, :stop]), full[:, :stop]


def sharded() -> Pairs:
    """Logits and gradients of a sequence in as many shards as there are processes."""
    x, own = tokens(0, 2, LENGTH), of_this_process(LENGTH)
    random = torch.randn(2, LENGTH, NUM_TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, options in SHARDED.items():
        whole = model_with_gradients(**options)
        expected = whole(x)
        expected_gradients = gradients(whole, (expected * random).sum())
        for own_windows in (False, True):
            model = shard_attention_(model_with_gradients(**options))
            logits = forward_shard(model, x, own_windows=own_windows)
            of_parameters = gradients(model, (logits * random[:, own]).sum())
            dist.all_reduce(of_parameters)
            label = f"{name}, {'own windows' if own_windows else 'one window'}"
            yield f"{label}: logits", logits, expected[:, own]
            yield f"{label}: gradients", of_parameters, expected_gradients


SCENARIOS = {
    "ddp": partial(trained, DistributedDataParallel),
    "fsdp": partial(trained, shard_parameters),
    "fsdp in bfloat16": fsdp_in_bfloat16,
    "sharded": sharded,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # one process that fails leaves the others waiting: for that long
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        try:
            results[name] = [(label, deviation(*pair)) for label, *pair in scenario()]
        except Exception:
            results[name] = traceback.format_exc()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
