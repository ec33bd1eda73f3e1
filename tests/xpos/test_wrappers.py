"""xPos inside of what the package wraps around a decoder.

What holds there with plain rotary embeddings has to hold with xPos. Memory key values are part of most models here:
of all that a decoder can have they are the quickest to tell when a center does not cancel.

A wrapper that only calls a decoder as another one does is left out: it reaches no line of the patches that the other
does not. One call for a whole sequence (every loss, XValTransformerWrapper, DPO, NextLatentWrapper,
LatentAutoregressive, EntropyBasedTokenizer) and mems (the loss of XLAutoregressiveWrapper) are in test_properties.py,
embeddings in front (BeliefStateWrapper, GPTVAE, DiscoverDecoder, ContinuousTransformerAutoencoder) in the latent
decoder, a cache and all tokens (FullBandwidth, the amateur of contrastive decoding) in generation, and so in the last
case (ContinuousAutoregressiveWrapper).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import NUM_TOKENS, OPTIONS, build, decoder_options, few, randomize_, seeds, softmax, tokens
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map
from ways import assert_equal_to_rounding, randn

from x_transformers import AutoregressiveWrapper, Decoder, MultiInputTransformerWrapper, XTransformer
from x_transformers.continuous import ContinuousAutoregressiveWrapper, ContinuousTransformerWrapper
from x_transformers.free_transformer import FreeTransformer
from x_transformers.recirculation import Recirculation
from x_transformers.xl_autoregressive_wrapper import XLAutoregressiveWrapper
from x_transformers.xm_latent_decoder import XMLatentDecoder

Options = dict[str, Any]
Pairs = Iterator[tuple[Tensor, Tensor]]


class Drawn(NamedTuple):
    """What a case is about: options of a decoder, lengths of what comes first and of what is new, and a flag."""

    options: Options
    seed: int
    first: int
    new: int
    flag: bool

    @property
    def prompt(self) -> Tensor:
        return tokens(self.seed, 2, self.first)

    @property
    def x(self) -> Tensor:
        return tokens(self.seed, 2, self.first + self.new)

    def model(self, **wrapper: Any) -> Any:
        return build(self.options, self.seed, **wrapper)

    def prepared(self, module: Module) -> Any:
        return randomize_(module.double(), self.seed).eval().requires_grad_(False)


CASES: list[Any] = []


def case(*, mem_kv: bool = True, regression: bool | None = None) -> Callable[[Callable[[Drawn], Pairs]], None]:
    """Computations that must agree in pairs; with keys without a position unless plain rotary has no such property."""
    marks = [pytest.mark.regression] * (mem_kv if regression is None else regression)
    return lambda pairs: CASES.append(pytest.param(pairs, mem_kv, id=pairs.__name__, marks=marks))


def greedily(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
    """What is generated if the largest logit is taken, and the logits of every step."""
    steps = []

    def keep_the_largest(logits: Tensor) -> Tensor:
        steps.append(logits.clone())
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)

    return generate(*args, filter_logits_fn=keep_the_largest, **kwargs), torch.stack(steps, dim=1)


def as_in_one_call(d: Drawn, generate: Callable[..., Any], full: Any, num_new: int = 0, **kwargs: Any) -> Pairs:
    """The logits of generation, and those of one call for all that it gives."""
    new, seen = greedily(generate, d.prompt, num_new or d.new, **kwargs)
    yield seen, full(torch.cat((d.prompt, new), dim=1))[:, -1 - seen.shape[1] : -1]


# generation


@case()
def tokens_are_generated(d: Drawn) -> Pairs:
    model = d.model()
    return as_in_one_call(d, AutoregressiveWrapper(model).generate, model, cache_kv=d.flag)


@case(mem_kv=False)
def tokens_are_generated_past_max_seq_len(d: Drawn) -> Pairs:
    window, options = d.first + 2, {**d.options, "depth": max(d.options["depth"], 2)}
    model = build(options, d.seed)
    attends_as_far_back = build({**options, "attn_max_attend_past": window - 1}, d.seed)
    model.max_seq_len = window
    if d.flag:
        model = Recirculation(model, options["depth"] - 1, 0, alpha=0.0, beta=1.0)
    return as_in_one_call(d, AutoregressiveWrapper(model).generate, attends_as_far_back, window + d.new)


@case(mem_kv=False)
def prompts_of_a_list_generate_as_each_alone(d: Drawn) -> Pairs:
    generate = AutoregressiveWrapper(d.model()).generate
    prompts = [tokens(d.seed + row, 1, n)[0] for row, n in enumerate((d.first, d.new, 4))]
    _, together = greedily(generate, prompts, 5)
    for row, prompt in enumerate(prompts):
        yield together[row : row + 1], greedily(generate, prompt[None], 5)[1]


@case()
def beam_search_with_and_without_a_cache(d: Drawn) -> Pairs:
    search = partial(AutoregressiveWrapper(d.model()).beam_search, d.prompt, d.new, beams=2 + d.flag)
    cached, scores = search(cache_kv=True, return_beams_and_scores=True)
    uncached, expected_scores = search(cache_kv=False, return_beams_and_scores=True)
    torch.testing.assert_close(scores, expected_scores)  # added up in float32
    yield cached.double(), uncached.double()


@case()
def an_encoder_and_decoder_generate(d: Drawn) -> Pairs:
    options = {f"dec_{name}": value for name, value in d.options.items() if name != "dim"}
    sizes = dict(enc_num_tokens=NUM_TOKENS, dec_num_tokens=NUM_TOKENS, enc_max_seq_len=32, dec_max_seq_len=32)
    model = d.prepared(XTransformer(dim=d.options["dim"], enc_depth=1, enc_verbose=False, **sizes, **options))
    src, pos = tokens(d.seed + 1, 2, 5), dict[str, Any](context_pos=torch.arange(5)) if d.flag else {}
    full = partial(model.decoder.net, context=model.encoder(src, return_embeddings=True), **pos)
    return as_in_one_call(d, partial(model.generate, src), full, **pos)


@case()
def a_latent_decoder_generates(d: Drawn) -> Pairs:
    model, latents = d.prepared(XMLatentDecoder(d.model(), num_latents=3)), randn(d.seed, 2, 3, d.options["dim"])
    full = partial(model.net, prepend_embeds=model.latent_proj(latents))
    return as_in_one_call(d, model.generate, full, latents=latents, cache_kv=d.flag)


@case()
def a_free_transformer_with_and_without_a_cache(d: Drawn) -> Pairs:
    own = {name: d.options[name] for name in ("dim", "heads", "attn_dim_head")}
    depths = dict(dec_head_depth=d.new % 3, dec_tail_depth=d.options["depth"])
    passed_on = {name: value for name, value in d.options.items() if name not in (*own, "depth")}
    kwargs = dict(max_seq_len=32, latent_bits=2, enc_kwargs=dict(verbose=False), dec_kwargs=passed_on)
    model = d.prepared(FreeTransformer(num_tokens=NUM_TOKENS, **own, **depths, **kwargs))
    generate = partial(model.generate, d.prompt, d.first + d.new, latents=randn(d.seed, 4), logit_filter_kwargs={})
    yield greedily(generate, use_kv_cache=True)[1], greedily(generate, use_kv_cache=False)[1]


@case(regression=False)  # both attend to as much
def continuous_generation_past_max_seq_len(d: Drawn) -> Pairs:
    # the wrapper crops its input to `max_seq_len`, but not the cache
    length, found = d.first + 1, list[Tensor]()
    for n in (length, 64):
        net = ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=n, attn_layers=Decoder(**d.options))
        wrapper = ContinuousAutoregressiveWrapper(d.prepared(net))
        found.append(wrapper.generate(randn(d.seed, 2, length, 3), d.new + 1))
    yield found[0], found[1]


@case(mem_kv=False, regression=True)
def generation_with_episodic_memories(d: Drawn) -> Pairs:
    wrapper = d.prepared(XLAutoregressiveWrapper(d.model(), episodic_mem_len=1 + d.flag))
    return as_in_one_call(d, wrapper.generate, wrapper.net)


# recirculation, which passes a table of rotary embeddings of its own, and loops


def recirculation(d: Drawn, **kwargs: Any) -> tuple[Any, Any]:
    depth = max(d.options["depth"], 2)
    model = build({**d.options, "depth": depth}, d.seed)
    return d.prepared(Recirculation(model, depth - 1, 0, **kwargs)), model


@case()
def recirculation_that_mixes_nothing(d: Drawn) -> Pairs:
    replayed, model = recirculation(d, alpha=0.0, beta=1.0)
    yield replayed(d.x), model(d.x)


@case(regression=False)  # it is compared with itself
def generation_with_recirculation(d: Drawn) -> Pairs:
    # the whole sequence is passed along with the cache in one, and a token at a time in the other
    model, _ = recirculation(d, alpha=0.5, use_learned=d.flag)
    return as_in_one_call(d, AutoregressiveWrapper(model).generate, model)


@pytest.mark.parametrize(("dtype", "num_mem_kv"), [(torch.bfloat16, 3), (torch.float16, 0)])
@pytest.mark.regression
def test_recirculation_in_half_precision_is_right_and_not_limited_by_what_is_in_the_cache(dtype, num_mem_kv):
    options = {**OPTIONS, "depth": 3, "attn_num_mem_kv": num_mem_kv, "rotary_xpos_scale_base": 4}
    half, model = build(options, 0, dtype), build({**options, "attn_custom_attn_fn": softmax}, 0)
    for param, rounded in zip(model.parameters(), half.parameters()):
        param.copy_(rounded)
    # in float16 44 queries in one call are the most at this scale base
    x = tokens(0, 1, 150)
    replayed, full = Recirculation(half, 2, 0, alpha=0.0, beta=1.0)(x), model(x)

    # the roundings of some four layers
    assert (replayed.double() - full).abs().max() <= 16 * torch.finfo(dtype).eps * full.abs().max()


@case()
def a_looped_model_decodes_the_first_token_after_a_prompt(d: Drawn) -> Pairs:
    # of the tokens after it, only the keys of the last loop are cached
    model = build({**d.options, "pre_and_post_norm": True}, d.seed, looped=True)
    x, kwargs = tokens(d.seed, 1, d.first + 2), dict(looped_inference=True, looped_steps=2 + d.flag)
    _, cache = model(x[:, :-1], return_intermediates=True, **kwargs)
    yield model(x, cache=cache, **kwargs), model(x, **kwargs)[:, -1:]


# a cache, with the whole prefix or in chunks


@case()
def queries_follow_all_that_is_cached(d: Drawn) -> Pairs:
    length, dim = d.first + d.new, d.options["dim"]
    context: Options = dict(context=randn(d.seed, 2, 5, dim), context_pos=torch.arange(5)) if d.flag else {}
    layers, x = Decoder(**d.options, cross_attend=d.flag), randn(d.seed, 2, length, dim)
    ids = dict(num_tokens=dict(a=NUM_TOKENS, b=NUM_TOKENS), attn_layers=layers, max_seq_len=32)
    of_wrapper, of_layers = dict(return_embeddings=True, return_intermediates=True), dict(return_hiddens=True)
    models: list[tuple[Module, Options, Any]] = [
        (MultiInputTransformerWrapper(**ids), of_wrapper, dict(a=d.x, b=d.x.flip(0))),
        (ContinuousTransformerWrapper(attn_layers=layers, max_seq_len=32), of_wrapper, x),
        (layers, of_layers, x),
    ]
    if d.flag:
        models.append((Decoder(**d.options, cross_attend=True, only_cross=True), of_layers, x))

    for module, returned, inputs in models:
        model = partial(d.prepared(module), **returned, **context)
        expected, _ = model(inputs)
        # as people write the loop: plain rotary counts what is cached twice, in self-attention as in cross-attention
        outs, cache = [], None
        for n in range(length):
            out, cache = model(part_of(inputs, 0, n + 1), cache=cache)
            outs.append(out[:, -1:])
        yield torch.cat(outs, dim=1), expected
        # as the error for too many queries says
        out, cache = model(part_of(inputs, 0, d.first))
        new_alone = dict(cache=cache, input_not_include_cache=True, cache_age=d.new)
        yield torch.cat((out, model(part_of(inputs, d.first, length), **new_alone)[0]), dim=1), expected


def part_of(inputs: Any, start: int, stop: int) -> Any:
    return tree_map(lambda t: t[:, start:stop], inputs)


@pytest.mark.parametrize(("pairs", "mem_kv"), CASES)
@few
@given(st.data(), seeds, st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_two_computations_with_a_wrapper_agree(pairs, mem_kv, data, seed, first, new, flag):
    options = data.draw(decoder_options())
    if mem_kv:
        options["attn_num_mem_kv"] = data.draw(st.integers(1, 3))

    for actual, expected in pairs(Drawn(options, seed, first, new, flag)):
        assert_equal_to_rounding(actual, expected)
