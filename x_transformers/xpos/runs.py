"""Ways to run a model over a text that must all give the same: in one call, prefixes, decoding, chunks and segments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .net import Inputs, Net, accepts

STEPS = 16


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, in float64; infinite where either is not finite."""
    difference = (a.detach().cpu().double() - b.detach().cpu().double()).abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else math.inf


def ladder(length: int) -> tuple[int, ...]:
    """Lengths from 1 to `length`, each about 5/8 of the next, so that odd and even ones both occur."""
    lengths = [length]
    while lengths[-1] > 1:
        lengths.append(lengths[-1] * 5 // 8)
    return tuple(reversed(lengths))


def part_sizes(length: int) -> tuple[int, ...]:
    # an even split, and an odd size that leaves a shorter last part
    return (length // 4, length // 7 | 1)


def whole(net: Net, inputs: Inputs) -> Tensor:
    """Outputs of all positions in one call."""
    return net(inputs)[0]


def decode(net: Net, inputs: Inputs, start: int, *, only_new: bool) -> Tensor:
    """Outputs from position `start - 1` on, after one call for all before and one for each position more."""
    out, cache = net(inputs.part(0, start))
    found = [out[:, -1:]]
    for end in range(start + 1, inputs.length + 1):
        out, cache = extend(net, inputs, end - 1, end, cache, only_new=only_new)
        found.append(out)
    return torch.cat(found, dim=1)


def prefill(net: Net, inputs: Inputs, size: int) -> Tensor:
    """Outputs of all positions, `size` of them in each call, through the KV cache."""
    out, cache = net(inputs.part(0, size))
    found = [out]
    for start in range(size, inputs.length, size):
        out, cache = extend(net, inputs, start, min(start + size, inputs.length), cache)
        found.append(out)
    return torch.cat(found, dim=1)


def extend(
    net: Net, inputs: Inputs, start: int, stop: int, cache: Any, *, only_new: bool | None = None, **options: Any
) -> tuple[Tensor, Any]:
    """Outputs from `start` to `stop`, given a cache of all before; only these are passed, or all.

    By default only these, where the release has an argument for that.
    """
    only_new = accepts("input_not_include_cache") if only_new is None else only_new
    options |= {"cache": cache, "cache_age": stop - start}
    if only_new:
        options["input_not_include_cache"] = True
    elif not net.is_wrapper and accepts("seq_pos_offset"):
        # the layers take what they are given with a cache for new
        options["seq_pos_offset"] = 0
    return net(inputs.part(start if only_new else 0, stop), **options)


def segments(net: Net, inputs: Inputs, sizes: list[int]) -> Tensor:
    """Outputs of consecutive segments, each given the hidden states of those before."""
    found, start, mems = [], 0, None
    keeps = {"return_mems": True} if net.reads_tokens else {}
    for size in sizes:
        out, intermediates = net(inputs.part(start, start + size), mems=mems, **keeps)
        found.append(out)
        start += size
        if keeps:
            mems = intermediates.mems
            continue
        hiddens = intermediates.hiddens
        mems = hiddens if mems is None else [torch.cat(pair, dim=-2) for pair in zip(mems, hiddens)]
        if net.max_mem_len is not None:
            mems = [each[:, -net.max_mem_len :] for each in mems]
    return torch.cat(found, dim=1)


def segment_sizes(length: int, kept: int | None) -> Iterator[list[int]]:
    """Segments of which none has more before it than are kept; at most `length` in all."""
    for size in dict.fromkeys(part_sizes(length)):
        longest = length if kept is None else min(length, kept + size)
        sizes = [size] * (longest // size) + [longest % size] * (longest % size > 0)
        if kept is None or sum(sizes[:-1]) <= kept:
            yield sizes
        elif kept > 0:
            yield [min(kept, longest // 2)] * 2
    if kept is not None and 0 < kept < length // 2:
        yield [kept, kept]
