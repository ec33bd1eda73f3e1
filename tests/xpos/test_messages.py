"""The errors of a model with xPos, in whatever makes a decoder: what they say, and that a way out works as written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, XTransformer
from x_transformers.free_transformer import FreeTransformer
from x_transformers.xpos import prefill

SCALE_BASE = "rotary_xpos_scale_base"
XPOS: dict[str, Any] = {"rotary_xpos": True}
# its limits are 71 queries in float32 and 569 in float64
NARROW, LIMIT, LENGTH = {**XPOS, SCALE_BASE: 0.5}, 71, 100

# models, and calls of them

EVERY = ("Decoder", "TransformerWrapper", "XTransformer", "FreeTransformer")


def build(name: str, options: dict[str, Any], encoder: bool = False) -> Any:
    """With these options of its decoder, or of an encoder that it has beside it, or that takes its place."""
    torch.manual_seed(0)
    if name == "XTransformer":
        sizes = dict(enc_num_tokens=50, dec_num_tokens=50, enc_max_seq_len=1024, dec_max_seq_len=1024)
        part = {f"{'enc' if encoder else 'dec'}_{key}": value for key, value in options.items()}
        return XTransformer(dim=32, enc_depth=1, dec_depth=2, **sizes, **part)
    if name == "FreeTransformer":
        sizes = dict(num_tokens=50, dim=32, dec_head_depth=1, dec_tail_depth=1, max_seq_len=1024)
        return FreeTransformer(**sizes, **(options if encoder else dict(dec_kwargs=options)))
    layers = (Encoder if encoder else Decoder)(dim=32, depth=2, heads=2, verbose=False, **options)
    return layers if name == "Decoder" else TransformerWrapper(num_tokens=50, max_seq_len=1024, attn_layers=layers)


def tokens(length: int) -> Tensor:
    return torch.arange(length)[None] % 50


def run(name: str, model: nn.Module) -> None:
    inputs = {
        "Decoder": ((torch.arange(LENGTH * 32).reshape(1, LENGTH, 32) * 0.37).sin(),),
        "TransformerWrapper": (tokens(LENGTH),),
        "XTransformer": (tokens(9), tokens(LENGTH)),
        "FreeTransformer": (tokens(LENGTH + 1),),  # the last is only predicted
    }
    assert model(*inputs[name]).isfinite().all()


# what is refused, and what is done instead; test_options.py has what is refused because of an option

TO_THE_DECODER = (
    "rotary xpos is not compatible with bidirectional attention - "
    "pass it to a `Decoder` alone (`dec_rotary_xpos`, `dec_kwargs`)"
)
TOO_MANY = (
    f"{LENGTH} queries in one call exceed the limit of {LIMIT} for rotary xpos in torch.float32 - "
    f"pass chunks of at most {LIMIT // 4} through the kv cache, with `input_not_include_cache = True` and `cache_age` "
    "their length, or train with a larger `rotary_xpos_scale_base` - "
    "`x_transformers.xpos.prefill` passes chunks, and `generate` continues from its `cache`"
)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_refused_and_what_is_done_instead(name: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(TO_THE_DECODER)):
        build(name, XPOS, encoder=True)
    run(name, build(name, XPOS))

    with pytest.raises(ValueError, match=re.escape(TOO_MANY)):
        run(name, build(name, NARROW))
    run(name, build(name, {**NARROW, SCALE_BASE: 1}))


@pytest.mark.parametrize("base", [0, -1.5, float("nan"), float("inf"), "512"])
def test_a_scale_base_that_is_no_number_above_0(base: object) -> None:
    with pytest.raises(AssertionError, match=f"`{SCALE_BASE}` must be above 0 and finite, not {base!r}"):
        build("Decoder", {**XPOS, SCALE_BASE: base})


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
