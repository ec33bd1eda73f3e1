"""xPos in several processes: data in parallel, parameters sharded, and one sequence sharded."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import strategies
import torch
import torch.distributed as dist
from strategies import build, tokens
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from trees import ROOT

from x_transformers import Attention, FeedForward

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without distributed")

if dist.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from examples.sharded_sequence import TOLERANCE, compare, deviation

# the other softmax works in float32
OPTIONS: dict[str, Any] = {**strategies.OPTIONS, "rotary_xpos_scale_base": 16, "attn_flash": True}
STEPS, BATCH, LENGTH = 3, 8, 48


def trainable(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return build({**OPTIONS, **options}, 0, dtype).requires_grad_(True)


def changes(model: Any, share: slice = slice(None)) -> list[Tensor]:
    """Of the parameters in some steps of training, each with a batch of its own."""
    # with a state; Adam would turn the rounding of a gradient near zero into a step of full size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        x = tokens(step, BATCH, LENGTH)[share]
        optimizer.zero_grad()
        cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
    after = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [a - before for a, before in zip(after, trainable().parameters(), strict=True)]


def shard_parameters(model: Any, **kwargs: Any) -> Any:
    kwargs["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, (Attention, FeedForward)):
            fully_shard(module, **kwargs)
    return fully_shard(model, **kwargs)


def training_in_parallel_is_training_in_one_process() -> None:
    expected = changes(trainable())
    for wrap in (DistributedDataParallel, shard_parameters):
        actual = changes(wrap(trainable()), share=slice(dist.get_rank(), None, dist.get_world_size()))
        assert max(map(deviation, actual, expected)) <= TOLERANCE, wrap


def sharded_parameters_in_bfloat16_cost_xpos_no_more_than_plain_rotary() -> None:
    policy, x, worst = MixedPrecisionPolicy(param_dtype=torch.bfloat16), tokens(0, 2, LENGTH), []
    for options in (dict(rotary_xpos=False, rotary_pos_emb=True), {}):
        model = shard_parameters(trainable(torch.float32, **options), mp_policy=policy)
        full = model(x)
        assert full.dtype == torch.bfloat16
        worst.append(deviation(full, trainable(torch.float32, **options).double()(x)))
    # a typical error of one is the largest of the other's now and then, but a factor of 4 apart is not chance
    assert worst[1] <= 4 * worst[0]
    # a prefix is rounded in another order at most: each of its two runs is as far from the exact one
    for stop in (1, 5, 17, LENGTH - 1):
        assert deviation(model(x[:, :stop]), full[:, :stop]) <= 2 * worst[1]


def one_window_for_all_shards_is_the_model_in_one_process_and_one_for_each_is_not() -> None:
    # kinds of keys: of each token, memory without a position, shared by heads
    for options in ({}, dict(attn_num_mem_kv=2), dict(attn_kv_heads=1)):
        own, one = (compare(torch.device("cpu"), own_windows=own, **options) for own in (True, False))
        assert one.max() <= TOLERANCE
        assert own.min() > 1e-3


def in_process(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # one process that fails leaves the others waiting: for that long
    group: dict[str, Any] = dict(init_method=f"file://{folder}/store", timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", rank=rank, world_size=processes, **group)
    training_in_parallel_is_training_in_one_process()
    sharded_parameters_in_bfloat16_cost_xpos_no_more_than_plain_rotary()
    one_window_for_all_shards_is_the_model_in_one_process_and_one_for_each_is_not()
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_holds_in_several_processes(processes, tmp_path):
    torch.multiprocessing.spawn(in_process, (processes, tmp_path), processes)


@pytest.mark.slow
def test_the_example_says_what_a_window_for_each_shard_costs():
    """That it is right otherwise is a command of docs/sharding.md, and run with the others."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = ROOT / "examples" / "sharded_sequence.py"
    ran = subprocess.run([*torchrun, example, "--own-windows"], text=True, capture_output=True)

    assert (ran.returncode, "in 2 shards" in ran.stdout, "WRONG" in ran.stdout) == (1, True, True), ran.stderr
