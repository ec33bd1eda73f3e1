"""Each error that a model with xPos raises, in every wrapper: what it says, and that its way out works as written."""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import itemgetter
from typing import Any

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
SIZES: Options = dict(dim=32, depth=2, heads=2, verbose=False)
# its limits are 71 queries in float32 and 569 in float64
NARROW: Options = dict(rotary_xpos=True, rotary_xpos_scale_base=0.5)
LIMIT, LENGTH = 71, 100

# models: built from options of the decoder, and called with this many tokens


def tokens(length: int, batch: int = 1) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 50


def of_layers(wrap: Callable[[nn.Module], nn.Module], data: Callable[[int], Any]) -> Callable[..., Any]:
    def build(layers: type = Decoder, **options: Any) -> Any:
        torch.manual_seed(0)
        return wrap(layers(**SIZES, **options)).eval(), data

    return build


def hidden(length: int) -> Tensor:
    return (torch.arange(length * 32).reshape(1, length, 32) * 0.37).sin()


def transformer(layers: nn.Module) -> nn.Module:
    return TransformerWrapper(num_tokens=50, max_seq_len=1024, attn_layers=layers)


def continuous(layers: nn.Module) -> nn.Module:
    return ContinuousTransformerWrapper(dim_in=32, dim_out=32, max_seq_len=1024, attn_layers=layers)


def multi_input(layers: nn.Module) -> nn.Module:
    return MultiInputTransformerWrapper(num_tokens=dict(a=50), max_seq_len=1024, attn_layers=layers)


OF_LAYERS = {
    "Decoder": of_layers(lambda layers: layers, hidden),
    "TransformerWrapper": of_layers(transformer, tokens),
    "ContinuousTransformerWrapper": of_layers(continuous, hidden),
    "MultiInputTransformerWrapper": of_layers(multi_input, lambda length: dict(a=tokens(length))),
}


def x_transformer(**options: Any) -> Any:
    sizes = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in SIZES.items() if name != "dim"}
    sizes.update(enc_num_tokens=50, dec_num_tokens=50, enc_max_seq_len=1024, dec_max_seq_len=1024)
    return XTransformer(dim=32, **sizes, **options), lambda length: (tokens(9), tokens(length))


def free_transformer(**options: Any) -> Any:
    depths = dict(dec_head_depth=1, dec_tail_depth=1)
    model = FreeTransformer(num_tokens=50, dim=32, heads=2, max_seq_len=1024, **depths, **options)
    return model, lambda length: tokens(length + 1)  # the last is only predicted


def build(name: str, **of_decoder: Any) -> tuple[Any, Callable[[int], Any]]:
    if name == "XTransformer":
        return x_transformer(**{f"dec_{option}": value for option, value in of_decoder.items()})
    if name == "FreeTransformer":
        return free_transformer(dec_kwargs=of_decoder)
    return OF_LAYERS[name](**of_decoder)


def run(model: nn.Module, inputs: Any, **arguments: Any) -> Any:
    out = model(*inputs, **arguments) if isinstance(inputs, tuple) else model(inputs, **arguments)
    assert all(t.isfinite().all() for t in tensors(out))
    return out


def each(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return {key: change(t) for key, t in inputs.items()} if isinstance(inputs, dict) else change(inputs)


def in_chunks(model: nn.Module, inputs: Any, size: int, **same_for_all: Any) -> Tensor:
    """As the messages say."""
    length = tensors(inputs)[0].shape[1]
    returned = "return_hiddens" if isinstance(model, Decoder) else "return_intermediates"
    found, cache = [], None
    for start in range(0, length, size):
        stop = min(start + size, length)
        chunk = dict(cache=cache, input_not_include_cache=True, cache_age=stop - start)
        part = each(inputs, itemgetter((slice(None), slice(start, stop))))
        out, cache = model(part, **chunk, **same_for_all, **{returned: True})
        found.append(tensors(out)[0])
    return torch.cat(found, dim=1)


def in_float64(inputs: Any) -> Any:
    return each(inputs, lambda t: t.double() if t.is_floating_point() else t)


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return tensors(out[0]) if isinstance(out, tuple) else [*out.values()]


EVERY = [*OF_LAYERS, "XTransformer", "FreeTransformer"]
every_wrapper = pytest.mark.parametrize("name", EVERY)


# bidirectional attention: "pass it to a `Decoder` alone (`dec_rotary_xpos`, `dec_kwargs`)"

TO_THE_DECODER = (
    "rotary xpos is not compatible with bidirectional attention - "
    "pass it to a `Decoder` alone (`dec_rotary_xpos`, `dec_kwargs`)"
)


@every_wrapper
def test_bidirectional_attention(name: str) -> None:
    elsewhere: dict[str, Callable[[], Any]] = {
        "XTransformer": lambda: x_transformer(enc_rotary_xpos=True),
        "FreeTransformer": lambda: free_transformer(rotary_xpos=True),
    }
    with pytest.raises(AssertionError, match=re.escape(TO_THE_DECODER)):
        elsewhere.get(name, lambda: OF_LAYERS[name](Encoder, rotary_xpos=True))()
    model, data = build(name, rotary_xpos=True)
    run(model, data(20))


# options and arguments in which no center cancels: "use `rotary_pos_emb = True` instead"

INSTEAD = "use `rotary_pos_emb = True` instead"


@every_wrapper
@pytest.mark.parametrize("option", ["attn_l2_distance", "attn_use_cope"])
def test_options_that_are_refused(name: str, option: str) -> None:
    message = f"rotary xpos is not compatible with `attn_l2_distance` or `attn_use_cope` - {INSTEAD}"
    with pytest.raises(AssertionError, match=re.escape(message)):
        build(name, rotary_xpos=True, **{option: True})
    if (name, option) == ("XTransformer", "attn_use_cope"):
        return  # upstream refuses it in cross-attention, whatever the positions are
    # FreeTransformer passes rotary_pos_emb = True itself
    instead = {} if name == "FreeTransformer" else dict(rotary_pos_emb=True)
    model, data = build(name, **instead, **{option: True})
    run(model, data(20))


@pytest.mark.parametrize("name", OF_LAYERS)
def test_a_call_that_is_not_causal(name: str) -> None:
    model, data = build(name, rotary_xpos=True)
    message = f"rotary xpos is not compatible with `causal = False` - {INSTEAD}"
    with pytest.raises(AssertionError, match=re.escape(message)):
        model(data(20), causal=False)
    model, data = build(name, rotary_pos_emb=True)
    run(model, data(20), causal=False)


@pytest.mark.parametrize("name", OF_LAYERS)
def test_l2_distance_to_a_context_with_positions(name: str) -> None:
    options, context = dict(cross_attend=True, cross_attn_l2_distance=True), dict(context=hidden(5))
    model, data = build(name, rotary_xpos=True, **options)
    message = f"rotary xpos is not compatible with `cross_attn_l2_distance` and `context_pos` - {INSTEAD}"
    with pytest.raises(AssertionError, match=re.escape(message)):
        model(data(20), **context, context_pos=torch.arange(5))
    run(model, data(20), **context)
    model, data = build(name, rotary_pos_emb=True, **options)
    run(model, data(20), **context, context_pos=torch.arange(5))


# the scale base: "must be above 0 and finite"


@every_wrapper
@pytest.mark.parametrize("base", [0, -1.5, float("nan"), float("inf"), "512"])
def test_a_scale_base_that_is_no_number_above_0(name: str, base: Any) -> None:
    message = f"`rotary_xpos_scale_base` must be above 0 and finite, not {base!r}"
    with pytest.raises(AssertionError, match=re.escape(message)):
        build(name, rotary_xpos=True, rotary_xpos_scale_base=base)
    model, data = build(name, rotary_xpos=True, rotary_xpos_scale_base=512)
    run(model, data(20))


# more queries than the range has room for: chunks, or a larger scale base

TOO_MANY = (
    f"{LENGTH} queries in one call exceed the limit of {LIMIT} for rotary xpos in torch.float32 - "
    f"pass chunks of at most {LIMIT // 4} through the kv cache, with `input_not_include_cache = True` and `cache_age` "
    "their length, or train with a larger `rotary_xpos_scale_base` - "
    "`x_transformers.xpos.prefill` passes chunks, and `generate` continues from its `cache`"
)


@every_wrapper
def test_more_queries_than_the_range_has_room_for_and_a_larger_scale_base(name: str) -> None:
    model, data = build(name, **NARROW)
    with pytest.raises(ValueError, match=re.escape(TOO_MANY)):
        run(model, data(LENGTH))
    model, data = build(name, **{**NARROW, "rotary_xpos_scale_base": 1})
    run(model, data(LENGTH))


@pytest.mark.parametrize("name", [*OF_LAYERS, "XTransformer"])
@torch.no_grad()
def test_more_queries_than_the_range_has_room_for_and_chunks(name: str) -> None:
    model, data = build(name, **NARROW)
    context: Options = {}
    if name == "XTransformer":
        # its decoder takes chunks
        context = dict(context=model.encoder(tokens(9), return_embeddings=True))
        model, data = model.decoder.net, tokens
    inputs = data(LENGTH)
    found = in_chunks(model, inputs, LIMIT // 4, **context)

    # in float64 all of them fit into one call
    exact = run(model.double(), in_float64(inputs), **in_float64(context))
    torch.testing.assert_close(found.double(), tensors(exact)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_more_queries_than_the_range_has_room_for_in_generate_and_prefill() -> None:
    model = AutoregressiveWrapper(build("TransformerWrapper", **NARROW)[0])
    prompt = tokens(LENGTH)
    with pytest.raises(ValueError, match=re.escape(TOO_MANY)):
        model.generate(prompt, 5)
    _, cache = prefill(model, prompt[:, :-1], LIMIT // 4)
    found = model.generate(prompt, 5, temperature=0.0, cache=cache)
    assert torch.equal(found, model.double().generate(prompt, 5, temperature=0.0))


# a cache that does not fit the prompts


@pytest.mark.parametrize(
    ("cached", "prompts", "options"),
    [
        ((1, 30), (1, 30), {}),
        ((1, 31), (1, 30), {}),
        ((2, 20), (1, 30), {}),
        ((1, 20), (1, 1030), {}),
        ((1, 20), (1, 30), dict(prepend_embeds=torch.zeros(1, 3, 32))),
    ],
)
def test_a_cache_that_does_not_fit_the_prompts(
    cached: tuple[int, int], prompts: tuple[int, int], options: Options
) -> None:
    model = AutoregressiveWrapper(build("TransformerWrapper", rotary_xpos=True)[0])
    _, cache = prefill(model, tokens(cached[1], cached[0]), 64)
    message = (
        f"`cache`, of {cached[0]} x {cached[1]} tokens, must be of the first of {prompts[0]} x {prompts[1]} `prompts`"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(tokens(prompts[1], prompts[0]), 3, cache=cache, **options)

    batch, length = prompts[0], min(prompts[1], 1000)
    _, cache = prefill(model, tokens(length, batch)[:, :-1], 64)
    assert model.generate(tokens(length, batch), 3, cache=cache).shape == (batch, 3)


# prefill of what it cannot take


@pytest.mark.parametrize("name", [name for name in EVERY if name != "TransformerWrapper"])
@torch.no_grad()
def test_prefill_names_what_to_pass(name: str) -> None:
    model, _ = build(name, rotary_xpos=True)
    advice = (
        "call its Decoder for each chunk yourself, with the cache of the last call, cache_age the length of the chunk, "
        "and input_not_include_cache = True"
    )
    if name == "XTransformer":
        advice = "pass the one to prefill"
    number = 2 if name == "XTransformer" else 0
    message = f"model is a {name} with {number} TransformerWrappers in it: {advice}"
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        prefill(model, tokens(20), 7)

    if name == "XTransformer":
        context = model.encoder(tokens(9), return_embeddings=True)
        found, _ = prefill(model.decoder.eval(), tokens(20), 7, context=context)
        expected = model.decoder.net(tokens(20), context=context)
    else:
        decoder = next(module for module in model.modules() if isinstance(module, Decoder))
        found, expected = in_chunks(decoder, hidden(20), 7), decoder(hidden(20))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
