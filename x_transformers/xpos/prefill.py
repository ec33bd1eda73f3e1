"""Prefill of a sequence that is too long for one call: in chunks through the KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import TransformerWrapper
from x_transformers.x_transformers import LayerIntermediates, ShiftTokens

from .release import CACHED_TOKENS_LEFT_OUT

# arguments that are the same for every chunk; any other has something for each token, or changes the result
SAME_FOR_ALL = ["context", "context_mask", "context_pos", "condition", "seq_start_pos"]
SAME_FOR_ALL += ["return_embeddings", "token_emb_kwargs", "to_logits_kwargs"]
# what a call for a chunk takes
CHUNK = "with the cache of the last call, cache_age the length of the chunk, and input_not_include_cache = True"


@torch.no_grad()
def prefill(
    model: nn.Module, tokens: Tensor, chunk_size: int, *, progress: bool = False, **same_for_all: Any
) -> tuple[Tensor, LayerIntermediates]:
    """Logits of all tokens and the KV cache, the same as from one call, computed by calls for `chunk_size` tokens each.

    The model runs in the mode that it is in, without gradients.

    Args:
        model: a `TransformerWrapper`, or a wrapper that has one as `net`, as `AutoregressiveWrapper`.
        tokens: token ids (b, n) of dtype int64 or int32, n at least 1.
        chunk_size: the number of tokens in a call, at least 1.
        progress: show a bar on a terminal. It needs tqdm.
        **same_for_all: `context`, `context_mask`, `context_pos`, `condition`, `seq_start_pos`, `return_embeddings`,
            `token_emb_kwargs` and `to_logits_kwargs`, as the model takes them. They are passed to every call.

    Returns:
        The logits (b, n, num_tokens), or with `return_embeddings = True` the embeddings (b, n, dim), which take less
        memory; and the cache of all tokens. `generate` of `AutoregressiveWrapper` goes on from a `cache` of all tokens
        but the last.

    Raises:
        ValueError: an argument is not as above, or chunks through a KV cache cannot give what one call gives, as with
            `shift_tokens`, memory tokens or a model that is not causal. Nothing is computed then. docs/options.md lists
            the options with which a KV cache changes the answer whatever the positions are.

    Example:
        >>> import torch
        >>> from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
        >>> layers = Decoder(dim=32, depth=1, heads=2, rotary_xpos=True)
        >>> model = TransformerWrapper(num_tokens=50, max_seq_len=512, use_abs_pos_emb=False, attn_layers=layers).eval()
        >>> tokens = torch.arange(40)[None]
        >>> logits, cache = prefill(model, tokens[:, :-1], 16)
        >>> logits.shape
        torch.Size([1, 39, 50])
        >>> AutoregressiveWrapper(model).generate(tokens, 5, cache=cache).shape
        torch.Size([1, 5])
    """
    net = model
    while not isinstance(net, TransformerWrapper) and isinstance(getattr(net, "net", None), nn.Module):
        net = net.net  # type: ignore[assignment]
    _refuse(net, tokens, chunk_size, same_for_all)

    options = dict(same_for_all, return_intermediates=True)
    if CACHED_TOKENS_LEFT_OUT:
        options["input_not_include_cache"] = True
    starts: Iterable[int] = range(0, tokens.shape[1], chunk_size)
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:
            raise ValueError("progress needs tqdm, which is not installed: pip install tqdm") from None
        # None: where standard error is a terminal
        starts = tqdm(starts, unit=" chunks", disable=None)
    found, cache = [], None
    for start in starts:
        stop = min(start + chunk_size, tokens.shape[1])
        part = tokens[:, start if CACHED_TOKENS_LEFT_OUT else 0 : stop]
        out, cache = net(part, cache=cache, cache_age=stop - start, **options)
        if not isinstance(out, Tensor) or out.shape[:2] != part[:, start - stop :].shape:
            raise ValueError("model gives no output (b, n, …) with one row for each token: pass all tokens in one call")
        found.append(out)
    return torch.cat(found, dim=1), cache


def why_no_cache(model: Any) -> str:
    """Why a KV cache cannot give what one call gives with a wrapper or its layers; empty if nothing is known."""
    layers = getattr(model, "attn_layers", model)
    # in 1.27.5 wrappers alone say so
    if not all(getattr(part, "can_cache_kv", True) for part in (model, layers)):
        return "memory tokens, recycling and attn_selective have no KV cache"
    if any(isinstance(module, ShiftTokens) for module in layers.modules()):
        return "shift_tokens is wrong with a KV cache or mems in upstream, for every kind of positions"
    return ""


def _refuse(net: nn.Module, tokens: Any, chunk_size: object, same_for_all: dict[str, Any]) -> None:
    wrappers = [module for module in net.modules() if isinstance(module, TransformerWrapper)]
    if len(wrappers) != 1:
        advice = "pass the one to prefill" if wrappers else f"call its Decoder for each chunk yourself, {CHUNK}"
        raise ValueError(f"model is a {type(net).__name__} with {len(wrappers)} TransformerWrappers in it: {advice}")
    (wrapper,) = wrappers
    is_tensor = isinstance(tokens, Tensor)
    if not is_tensor or tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim != 2 or tokens.shape[1] == 0:
        given = f"{str(tokens.dtype)[6:]} {tuple(tokens.shape)}" if is_tensor else type(tokens).__name__
        raise ValueError(f"tokens is {given}: pass token ids (b, n) of dtype int64 or int32, with n at least 1")
    embedding = getattr(wrapper.token_emb, "emb", None)
    if isinstance(embedding, nn.Embedding) and tokens.numel() > 0:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= embedding.num_embeddings:
            raise ValueError(
                f"tokens has ids from {low} to {high}: the model has ids from 0 to {embedding.num_embeddings - 1}. "
                "For padding on the left pass any of these, and seq_start_pos"
            )
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: give the number of tokens in a call, a whole number from 1 on")
    if others := sorted({*same_for_all} - {*SAME_FOR_ALL}):
        raise ValueError(
            f"{', '.join(others)}: prefill takes {', '.join(SAME_FOR_ALL)}, which are the same for every chunk. For "
            f"anything else call the model for each chunk yourself, {CHUNK}"
        )
    reason = "it is not causal" if not wrapper.attn_layers.causal else why_no_cache(wrapper)
    if getattr(wrapper, "looped", False) and chunk_size > 1:
        reason = "a looped model decodes one token at a time"
    if reason:
        raise ValueError(f"model cannot be prefilled in chunks, as {reason}: pass all tokens in one call")
