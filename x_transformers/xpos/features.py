"""The properties of xPos with further options of a decoder: other keys, other dtypes, shards, limits and refusals."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from x_transformers import Attention, Decoder

from . import formula, models
from .subject import MIN_LEN, Point, Subject, deviation, move, prefill, score_error, score_tolerance

_NUM_KEYS = 4
_CONTEXT_LEN = 48
_CONTEXT_PADDING = 80
_CAST_LEN = 512
_ROWS = 16


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(models.SEED))


# keys that are not of the text


@dataclass(frozen=True)
class WithOtherKeys:
    """Prefix consistency with options of the decoder, and with what is passed to it beside the text."""

    key: str
    name: str
    options: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    # the same once more, for which the answer must be the same
    padded: dict[str, Any] | None = None
    # the argument of `AttentionLayers.forward` that it is about, where that is what older releases lack
    needs: str | None = None

    def measure(self, subject: Subject) -> Iterator[Point]:
        net = subject.model(**self.options)
        inputs = move(self.inputs, subject.device, subject.dtype)
        full = net(subject.tokens, **inputs)
        for length in subject.lengths[:-1][::-2][::-1]:
            yield Point(length, deviation(net(subject.tokens[:, :length], **inputs), full[:, :length]), "prefix")
        if self.padded is not None:
            padded = net(subject.tokens, **move(self.padded, subject.device, subject.dtype))
            yield Point(subject.max_len, deviation(padded, full), "context padded")

    def tolerance(self, subject: Subject) -> float:
        return subject.logit_factor * subject.forced_error(self.inputs, **self.options)


def _added_key_values() -> list[tuple[Tensor, Tensor]]:
    keys_values = _normal(2, models.DEPTH, 1, models.HEADS, _NUM_KEYS, models.DIM_HEAD)
    return list(zip(keys_values[0], keys_values[1]))


def _context(padding: int) -> dict[str, Tensor]:
    length = _CONTEXT_LEN + padding
    return {
        "context": _normal(1, _CONTEXT_LEN + _CONTEXT_PADDING, models.DIM)[:, :length],
        "context_pos": torch.arange(length),
        "context_mask": torch.arange(length)[None] < _CONTEXT_LEN,
    }


WITH_OTHER_KEYS = (
    WithOtherKeys("mem-kv", "memory keys", {"attn_num_mem_kv": _NUM_KEYS}),
    WithOtherKeys("mem-kv-norm", "memory keys, qk norm", {"attn_num_mem_kv": _NUM_KEYS, "attn_qk_norm": True}),
    WithOtherKeys(
        "added-kv",
        "additional keys",
        {},
        {"self_attn_additional_kv": _added_key_values()},
        needs="self_attn_additional_kv",
    ),
    WithOtherKeys(
        "context-pos",
        "context positions",
        {"cross_attend": True},
        _context(0),
        padded=_context(_CONTEXT_PADDING),
        needs="context_pos",
    ),
)


# scores


def scores_cast_to(
    dtype: torch.dtype,
) -> tuple[Callable[[Subject], Iterator[Point]], Callable[[Subject], float]]:
    """The property that scores of a module cast to `dtype` are off by what that does to q and k, and its tolerance."""

    def measure(subject: Subject) -> Iterator[Point]:
        net = models.build(subject.room, flash=False).to(subject.device, dtype)
        length = min(_CAST_LEN, subject.max_len)
        rows = torch.linspace(0, length - 1, min(length, _ROWS)).long().to(subject.device)
        with models.observe(net, rows) as layers:
            _, cache = net(subject.tokens[:, :length], return_intermediates=True)
        for number, (layer, inter) in enumerate(zip(layers, cache.attn_intermediates), 1):
            error = score_error(layer.scores, layer.queries, inter.cached_kv[0][0], rows, torch.arange(length))
            yield Point(length, error, f"layer {number}")

    return measure, lambda subject: score_tolerance(dtype, _CAST_LEN)


def scores_across_shards(subject: Subject) -> Iterator[Point]:
    """Queries of one shard of a sequence score with the keys of another, rotated there, as the formula says."""
    net = models.build(subject.room, flash=False, depth=1).to(subject.device, subject.dtype)
    for length in [length for length in subject.lengths[:-1] if length > 1][::-3][::-1]:
        pos, cut = torch.arange(length, device=subject.device), length // 2
        rows = torch.linspace(0, length - cut - 1, min(length - cut, _ROWS)).long().to(subject.device)
        window = {"rotary_window": (0, length)}
        with models.observe(net, rows[:1]) as (first,):
            _, cache = net(subject.tokens[:, :cut], pos=pos[:cut], return_intermediates=True, **window)
        with models.observe(net, rows) as (second,):
            net(subject.tokens[:, cut:length], pos=pos[cut:], **window)
        scores = second.rotated_queries @ first.rotated_keys.mT * models.DIM_HEAD**-0.5
        keys = cache.attn_intermediates[0].cached_kv[0][0]
        yield Point(length, score_error(scores, second.queries, keys, pos[cut:][rows], pos[:cut]), f"cut at {cut:,}")


# what passes tables, and how far they go


def table_passed_in(subject: Subject) -> Iterator[Point]:
    """A token decoded with a table of rotary embeddings for all that is in the cache equals one call for all."""
    table_of = models.rotary_of(subject.net)
    for length in [length for length in subject.lengths if length > 1]:
        tokens = subject.tokens[:, :length]
        _, cache = subject.net(tokens[:, :-1], return_intermediates=True)
        table = table_of(torch.arange(length, device=subject.device))
        logits, _ = subject.net(tokens, rotary_pos_emb=table, cache=cache, return_intermediates=True)
        yield Point(length, deviation(logits, subject.full[:, length - 1 : length]))


def up_to_the_limit(subject: Subject) -> Iterator[Point]:
    """As many queries at once as the dtype has room for equal a third of them at a time; above the limit it raises."""
    # a scale base for which the limit is about half of the text
    # 1.27.x refuses whatever some flash attention could not do
    masked = not hasattr(models.rotary_of(subject.net), "max_seq_len")
    at_default = models.longest_window(subject.dtype, masked=masked)
    scale_base = formula.SCALE_BASE * subject.max_len / 2 / at_default
    fitting = models.longest_window(subject.dtype, scale_base, masked=masked)
    net = subject.model(rotary_xpos_scale_base=scale_base)
    tokens = subject.tokens[:, :fitting]
    yield Point(fitting, deviation(net(tokens), prefill(net, tokens, fitting // 3)), f"scale base {scale_base:.3g}")
    limit = models.limit_of(models.rotary_of(net), subject.dtype, masked=masked)
    try:
        net(subject.tokens[:, : limit + 1])
    except ValueError:
        yield Point(limit + 1, 0.0, "refused")
    else:
        yield Point(limit + 1, math.inf, "one query too many, and no error")


def refusals(subject: Subject) -> Iterator[Point]:
    """What no center cancels in is refused, as far as a release has it.

    These are l2 distance, CoPE and rotated values when a model is built, and `causal = False` on forward.
    """
    tokens = subject.tokens[:, :MIN_LEN]
    decoder = {"dim": models.DIM, "depth": 1, "heads": models.HEADS, "rotary_xpos": True, "verbose": False}
    known = inspect.signature(Attention.__init__).parameters
    attempts: dict[str, Callable[[], object]] = {
        f"attn_{option}": partial(Decoder, **decoder, **{f"attn_{option}": True})
        for option in ("l2_distance", "use_cope", "rotary_embed_values")
        if option in known
    }
    if models.accepts("causal"):
        attempts["causal = False"] = partial(subject.net, tokens, causal=False)
    for name, attempt in attempts.items():
        try:
            attempt()
        except AssertionError:
            yield Point(MIN_LEN, 0.0, name)
        else:
            yield Point(MIN_LEN, math.inf, f"{name} not refused")
