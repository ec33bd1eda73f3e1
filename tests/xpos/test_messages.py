"""Each error that a model with xPos raises, in every wrapper: what it says, and that its way out works as written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from x_transformers import (
    AutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    MultiInputTransformerWrapper,
    TransformerWrapper,
    XTransformer,
)
from x_transformers.free_transformer import FreeTransformer
from x_transformers.xpos import prefill

Options = dict[str, Any]
SCALE_BASE = "rotary_xpos_scale_base"
# its limits are 71 queries in float32 and 569 in float64
NARROW: Options = {"rotary_xpos": True, SCALE_BASE: 0.5}
LIMIT, LENGTH = 71, 100

# models, and calls of them


OF_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Decoder": lambda attn_layers, max_seq_len: attn_layers,
    "TransformerWrapper": partial(TransformerWrapper, num_tokens=50),
    "ContinuousTransformerWrapper": partial(ContinuousTransformerWrapper, dim_in=32, dim_out=32),
    "MultiInputTransformerWrapper": partial(MultiInputTransformerWrapper, num_tokens=dict(a=50)),
}
EVERY = (*OF_LAYERS, "XTransformer", "FreeTransformer")


def build(name: str, options: Options, encoder: bool = False) -> Any:
    """With these options of its decoder, or of an encoder that it has beside it, or that takes its place."""
    torch.manual_seed(0)
    if name == "XTransformer":
        sizes: Options = dict(enc_num_tokens=50, dec_num_tokens=50, enc_max_seq_len=1024, dec_max_seq_len=1024)
        sizes.update({f"{'enc' if encoder else 'dec'}_{key}": value for key, value in options.items()})
        return XTransformer(dim=32, enc_depth=1, dec_depth=2, **sizes)
    if name == "FreeTransformer":
        # which passes `rotary_pos_emb` itself
        options = {key: value for key, value in options.items() if key != "rotary_pos_emb"}
        sizes = dict(num_tokens=50, dim=32, dec_head_depth=1, dec_tail_depth=1, max_seq_len=1024)
        return FreeTransformer(**sizes, **(options if encoder else dict(dec_kwargs=options)))
    layers = (Encoder if encoder else Decoder)(dim=32, depth=2, heads=2, verbose=False, **options)
    return OF_LAYERS[name](attn_layers=layers, max_seq_len=1024)


def tokens(length: int) -> Tensor:
    return torch.arange(length)[None] % 50


def run(name: str, model: nn.Module, **arguments: Any) -> None:
    hidden, ids = (torch.arange(LENGTH * 32).reshape(1, LENGTH, 32) * 0.37).sin(), tokens(LENGTH)
    inputs: dict[str, tuple[Any, ...]] = {
        "TransformerWrapper": (ids,),
        "MultiInputTransformerWrapper": (dict(a=ids),),
        "XTransformer": (tokens(9), ids),
        "FreeTransformer": (tokens(LENGTH + 1),),  # the last is only predicted
    }
    out = model(*inputs.get(name, (hidden,)), **arguments)
    assert all(t.isfinite().all() for t in (out.values() if isinstance(out, dict) else [out]))


# what is refused, and what is done instead


class Refusal(NamedTuple):
    """Of options that no model is built with, or of a call of one that is."""

    message: str
    options: Options
    instead: Options
    # its arguments
    call: Options | None = None
    error: type[Exception] = AssertionError
    of_encoder: bool = False
    wrappers: Iterable[str] = EVERY


NOT, INSTEAD = "rotary xpos is not compatible with", "- use `rotary_pos_emb = True` instead"
TO_THE_DECODER = f"{NOT} bidirectional attention - pass it to a `Decoder` alone (`dec_rotary_xpos`, `dec_kwargs`)"
SCORES = f"{NOT} `attn_l2_distance` or `attn_use_cope` {INSTEAD}"
CONTEXT = f"{NOT} `cross_attn_l2_distance` and `context_pos` {INSTEAD}"
TOO_MANY = (
    f"{LENGTH} queries in one call exceed the limit of {LIMIT} for rotary xpos in torch.float32 - "
    f"pass chunks of at most {LIMIT // 4} through the kv cache, with `input_not_include_cache = True` and `cache_age` "
    "their length, or train with a larger `rotary_xpos_scale_base` - "
    "`x_transformers.xpos.prefill` passes chunks, and `generate` continues from its `cache`"
)
XPOS, PLAIN, L2 = dict(rotary_xpos=True), dict(rotary_pos_emb=True), dict(attn_l2_distance=True)
# in cross-attention upstream refuses it, whatever the positions are
COPE = dict(attn_use_cope=True, cross_attn_use_cope=False)
CROSS: Options = dict(cross_attend=True, cross_attn_l2_distance=True)
POSITIONS: Options = dict(context=torch.ones(1, 5, 32), context_pos=torch.arange(5))
REFUSALS = {
    "bidirectional attention": Refusal(TO_THE_DECODER, XPOS, XPOS, of_encoder=True),
    "not causal": Refusal(f"{NOT} `causal = False` {INSTEAD}", XPOS, PLAIN, dict(causal=False), wrappers=OF_LAYERS),
    "l2 distance": Refusal(SCORES, {**XPOS, **L2}, {**PLAIN, **L2}),
    "CoPE": Refusal(SCORES, {**XPOS, **COPE}, {**PLAIN, **COPE}),
    "context": Refusal(CONTEXT, {**XPOS, **CROSS}, {**PLAIN, **CROSS}, POSITIONS, wrappers=OF_LAYERS),
    "queries": Refusal(TOO_MANY, NARROW, {**NARROW, SCALE_BASE: 1}, {}, ValueError),
}
for base in (0, -1.5, float("nan"), float("inf"), "512"):
    says = f"`rotary_xpos_scale_base` must be above 0 and finite, not {base!r}"
    REFUSALS[f"scale base {base!r}"] = Refusal(says, {**NARROW, SCALE_BASE: base}, {**NARROW, SCALE_BASE: 512})


@pytest.mark.parametrize(
    ("name", "refusal"),
    [pytest.param(name, r, id=f"{what}-{name}") for what, r in REFUSALS.items() for name in r.wrappers],
)
def test_what_is_refused_and_what_is_done_instead(name: str, refusal: Refusal) -> None:
    attempt = partial(build, name, refusal.options, refusal.of_encoder)
    if refusal.call is not None:
        attempt = partial(run, name, attempt(), **refusal.call)
    with pytest.raises(refusal.error, match=re.escape(refusal.message)):
        attempt()

    run(name, build(name, refusal.instead), **refusal.call or {})


# ways out that are other calls; test_wrappers.py passes chunks with the cache


@torch.no_grad()
def test_prefill_and_generate_as_the_message_says() -> None:
    model, prompt = AutoregressiveWrapper(build("TransformerWrapper", NARROW)), tokens(LENGTH)
    with pytest.raises(ValueError, match=re.escape(TOO_MANY)):
        model.generate(prompt, 5)
    _, cache = prefill(model, prompt[:, :-1], LIMIT // 4)
    found = model.generate(prompt, 5, temperature=0.0, cache=cache)
    assert torch.equal(found, model.double().generate(prompt, 5, temperature=0.0))


def test_a_cache_that_does_not_fit_the_prompts() -> None:
    model, prompt = AutoregressiveWrapper(build("TransformerWrapper", XPOS)), tokens(1030)
    _, cache = prefill(model, prompt[:, :20], 64)
    message = (
        "`cache`, of 1 x 20 tokens, must be of the first of 1 x 1030 `prompts` - without `prepend_embeds`, "
        "and with `restrict_to_max_seq_len = False` beyond `max_seq_len`"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(prompt, 3, cache=cache)
    how = dict(temperature=0.0, restrict_to_max_seq_len=False)
    assert torch.equal(model.generate(prompt, 3, cache=cache, **how), model.generate(prompt, 3, **how))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "TransformerWrapper"])
def test_prefill_names_what_to_pass(name: str) -> None:
    advice = (
        "0 TransformerWrappers in it: call its Decoder for each chunk yourself, with the cache of the last call, "
        "cache_age the length of the chunk, and input_not_include_cache = True"
    )
    if name == "XTransformer":
        advice = "2 TransformerWrappers in it: pass the one to prefill"
    with pytest.raises(ValueError, match=re.escape(f"model is a {name} with {advice}") + "$"):
        prefill(build(name, XPOS), tokens(20), 7)
