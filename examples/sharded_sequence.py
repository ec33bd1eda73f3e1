"""One sequence sharded over processes, with xPos: the same logits and gradients as in one process.

    torchrun --standalone --nproc-per-node 4 examples/sharded_sequence.py

Every process holds `LENGTH / processes` consecutive tokens. Queries stay where they are; keys and values are gathered
from all processes in each attention, after their rotation. A query in one process so meets keys that were rotated in
another, and xPos scales both relative to the center of a window of positions, which cancels only if it is the same
one. So each process passes two things along with its tokens:

    pos             its own positions in the whole sequence
    rotary_window   (0, length of the whole sequence), the same everywhere

Without `rotary_window` each takes the window of its own positions. `--own-windows` does that, and shows what it costs.

The whole sequence is one window, so its length is limited by the range of the dtype: to 32,861 in float32 and bfloat16
with the default scale base of 512, and in proportion to `rotary_xpos_scale_base`. Past that a ValueError says so.

Exit status: 0 if the sharded model equals the whole to rounding, 1 if not.
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

Hooked = tuple[tuple[Any, ...], dict[str, Any]]

LENGTH, BATCH, NUM_TOKENS = 240, 2, 64

# thousands of roundings follow each other, and softmax multiplies the relative error of a score by its size: 2 ** 16
# half ulps of the largest value
TOLERANCE = 2**16 * torch.finfo(torch.float64).eps / 2


def gather_keys(attend: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked:
    """A hook before an attention: queries (b, h, n, d) of this process, keys and values (b, h, j, d) of all up to it.

    The mask of causal attention is aligned to the right in x-transformers, as for a KV cache. So without the keys of
    the processes that follow, it is right as it is. Raises ValueError where a mask is passed too, since it is not
    gathered.
    """
    q, k, v = args
    if kwargs.get("mask") is not None:
        raise ValueError("`mask` holds the keys of one process only; pass sequences without padding")
    # memory keys (`attn_num_mem_kv`) are in front, the same in all processes
    num_mem = k.shape[-2] - q.shape[-2]
    return (q, *(torch.cat((t[..., :num_mem, :], *up_to_this(t[..., num_mem:, :])), dim=-2) for t in (k, v))), kwargs


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


def up_to_this(t: Tensor) -> tuple[Tensor, ...]:
    """The parts of the processes up to this one, which are of the same shape in all."""
    parts: Tensor = Gather.apply(t)  # type: ignore[no-untyped-call]
    return parts[: dist.get_rank() + 1].unbind()


def shard_attention_(model: Module) -> Module:
    """Makes every attention of a decoder attend to the keys of all processes; changes the model that is passed in."""
    for module in model.modules():
        if isinstance(module, Attend):
            module.register_forward_pre_hook(gather_keys, with_kwargs=True)
    return model


def forward_shard(model: Module, tokens: Tensor, *, own_windows: bool = False) -> Tensor:
    """Logits (b, n / processes, c) of the shard of `tokens` (b, n) that belongs to this process.

    Raises ValueError if the tokens cannot be shared out evenly.
    """
    total, processes, rank = tokens.shape[1], dist.get_world_size(), dist.get_rank()
    if total % processes:
        raise ValueError(f"`tokens` has {total} in a sequence, not a multiple of {processes} processes; pad it")
    size = total // processes
    pos = torch.arange(rank * size, (rank + 1) * size, device=tokens.device)
    shard = tokens[:, rank * size : (rank + 1) * size]
    window = None if own_windows else (0, total)
    logits: Tensor = model(shard, pos=pos, rotary_window=window)
    return logits


def build(device: torch.device) -> TransformerWrapper:
    """The same model in every process, in float64, where rounding is too small to hide anything."""
    torch.manual_seed(0)
    decoder = Decoder(
        dim=32,
        depth=2,
        heads=4,
        attn_dim_head=16,
        attn_flash=True,
        rotary_xpos=True,
        rotary_xpos_scale_base=64,
        verbose=False,
    )
    return TransformerWrapper(num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=decoder).double().to(device)


def gradients(model: Module, loss: Tensor) -> Tensor:
    """Of all parameters, in a row."""
    return torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(model.parameters()))])


def deviation(actual: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value expected."""
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def main() -> int:
    parser = argparse.ArgumentParser(description="One sequence sharded over processes, with xPos.", allow_abbrev=False)
    parser.add_argument("--own-windows", action="store_true", help="leave `rotary_window` out, to see what goes wrong")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    tokens = torch.randint(NUM_TOKENS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)

    # in one process: every one of them, to compare with
    whole = build(device)
    expected = whole(tokens)
    expected_gradients = gradients(whole, expected.square().mean())

    # sharded: a loss is the sum of those of the shards, and so is a gradient
    model = shard_attention_(build(device))
    logits = forward_shard(model, tokens, own_windows=options.own_windows)
    actual_gradients = gradients(model, logits.square().sum() / expected.numel())
    dist.all_reduce(actual_gradients)

    size, rank = logits.shape[1], dist.get_rank()
    of_logits = deviation(logits, expected[:, rank * size : (rank + 1) * size])
    deviations = torch.tensor([of_logits, deviation(actual_gradients, expected_gradients)], device=device)
    dist.all_reduce(deviations, dist.ReduceOp.MAX)
    right = bool((deviations <= TOLERANCE).all())

    if rank == 0:
        print(f"{LENGTH} tokens in {dist.get_world_size()} shards of {size}, from the same in one process:")
        print(f"logits {deviations[0]:.1e}, gradients {deviations[1]:.1e}: {'equal to rounding' if right else 'WRONG'}")
    dist.destroy_process_group()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
