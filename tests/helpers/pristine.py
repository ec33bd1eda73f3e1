"""The unpatched release, imported beside the package that is tested, and models of both with the same parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import strategies
import torch
from trees import LINE, pristine_tree, provenance

import x_transformers
from x_transformers.xpos.checker.formula import angles, decays, rescaled_base

_RECORD = provenance.read_record(Path(x_transformers.__file__).parent)
PRISTINE = pristine_tree(Path("patches", _RECORD.line) if _RECORD is not None else LINE)
# the package, and what of the tests builds models of it
_ABOUT_THE_PACKAGE = ("x_transformers", "strategies", "survey", "ways")
MODULES: dict[str, ModuleType] = {}


@contextmanager
def pristine_imports() -> Iterator[None]:
    """While open, `x_transformers` is the unpatched release; what is imported keeps belonging to it."""

    def take() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in _ABOUT_THE_PACKAGE]
        return {name: sys.modules.pop(name) for name in names}

    fork = take()
    sys.modules.update(MODULES)
    sys.path.insert(0, str(PRISTINE))
    try:
        yield
    finally:
        sys.path.remove(str(PRISTINE))
        MODULES.update(take())
        sys.modules.update(fork)


with pristine_imports():
    import strategies as pristine_strategies


def build_both(
    options: dict[str, Any], seed: int, dtype: torch.dtype = torch.float64, *, exact: bool = True, **wrapper: Any
) -> tuple[Any, Any]:
    """A model of the fork and one of the unpatched release, with the same parameters.

    `exact` is to give upstream the digits of frequencies and decays that the fork has in float64.
    """
    with pristine_imports():
        expected = pristine_strategies.build(options, seed, dtype, **wrapper)
        if exact and options.get("rotary_xpos") and dtype is torch.float64:
            _hold_exact_buffers_(expected, options)
    return strategies.build(options, seed, dtype, **wrapper), expected


@torch.no_grad()
def _hold_exact_buffers_(model: Any, options: dict[str, Any]) -> None:
    """Upstream's buffers are rounded to float32 whatever the model's dtype: here they hold what they stand for."""
    rotary = model.attn_layers.rotary_pos_emb
    dim = options.get("rotary_emb_dim", options["attn_dim_head"] // 2)
    rotary.inv_freq = angles(dim, rescaled_base(dim, options.get("rotary_base_rescale_factor", 1.0)))
    rotary.scale = decays(dim)
