"""One sequence sharded over processes, with xPos: the same logits and gradients as in one process.

    torchrun --standalone --nproc-per-node 4 examples/sharded_sequence.py

Every process holds `LENGTH / processes` consecutive tokens. Queries stay where they are; keys and values are gathered
from all processes in each attention, after their rotation. So each process passes along with its tokens

    pos             their positions in the whole sequence
    rotary_window   (0, length of the whole sequence), the same everywhere

`--own-windows` leaves `rotary_window` out, and shows what it costs. Exit status: 0 if the sharded model equals the
whole to rounding, 1 if not.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from x_transformers import Decoder, TransformerWrapper
from x_transformers.attend import Attend

LENGTH, BATCH, NUM_TOKENS = 240, 2, 64

# thousands of roundings follow each other, and softmax multiplies the relative error of a score by its size: 2 ** 16
# half ulps of the largest value
TOLERANCE = 2**16 * torch.finfo(torch.float64).eps / 2


class Gather(torch.autograd.Function):
    """(...) of every process -> (processes, ...) in all of them. The gradient of a part is the sum of what all ask."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, t.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def gather_keys(attend: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook before an attention: queries (b, h, n, d) of this process, keys and values (b, h, j, d) of all up to it.

    The mask of causal attention is aligned to the right in x-transformers, so it is right as it is. Memory keys
    (`attn_num_mem_kv`) are in front, the same in all processes.
    """
    q, *kv = args
    if kwargs.get("mask") is not None:
        raise ValueError("`mask` holds the keys of one process only; pass sequences without padding")
    num_mem = kv[0].shape[-2] - q.shape[-2]
    for at, t in enumerate(kv):
        parts = Gather.apply(t[..., num_mem:, :])[: dist.get_rank() + 1]
        kv[at] = torch.cat((t[..., :num_mem, :], *parts), dim=-2)
    return (q, *kv), kwargs


def forward_shard(model: Module, tokens: Tensor, *, own_windows: bool = False) -> Tensor:
    """Logits (b, n / processes, c) of the shard of `tokens` (b, n) that belongs to this process."""
    total, processes, rank = tokens.shape[1], dist.get_world_size(), dist.get_rank()
    if total % processes:
        raise ValueError(f"`tokens` has {total} in a sequence, no multiple of {processes} processes; pad it")
    shard, pos = (t.chunk(processes, dim=-1)[rank] for t in (tokens, torch.arange(total, device=tokens.device)))
    logits: Tensor = model(shard, pos=pos, rotary_window=None if own_windows else (0, total))
    return logits


def build(device: torch.device, **options: Any) -> Module:
    """The same model in every process, in float64, where rounding is too small to hide anything."""
    torch.manual_seed(0)
    xpos = dict(rotary_xpos=True, rotary_xpos_scale_base=64)
    decoder = Decoder(dim=32, depth=2, heads=4, attn_dim_head=16, attn_flash=True, verbose=False, **xpos, **options)
    model: Module = TransformerWrapper(num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=decoder)
    return model.double().to(device)


def gradients(model: Module, loss: Tensor) -> Tensor:
    """Of all parameters, in a row."""
    return torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(model.parameters()))])


def deviation(actual: Tensor, expected: Tensor) -> Tensor:
    """The largest, relative to the largest value expected."""
    apart = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return apart.detach().nan_to_num(nan=torch.inf)


def compare(device: torch.device, *, own_windows: bool, **options: Any) -> Tensor:
    """How far logits and gradients of a sharded sequence are from those in one process: (2,), the same everywhere."""
    tokens = torch.randint(NUM_TOKENS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)

    # in one process: every one of them, to compare with
    model = build(device, **options)
    expected = model(tokens)
    expected_gradients = gradients(model, expected.square().mean())

    # sharded: a loss is the sum of those of the shards, and so is a gradient
    model = build(device, **options)
    for module in model.modules():
        if isinstance(module, Attend):
            module.register_forward_pre_hook(gather_keys, with_kwargs=True)
    logits = forward_shard(model, tokens, own_windows=own_windows)
    actual_gradients = gradients(model, logits.square().sum() / expected.numel())
    dist.all_reduce(actual_gradients)

    own = expected.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    deviations = torch.stack([deviation(logits, own), deviation(actual_gradients, expected_gradients)])
    dist.all_reduce(deviations, dist.ReduceOp.MAX)
    return deviations


def main() -> int:
    parser = argparse.ArgumentParser(description="One sequence sharded over processes, with xPos.")
    parser.add_argument("--own-windows", action="store_true", help="leave `rotary_window` out, to see what goes wrong")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    deviations = compare(device, own_windows=options.own_windows)
    right = bool((deviations <= TOLERANCE).all())
    if dist.get_rank() == 0:
        print(f"{LENGTH} tokens in {dist.get_world_size()} shards, from the same in one process:")
        print(f"logits {deviations[0]:.1e}, gradients {deviations[1]:.1e}: {'equal to rounding' if right else 'WRONG'}")
    dist.destroy_process_group()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
