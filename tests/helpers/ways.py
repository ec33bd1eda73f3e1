"""The properties of the check at float64, where rounding is far below any error of the mathematics, and what else tests
do with a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from x_transformers import TransformerWrapper
from x_transformers.x_transformers import LayerIntermediates
from x_transformers.xpos.checker.models import Model, Text
from x_transformers.xpos.checker.properties import Property
from x_transformers.xpos.checker.runs import Case, Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def half_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounding(expected: Tensor, position: int = 0, *, in_float32: bool = False) -> float:
    """What rounding explains in a float64 output, of positions up to `position`.

    An output is the end of some 2 ** 10 dependent roundings (norms, projections, scores and a softmax over at most 80
    positions, in two or three layers), and scores of up to 2 ** 6 turn an error of theirs into a relative one of the
    weights: 2 ** 16 half ulps of the largest output. An angle is at most the position, and off by half an ulp of it: of
    the scores that is as many half ulps as the position is large, which goes through the weights 2 ** 6 times. Where
    one step works in float32, some 2 ** 4 roundings are of that size: 2 ** 10 of its half ulps.
    """
    relative = (2**16 + 2**6 * abs(position)) * half_ulp(torch.float64) + in_float32 * 2**10 * half_ulp(torch.float32)
    return relative * max(1.0, float(expected.detach().abs().max()))


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, position: int = 0) -> None:
    assert actual.dtype == expected.dtype == torch.float64
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(expected, position))


class Exact(Case):
    """A float64 model of which all rows are compared, to rounding."""

    model: Any

    def __init__(self, model: Model, texts: Text, plan: Plan, *, in_float32: bool = False) -> None:
        super().__init__(model, texts, plan)
        self.text, self.in_float32 = texts, in_float32

    def tolerance(self, way: str) -> float:
        position = max(map(abs, self.plan.shifts)) if way == "shift" else 0
        return rounding(self.full, position, in_float32=self.in_float32)

    def failure(self, prop: Property) -> str:
        """How a property is not had, or nothing."""
        allowed = self.tolerance(prop.key)
        try:
            worst = max(prop.measure(self), key=lambda point: point.deviation)
        except Exception as error:  # whatever it is, the property is not had
            return message(error)
        return "" if worst.deviation <= allowed else f"{worst.deviation:.1e} apart{worst.note and f', {worst.note}'}"


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


# through the KV cache, by arguments that the older line lacks


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


def continue_with(model: Any, x: Tensor, cache: Any, **kwargs: Any) -> tuple[Tensor, LayerIntermediates]:
    new_alone = dict(cache_age=x.shape[1], input_not_include_cache=True)
    return model(x, cache=cache, return_intermediates=True, **{**new_alone, **kwargs})


def keys_values(cache: LayerIntermediates) -> list[Tensor]:
    return [t for inter in cache.attn_intermediates for t in inter.cached_kv]


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
