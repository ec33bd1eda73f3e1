"""Prefill of a sequence that is too long for one call: in chunks through the KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import TransformerWrapper
from x_transformers.x_transformers import LayerIntermediates, ShiftTokens

from .net import accepts

# what is the same for every chunk; any other argument of the call has something for each token, or changes the result
SAME_FOR_ALL = (
    "context",
    "context_mask",
    "context_pos",
    "condition",
    "seq_start_pos",
    "return_embeddings",
    "token_emb_kwargs",
    "to_logits_kwargs",
)


@torch.no_grad()
def prefill(
    model: nn.Module, tokens: Tensor, chunk: int, *, progress: bool = False, **same_for_all: Any
) -> tuple[Tensor, LayerIntermediates]:
    """The logits of all tokens and the KV cache, as of one call for all, from calls for `chunk` tokens each.

    `model` is a `TransformerWrapper`, or what has one as `net`, as `AutoregressiveWrapper`; it runs in the mode that it
    is in, without gradients. `tokens` are ids `(b, n)`; the logits are `(b, n, num_tokens)`, or the embeddings
    `(b, n, dim)` with `return_embeddings = True`, which take less memory. Go on with the cache as with that of a call:
    `model(next_token, cache = cache, input_not_include_cache = True, return_intermediates = True)`. `progress` shows a
    bar on a terminal. Other arguments go to every call.

    Raises ValueError, before the first call, for what cannot be taken in chunks. Some options give something else
    through a cache in upstream too, whatever the positions are: docs/options.md of this project lists them.
    """
    net = model
    while not isinstance(net, TransformerWrapper) and isinstance(getattr(net, "net", None), nn.Module):
        net = net.net  # type: ignore[assignment]
    _refuse(net, tokens, chunk, same_for_all)

    bar = _bar(tokens.shape[1]) if progress else None
    only_new = accepts("input_not_include_cache")
    found, cache = [], None
    for start in range(0, tokens.shape[1], chunk):
        stop = min(start + chunk, tokens.shape[1])
        # 1.27.5 wants what is in the cache as well
        options = dict(input_not_include_cache=True) if only_new else {}
        part = tokens[:, start if only_new else 0 : stop]
        out, cache = net(
            part, cache=cache, cache_age=stop - start, return_intermediates=True, **options, **same_for_all
        )
        if not isinstance(out, Tensor) or out.shape[:2] != part[:, start - stop :].shape:
            raise ValueError(
                "model gives no logits (b, n, num_tokens), one for each token: pass all tokens in one call"
            )
        found.append(out)
        if bar is not None:
            bar.update(stop - start)
    if bar is not None:
        bar.close()
    return torch.cat(found, dim=1), cache


def _refuse(net: nn.Module, tokens: Tensor, chunk: int, same_for_all: dict[str, Any]) -> None:
    """Raise ValueError for what is no language model, what cannot be taken in chunks, and what has no chunks."""
    wrappers = [module for module in net.modules() if isinstance(module, TransformerWrapper)]
    if len(wrappers) != 1:
        raise ValueError(
            f"model is a {type(net).__name__} with {len(wrappers)} TransformerWrappers in it: pass the one to prefill"
        )
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens has the shape {tuple(tokens.shape)}: pass token ids (b, n), with n at least 1")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give the number of tokens in a call, at least 1")
    if others := sorted({*same_for_all} - {*SAME_FOR_ALL}):
        raise ValueError(
            f"{', '.join(others)}: prefill takes {', '.join(SAME_FOR_ALL)}, which are the same for every chunk; "
            "for anything else call the model for each chunk yourself, with cache, cache_age and "
            "input_not_include_cache = True"
        )
    (wrapper,) = wrappers
    layers: Any = wrapper.attn_layers
    reasons = {
        "it is not causal": not layers.causal,
        "memory tokens, recycling and attn_selective have no KV cache": not (
            wrapper.can_cache_kv and getattr(layers, "can_cache_kv", True)
        ),
        "a looped model decodes one token at a time": getattr(wrapper, "looped", False),
        "shift_tokens is wrong with a KV cache, for every kind of positions": any(
            isinstance(module, ShiftTokens) for module in layers.modules()
        ),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"model cannot be prefilled in chunks, as {found[0]}: pass all tokens in one call")


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ValueError("progress needs tqdm, which is not installed: pip install tqdm") from None
    # None: where standard error is a terminal
    return tqdm(total=total, unit=" tokens", disable=None)
