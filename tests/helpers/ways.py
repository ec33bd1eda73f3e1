"""Ways to run a model, and what is compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from x_transformers import TransformerWrapper
from x_transformers.x_transformers import LayerIntermediates


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, position: int = 0) -> None:
    """Equal but for float64 rounding, at positions up to `position`.

    One output is the end of some 2 ** 10 dependent roundings (3 layers of normalisation, projections,
    scores and softmax over at most 80 positions), and attention logits of size up to 2 ** 6 turn an
    error of theirs into a relative one of the weights: 2 ** 16 half ulps of the largest output.
    An angle is at most the position, and wrong by half an ulp of it: of the scores that is as many
    half ulps as the position is large, which goes through the weights of 3 layers, 2 ** 8 times.
    """
    assert actual.dtype == expected.dtype == torch.float64
    assert torch.isfinite(expected).all()
    half_ulps = 2**16 + 2**8 * abs(position)
    tolerance = half_ulps * torch.finfo(torch.float64).eps / 2 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def prefill_with_cache(
    model: TransformerWrapper, x: Tensor, lens: list[int], *, whole: bool = False, pos: Tensor | None = None, **kwargs
) -> tuple[Tensor, LayerIntermediates]:
    """Logits (b, n, c) of consecutive parts, and the cache; each is passed alone, or as the end of the `whole`."""
    out, cache, end = [], None, 0

    for new in lens:
        end += new
        passed = slice(0 if whole else end - new, end)
        if pos is not None:
            kwargs["pos"] = pos[..., passed]
        kwargs.update(cache=cache, cache_age=new, input_not_include_cache=not whole, return_intermediates=True)
        logits, cache = model(x[:, passed], **kwargs)
        out.append(logits)

    return torch.cat(out, dim=1), cache


def one_at_a_time(model: TransformerWrapper, x: Tensor, lens: list[int]) -> Tensor:
    return prefill_with_cache(model, x, [lens[0]] + [1] * sum(lens[1:]), whole=True)[0]


def segments(model: TransformerWrapper, x: Tensor, lens: list[int]) -> Tensor:
    out, mems = [], None
    for segment in x.split(lens, dim=1):
        logits, mems = model(segment, mems=mems, return_mems=True)
        out.append(logits)
    return torch.cat(out, dim=1)


def behind_mems(model: TransformerWrapper, x: Tensor, lens: list[int], whole: bool) -> Tensor:
    first, mems = model(x[:, : lens[0]], return_mems=True)
    rest, _ = prefill_with_cache(model, x[:, lens[0] :], lens[1:], whole=whole, mems=mems)
    return torch.cat((first, rest), dim=1)


def layers_alone(model: TransformerWrapper, x: Tensor, lens: list[int]) -> Tensor:
    """Without the wrapper, that gives them the offset otherwise, the layers take it from the cache."""
    out, cache = [], None
    for chunk in model.token_emb(x).split(lens, dim=1):
        hidden, cache = model.attn_layers(chunk, cache=cache, cache_age=chunk.shape[1], return_hiddens=True)
        out.append(hidden)
    return model.to_logits(torch.cat(out, dim=1))


WAYS = {
    "prefix, then all": lambda model, x, lens: torch.cat((model(x[:, : lens[0]]), model(x)[:, lens[0] :]), dim=1),
    "one token at a time": one_at_a_time,
    "several tokens at once": lambda model, x, lens: prefill_with_cache(model, x, lens, whole=True)[0],
    "chunks": lambda model, x, lens: prefill_with_cache(model, x, lens)[0],
    "segments with mems": segments,
    "several tokens at once behind mems": lambda model, x, lens: behind_mems(model, x, lens, whole=True),
    "chunks behind mems": lambda model, x, lens: behind_mems(model, x, lens, whole=False),
    "layers alone": layers_alone,
    "prefix prepended": lambda model, x, lens: model(x[:, lens[0] :], prepend_embeds=model.token_emb(x[:, : lens[0]])),
}


def continue_with(model: Any, x: Tensor, cache: Any, **kwargs: Any) -> tuple[Tensor, LayerIntermediates]:
    new_alone = dict(cache_age=x.shape[1], input_not_include_cache=True)
    return model(x, cache=cache, return_intermediates=True, **{**new_alone, **kwargs})


def keys_values(cache: LayerIntermediates) -> list[Tensor]:
    return [t for inter in cache.attn_intermediates for t in inter.cached_kv]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
