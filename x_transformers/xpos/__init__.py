"""Tools for models with xPos (`rotary_xpos = True`), which the fork adds beside upstream's modules.

    from x_transformers.xpos import check, fold_mem_kv_, limits, prefill

`check` imports the checker when it is called. `python -m x_transformers.xpos --help` has the same from the shell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import x_transformers

if getattr(x_transformers, "__file__", None) is None:
    # with its own name, so that `python -m` prints the message without a traceback
    raise ImportError(
        "x_transformers is not installed in this environment, and a checkout has only a part of it. "
        "Run `pip install .` in the checkout first",
        name=__name__,
    )

from .limits import limits
from .memory_keys import fold_mem_kv_
from .prefill import prefill

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .checker.report import Report

__all__ = ["check", "fold_mem_kv_", "limits", "prefill"]


def check(
    model_or_layers: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_len: int | None = None,
    progress: bool = False,
) -> Report:
    """Run a model with xPos in every way that must give the same answer, and report how far the answers are apart.

    Checked are prefixes of a text, the KV cache, chunks, segments with mems, rows of a batch, shifts, padding, and the
    limit of queries in one call, on random tokens. `python -m x_transformers.xpos` measures 16 properties, of which
    these are 9: the others are of attention scores, or of models built with other options. The tolerance of each
    follows from the rounding errors of the dtype.

    Args:
        model_or_layers: a `TransformerWrapper`, `ContinuousTransformerWrapper`, `MultiInputTransformerWrapper` or
            `Decoder`, or any module that contains one, as `AutoregressiveWrapper`, `XTransformer` and `FreeTransformer`
            do. Each `Decoder` with xPos is checked, in its wrapper where that can be called. A copy runs, in eval mode:
            the model and the random state stay as they are.
        dtype: float16, bfloat16, float32 or float64, to which the copy is cast. By default the model's own.
        device: to which the copy is moved. By default the model's own.
        max_len: how many tokens to read in one call, at least 32. By default 512, or as many as the model can read.
        progress: print a line on standard error before each property is measured.

    Returns:
        A `Report`. `passed` is a bool, `failures` are the properties that do not hold, `left_out` those that this model
        cannot have, each with the reason, and `str(report)` is a table.

    Raises:
        ValueError: the model has no xPos or cannot be called, or an argument is not one of the above.

    Example:
        >>> from x_transformers import Decoder, TransformerWrapper
        >>> layers = Decoder(dim=32, depth=1, heads=2, rotary_xpos=True)
        >>> model = TransformerWrapper(num_tokens=50, max_seq_len=128, use_abs_pos_emb=False, attn_layers=layers)
        >>> report = check(model, max_len=64)
        >>> report.passed, report.failures
        (True, ())
        >>> [each.key for each in report.left_out]
        ['mems']
    """
    from .checker import check_model

    return check_model(model_or_layers, dtype=dtype, device=device, max_len=max_len, progress=progress)
