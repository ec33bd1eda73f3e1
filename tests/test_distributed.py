"""xPos in several processes: data in parallel, parameters sharded, and one sequence sharded."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import OPTIONS, SHARDED, deviation
from strategies import build, tokens
from torch.utils.checkpoint import checkpoint

from x_transformers.x_transformers import Attention, FeedForward

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "sharded_sequence.py"

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")


def torchrun(processes: int, *command: Any) -> subprocess.CompletedProcess:
    """Runs it on a free port, and never longer than two minutes, with all that it has started."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*launcher, *map(str, command)], env=env, **pipes, start_new_session=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def apart(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, float]]:
    """How far apart what a scenario compares is at most, in any process, by its label."""
    folder = tmp_path_factory.mktemp("distributed")
    ran = torchrun(request.param, TESTS / "distributed_worker.py", folder)
    assert ran.returncode == 0, ran.stderr
    of_ranks = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(request.param)]

    def of(scenario: str) -> dict[str, float]:
        worst: dict[str, float] = {}
        for of_rank in of_ranks:
            assert not isinstance(of_rank[scenario], str), of_rank[scenario]
            for label, by in of_rank[scenario]:
                worst[label] = max(worst.get(label, 0.0), by)
        return worst

    return of


# as in `assert_equal_to_rounding`: 2 ** 10 dependent roundings, amplified by softmax by up to 2 ** 6
ROUNDING = 2**16 * torch.finfo(torch.float64).eps / 2


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_training_in_parallel_is_training_in_one_process(apart, scenario):
    found = apart(scenario)

    assert len(found) > 10
    assert {label: by for label, by in found.items() if by > ROUNDING} == {}


def test_sharded_parameters_in_bfloat16_cost_xpos_no_more_than_plain_rotary(apart):
    worst = apart("fsdp in bfloat16")

    # a typical error of one is the largest of the other's now and then, but a factor of 4 apart is not chance
    assert worst["xpos full"] <= 4 * worst["rotary full"]
    # a prefix is rounded in another order at most: each of its two runs is as far from the exact one
    assert worst["xpos prefix"] <= 2 * worst["xpos full"]


@pytest.mark.parametrize("keys", SHARDED)
@pytest.mark.parametrize("of", ["logits", "gradients"])
def test_one_window_for_all_shards_is_the_model_in_one_process_and_one_for_each_is_not(apart, keys, of):
    worst = apart("sharded")

    assert worst[f"{keys}, one window: {of}"] <= ROUNDING
    assert worst[f"{keys}, own windows: {of}"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("options", "expected"), [([], "equal to rounding"), (["--own-windows"], "WRONG")])
def test_the_example_says_whether_it_is_right(options, expected):
    ran = torchrun(2, EXAMPLE, *options)

    assert (ran.returncode == 0) == (expected != "WRONG"), ran.stderr
    assert "in 2 shards" in ran.stdout
    assert expected in ran.stdout


# in one process


@pytest.mark.parametrize("what", ["layers", "model"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(("flash", "pos"), [(True, None), (False, torch.arange(40) + torch.tensor([[3], [9]]))])
def test_gradients_with_activation_checkpoints_are_the_same_bit_for_bit(what, autocast, flash, pos):
    model = build({**OPTIONS, "attn_flash": flash, "attn_num_mem_kv": 2}, 0, dtype=torch.float32).requires_grad_(True)
    x, recomputed = tokens(0, 2, 40), []
    forward = checkpointed = copy.deepcopy(model)
    checkpointed.attn_layers.layers[0][1].to_q.register_forward_hook(lambda *_: recomputed.append(1))
    if what == "model":
        forward = partial(checkpoint, checkpointed, use_reentrant=False)
    else:
        for module in checkpointed.modules():
            if isinstance(module, (Attention, FeedForward)):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, actual = model(x, pos=pos), forward(x, pos=pos)
    assert torch.equal(actual, expected)
    for out in (actual, expected):
        out.float().square().mean().backward()
    assert all(torch.equal(a.grad, e.grad) for a, e in zip(checkpointed.parameters(), model.parameters()))
    assert len(recomputed) == 2


@pytest.mark.parametrize("flash", [True, False])
def test_autocast_costs_xpos_no_more_than_plain_rotary(flash):
    x = tokens(0, 2, 200)

    def error(**options: Any) -> float:
        model = build({**OPTIONS, "attn_flash": flash, "rotary_xpos_scale_base": 128, **options}, 0, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(x)
        return deviation(actual, copy.deepcopy(model).double()(x))

    # both are the rounding of bfloat16 through two layers, so a factor of 4 apart is not chance
    assert error() <= 4 * error(rotary_xpos=False, rotary_pos_emb=True)
