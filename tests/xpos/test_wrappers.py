"""xPos inside of what the package wraps around a decoder.

What holds there with plain rotary embeddings has to hold with xPos. Memory key values are part of most models here:
of all that a decoder can have they are the quickest to tell when a center does not cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import NUM_TOKENS, build, decoder_options, few, randomize_, seeds, softmax, tokens
from torch import Tensor
from torch.nn import Module
from ways import assert_equal_to_rounding, randn

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    EntropyBasedTokenizer,
    MultiInputTransformerWrapper,
    NextLatentWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.continuous_autoencoder import ContinuousTransformerAutoencoder
from x_transformers.discover_wrapper import DiscoverDecoder
from x_transformers.free_transformer import FreeTransformer
from x_transformers.full_bandwidth import FullBandwidth
from x_transformers.gpt_lejepa import LatentAutoregressive
from x_transformers.gpt_vae import GPTVAE
from x_transformers.recirculation import Recirculation
from x_transformers.xm_latent_decoder import XMLatentDecoder

Options = dict[str, Any]


@st.composite
def mem_kv_options(draw: st.DrawFn) -> Options:
    """Options of a decoder with keys that have no position."""
    return {**draw(decoder_options()), "attn_num_mem_kv": draw(st.integers(1, 3))}


class Drawn(NamedTuple):
    """What a case is about: two lengths, of what comes first and what is new, and a flag."""

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

    def split_options(self) -> tuple[Options, Options]:
        """What a wrapper that builds its own decoders takes itself, and what it passes on to them."""
        own = ("dim", "depth", "heads", "attn_dim_head")
        return {k: self.options[k] for k in own}, {k: v for k, v in self.options.items() if k not in own}


class Greedy:
    """A filter of logits that leaves the largest only, and keeps what it was given."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, logits: Tensor) -> Tensor:
        self.steps.append(logits.clone())
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)

    @property
    def logits(self) -> Tensor:
        return torch.stack(self.steps, dim=1)


Pairs = Iterator[tuple[Tensor, Tensor]]
CASES: dict[str, tuple[Callable[[Drawn], Pairs], bool, bool]] = {}


def case(*, mem_kv: bool = True, regression: bool | None = None) -> Callable[[Callable[[Drawn], Pairs]], None]:
    """Computations that must agree in pairs; with keys without a position unless plain rotary has no such property."""

    def register(function: Callable[[Drawn], Pairs]) -> None:
        CASES[function.__name__] = (function, mem_kv, mem_kv if regression is None else regression)

    return register


def generation(d: Drawn, generate: Callable[..., Any], full: Any, num_new: int = 0, **kwargs: Any) -> Pairs:
    """The logits that greedy generation sees, and those of one call for all of it."""
    greedy = Greedy()
    new = generate(d.prompt, num_new or d.new, filter_logits_fn=greedy, **kwargs)
    seen = greedy.logits
    yield seen, full(torch.cat((d.prompt, new), dim=1))[:, -1 - seen.shape[1] : -1]


def with_and_without_a_cache(d: Drawn, generate: Callable[[bool, Greedy], Any]) -> Pairs:
    """The logits that greedy generation sees."""
    seen = []
    for cache_kv in (True, False):
        torch.manual_seed(d.seed)
        greedy = Greedy()
        generate(cache_kv, greedy)
        seen.append(greedy.logits)
    yield seen[0], seen[1]


# generation


@case()
def tokens_are_generated(d: Drawn) -> Pairs:
    model = d.model()
    return generation(d, AutoregressiveWrapper(model).generate, model, cache_kv=d.flag)


@case(mem_kv=False)
def tokens_are_generated_past_max_seq_len(d: Drawn) -> Pairs:
    window, options = d.first + 2, {**d.options, "depth": max(d.options["depth"], 2)}
    model = build(options, d.seed)
    attends_as_far_back = build({**options, "attn_max_attend_past": window - 1}, d.seed)
    model.max_seq_len = window
    if d.flag:
        model = Recirculation(model, options["depth"] - 1, 0, alpha=0.0, beta=1.0)
    return generation(d, AutoregressiveWrapper(model).generate, attends_as_far_back, window + d.new)


@case(mem_kv=False)
def prompts_of_a_list_generate_as_each_alone(d: Drawn) -> Pairs:
    wrapper, together = AutoregressiveWrapper(d.model()), Greedy()
    prompts = [tokens(d.seed + row, 1, n)[0] for row, n in enumerate((d.first, d.new, 4))]
    wrapper.generate(prompts, 5, filter_logits_fn=together)
    for row, prompt in enumerate(prompts):
        alone = Greedy()
        wrapper.generate(prompt[None], 5, filter_logits_fn=alone)
        yield together.logits[row : row + 1], alone.logits


@case()
def beam_search_with_and_without_a_cache(d: Drawn) -> Pairs:
    wrapper, kwargs = AutoregressiveWrapper(d.model()), dict(beams=2 + d.flag, return_beams_and_scores=True)
    found = (wrapper.beam_search(d.prompt, d.new, cache_kv=cache_kv, **kwargs) for cache_kv in (True, False))
    (cached, cached_scores), (uncached, uncached_scores) = found
    torch.testing.assert_close(cached_scores, uncached_scores)  # added up in float32
    yield cached.double(), uncached.double()


@case(regression=False)  # only the choice is seen
def contrastive_decoding_with_and_without_a_cache(d: Drawn) -> Pairs:
    kwargs = dict(temperature=0.0, amateur_model=build({**d.options, "depth": 1}, d.seed + 1))
    wrapper = AutoregressiveWrapper(d.model())
    cached, uncached = (wrapper.generate(d.prompt, 2 * d.new, cache_kv=kv, **kwargs) for kv in (True, False))
    yield cached.double(), uncached.double()


@case()
def an_encoder_and_decoder_generate(d: Drawn) -> Pairs:
    decoder = {f"dec_{k}": v for k, v in d.options.items() if k != "dim"}
    decoder.update(dec_num_tokens=NUM_TOKENS, dec_max_seq_len=32)
    encoder = dict(enc_num_tokens=NUM_TOKENS, enc_max_seq_len=8, enc_depth=1, enc_verbose=False)
    model = d.prepared(XTransformer(dim=d.options["dim"], **encoder, **decoder))
    src = tokens(d.seed + 1, 2, 5)
    kwargs: dict[str, Any] = dict(context_pos=torch.arange(5)) if d.flag else {}
    full = partial(model.decoder.net, context=model.encoder(src, return_embeddings=True), **kwargs)
    return generation(d, partial(model.generate, src), full, **kwargs)


@case()
def a_variational_model_generates(d: Drawn) -> Pairs:
    own, passed_on = d.split_options()
    encoder = dict(enc_depth=1, enc_kwargs=dict(verbose=False))
    model = d.prepared(GPTVAE(num_tokens=NUM_TOKENS, max_seq_len=32, dec_kwargs=passed_on, **encoder, **own))
    latents = randn(d.seed, 2, own["dim"])
    full = partial(model.decoder, prepend_embeds=model.from_latent_to_prepend_token(latents))
    return generation(d, model.generate, full, latents=latents, cache_kv=d.flag)


@case()
def a_latent_decoder_generates(d: Drawn) -> Pairs:
    model, latents = d.prepared(XMLatentDecoder(d.model(), num_latents=3)), randn(d.seed, 2, 3, d.options["dim"])
    full = partial(model.net, prepend_embeds=model.latent_proj(latents))
    return generation(d, model.generate, full, latents=latents, cache_kv=d.flag)


def free_transformer(d: Drawn, head_depth: int) -> Pairs:
    own, passed_on = d.split_options()
    depths = dict(dec_head_depth=head_depth, dec_tail_depth=own.pop("depth"))
    kwargs = dict(max_seq_len=32, latent_bits=2, enc_kwargs=dict(verbose=False), dec_kwargs=passed_on)
    model = d.prepared(FreeTransformer(num_tokens=NUM_TOKENS, **depths, **kwargs, **own))
    generate = partial(model.generate, d.prompt, d.first + d.new, latents=randn(d.seed, 4), logit_filter_kwargs={})
    return with_and_without_a_cache(d, lambda kv, greedy: generate(use_kv_cache=kv, filter_logits_fn=greedy))


@case(mem_kv=False)
def a_free_transformer_with_and_without_a_cache(d: Drawn) -> Pairs:
    return free_transformer(d, 1 + d.flag)


@case()
def a_free_transformer_without_a_head_with_and_without_a_cache(d: Drawn) -> Pairs:
    return free_transformer(d, 0)


@case()
def a_belief_state_with_and_without_a_cache(d: Drawn) -> Pairs:
    model = d.prepared(BeliefStateWrapper(d.model(), build(d.options, d.seed + 1)))
    suffix = tokens(d.seed + 1, 2, 4) if d.new % 2 else None
    generate = partial(model.generate_with_suffix_cond, d.prompt, d.new, suffix=suffix, decode_backwards=d.flag)
    return with_and_without_a_cache(
        d, lambda kv, greedy: generate(cache_kv=kv, filter_logits_fn=greedy, filter_kwargs={})
    )


@case()
def numbers_are_generated(d: Drawn) -> Pairs:
    layers = Decoder(**d.options)
    net = XValTransformerWrapper(num_tokens=NUM_TOKENS, max_seq_len=32, numerical_token_id=3, attn_layers=layers)
    model, numbers, greedy = d.prepared(net), randn(d.seed, 2, d.first), Greedy()
    out = XValAutoregressiveWrapper(model).generate(d.prompt, numbers, d.new, filter_logits_fn=greedy)
    x = torch.cat((d.prompt, out.sampled_token_ids), dim=1)
    logits, _ = model(x, torch.cat((numbers, out.sampled_numbers.nan_to_num()), dim=1))
    yield greedy.logits, logits[:, d.first - 1 : -1]


# segments


@case(mem_kv=False)
def the_loss_over_segments(d: Drawn) -> Pairs:
    model, x = d.model(max_mem_len=1024), tokens(d.seed, 2, 2 * d.first + d.new)
    whole = AutoregressiveWrapper(model)(x)
    model.max_seq_len = d.first + 1
    yield XLAutoregressiveWrapper(model)(x), whole


@case(mem_kv=False, regression=True)
def generation_with_episodic_memories(d: Drawn) -> Pairs:
    wrapper = d.prepared(XLAutoregressiveWrapper(d.model(), episodic_mem_len=1 + d.flag))
    return generation(d, wrapper.generate, wrapper.net)


# recirculation, which passes a table of rotary embeddings of its own; loops and feedback


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
    return generation(d, AutoregressiveWrapper(model).generate, model)


@case()
def a_looped_model_decodes_the_first_token_after_a_prompt(d: Drawn) -> Pairs:
    # of the tokens after it, only the keys of the last loop are cached
    model = build({**d.options, "pre_and_post_norm": True}, d.seed, looped=True)
    x, kwargs = tokens(d.seed, 1, d.first + 2), dict(looped_inference=True, looped_steps=2 + d.flag)
    _, cache = model(x[:, :-1], return_intermediates=True, **kwargs)
    yield model(x, cache=cache, **kwargs), model(x, **kwargs)[:, -1:]


def full_bandwidth(d: Drawn) -> Any:
    net = build({**d.options, "depth_scale_residual": True}, d.seed, tie_embedding=True, post_emb_norm=True)
    return d.prepared(FullBandwidth(net, jitter_noise_delta=0.0))


@case()
def the_prefix_of_feedback_passes(d: Drawn) -> Pairs:
    model, kwargs = full_bandwidth(d), dict(return_loss=False, temporal_parallel_passes=2 + d.flag)
    yield model(d.x[:, : d.first], **kwargs), model(d.x, **kwargs)[:, : d.first]


@case()
def feedback_while_decoding_with_and_without_a_cache(d: Drawn) -> Pairs:
    model, greedy = full_bandwidth(d), Greedy()
    net, (transition,) = model.net, model.transitions.values()
    new = model.generate(d.prompt, d.new, filter_logits_fn=greedy, process_prompt=False)
    x, latents, expected = torch.cat((d.prompt, new), dim=1), list[Tensor](), list[Tensor]()

    def fuse(stream: Tensor) -> Tensor:
        if not latents:
            return stream
        fused = transition(torch.cat(latents, dim=1), stream[:, d.first :])
        return torch.cat((stream[:, : d.first], fused), dim=1)

    for end in range(d.first, x.shape[1]):
        logits, intermediates = net(x[:, :end], transform_block_inputs={1: fuse}, return_intermediates=True)
        latents.append(intermediates.last_hidden[:, -1:])
        expected.append(logits[:, -1])
    yield greedy.logits, torch.stack(expected, dim=1)


# other inputs than tokens


def continuous(d: Drawn, **kwargs: Any) -> Any:
    return d.prepared(ContinuousTransformerWrapper(dim_in=3, dim_out=3, attn_layers=Decoder(**d.options), **kwargs))


@case()
def continuous_generation_with_and_without_a_cache(d: Drawn) -> Pairs:
    wrapper = ContinuousAutoregressiveWrapper(continuous(d, max_seq_len=16 if d.flag else None))
    cached, uncached = (wrapper.generate(randn(d.seed, 2, d.first, 3), d.new, cache_kv=kv) for kv in (True, False))
    yield cached, uncached


@case(mem_kv=False)
def continuous_segments(d: Drawn) -> Pairs:
    model, x = continuous(d, max_mem_len=1024), randn(d.seed, 2, d.first + d.new, 3)
    first, mems = model(x[:, : d.first], return_mems=True)
    yield torch.cat((first, model(x[:, d.first :], mems=list(mems))), dim=1), model(x)


@case(regression=False)  # both attend to as much
def continuous_generation_past_max_seq_len(d: Drawn) -> Pairs:
    # the wrapper crops its input to `max_seq_len`, but not the cache
    length = d.first + 1
    models = (continuous(d, max_seq_len=n, use_abs_pos_emb=False) for n in (length, 64))
    prompt = randn(d.seed, 2, length, 3)
    short, long = (ContinuousAutoregressiveWrapper(model).generate(prompt, d.new + 1) for model in models)
    yield short, long


@case(mem_kv=False)
def several_inputs_in_two_calls(d: Drawn) -> Pairs:
    inputs = dict(num_tokens=dict(a=NUM_TOKENS, b=NUM_TOKENS), max_seq_len=32, max_mem_len=64)
    model = d.prepared(MultiInputTransformerWrapper(attn_layers=Decoder(**d.options), **inputs))
    x = dict(a=d.x, b=d.x.flip(0))
    first, rest = ({name: t[:, part] for name, t in x.items()} for part in (slice(d.first), slice(d.first, None)))
    logits, state = model(first, **{"return_mems" if d.flag else "return_intermediates": True})
    after = model(rest, **(dict(mems=state) if d.flag else dict(cache=state, cache_age=d.new)))
    yield torch.cat((logits["b"], after["b"]), dim=1), model(x)["b"]


@case()
def the_whole_prefix_with_the_cache(d: Drawn) -> Pairs:
    # as people write the loop: plain rotary counts what is cached twice then, in self attention as in cross attention
    context = dict(context=randn(d.seed, 2, 5, d.options["dim"]), context_pos=torch.arange(5)) if d.flag else {}
    layers = Decoder(**d.options, cross_attend=d.flag)
    alone = d.prepared(Decoder(**d.options, cross_attend=True, only_cross=True)) if d.flag else None
    inputs = dict(num_tokens=dict(a=NUM_TOKENS, b=NUM_TOKENS), max_seq_len=32)
    x = randn(d.seed, 2, d.first + d.new, d.options["dim"])
    models: list[tuple[Any, Any]] = [(d.prepared(layers), x), *([(alone, x)] if alone is not None else [])]
    wrapper = d.prepared(MultiInputTransformerWrapper(attn_layers=layers, **inputs))

    for model, inp in [*models, (wrapper, dict(a=d.x, b=d.x.flip(0)))]:
        is_layers, outs, cache = isinstance(inp, Tensor), [], None
        for n in range(1, d.first + d.new + 1):
            part = inp[:, :n] if is_layers else {name: t[:, :n] for name, t in inp.items()}
            returned = {"return_hiddens" if is_layers else "return_intermediates": True}
            out, cache = model(part, cache=cache, **returned, **context)
            outs.append((out if is_layers else out["b"])[:, -1:])
        full = model(inp, **context)
        yield torch.cat(outs, dim=1), full if is_layers else full["b"]


# padding


@case()
def padded_rows_reconstruct_as_each_alone(d: Drawn) -> Pairs:
    own, passed_on = d.split_options()
    encoder = dict(verbose=False, attn_custom_attn_fn=softmax)  # the default softmax works in float32
    depths = dict(enc_depth=1, dec_depth=own.pop("depth"), enc_kwargs=encoder, dec_kwargs=passed_on)
    model = d.prepared(ContinuousTransformerAutoencoder(dim_input=3, max_seq_len=32, **depths, **own))
    lens = (d.first, d.first + d.new)
    x = randn(d.seed, 2, lens[1], 3)
    together = model(x, lens=torch.tensor(lens), return_unreduced_loss=True)
    for row, n in enumerate(lens):
        alone = model(x[row : row + 1, :n], lens=torch.tensor([n]), return_unreduced_loss=True)
        yield together[row : row + 1], alone


@case()
def padded_rows_are_encoded_and_decoded_as_each_alone(d: Drawn) -> Pairs:
    model = DiscoverDecoder(decoder=d.model(), num_fillers=NUM_TOKENS, bos_id=0, pad_id=1, max_seq_len=16)
    lens = torch.tensor((d.first, d.first + d.new))
    encodings = model.encode(d.x, torch.arange(d.first + d.new) < lens[:, None])
    decoded = model.decode(encodings, lengths=lens)
    for row, n in enumerate(lens.tolist()):
        alone = model.encode(d.x[row : row + 1, :n])
        yield encodings[row : row + 1], alone
        yield decoded[row : row + 1, :n].double(), model.decode(alone, lengths=torch.tensor([n])).double()


@case(regression=False)  # a cut is a threshold, which few changes of the output cross
def padded_rows_are_cut_where_each_alone_is(d: Drawn) -> Pairs:
    tokenizer = EntropyBasedTokenizer(d.model(), entropy_threshold=2.5)
    lens = (d.first, d.first + d.new)
    together = tokenizer(d.x, lens=torch.tensor(lens), return_segmented_seq=True)
    for row, n in enumerate(lens):
        alone = tokenizer(d.x[row, :n], return_segmented_seq=True)
        assert [t.tolist() for t in together[row]] == [t.tolist() for t in alone]
        yield torch.cat(together[row]).double(), torch.cat(alone).double()


def loss_of(model: Any, d: Drawn) -> Pairs:
    model, x = d.prepared(model), tokens(d.seed, 2, d.first + 3)
    losses = []
    default_dtype = torch.get_default_dtype()
    for seq in (torch.cat((x, torch.full((2, d.new), -100)), dim=1), x):
        torch.manual_seed(d.seed)
        torch.set_default_dtype(torch.float64)  # of the directions that the loss of LeJEPA draws
        try:
            losses.append(model(seq))
        finally:
            torch.set_default_dtype(default_dtype)
    yield losses[0], losses[1]


@case()
def the_loss_of_padded_tokens(d: Drawn) -> Pairs:
    return loss_of(AutoregressiveWrapper(d.model()), d)


@case()
def the_loss_of_padded_latents(d: Drawn) -> Pairs:
    wrapper = NextLatentWrapper if d.flag else LatentAutoregressive
    return loss_of(wrapper(d.model(), dim=d.options["dim"], num_rollouts=2), d)


@case()
def the_preference_between_padded_sequences(d: Drawn) -> Pairs:
    model, seq_len = DPO(d.model()), d.first + 1
    randomize_(model.ref_model, d.seed + 1)
    sequences = [tokens(d.seed + i, 2, seq_len + d.new) for i in range(2)]

    def loss(total: int) -> Tensor:
        mask = (torch.arange(total) < seq_len - 1).expand(2, -1)  # of targets, so one shorter
        masks = dict(prompt_mask=torch.zeros_like(mask), preferred_seq_mask=mask, unpreferred_seq_mask=mask)
        return model(*(t[:, :total] for t in sequences), **masks)

    yield loss(seq_len + d.new), loss(seq_len)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.regression] * fails) for name, (_, _, fails) in CASES.items()]
)
@few
@given(st.data(), seeds, st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_two_computations_with_a_wrapper_agree(name, data, seed, first, new, flag):
    pairs, mem_kv, _ = CASES[name]
    options = data.draw(mem_kv_options() if mem_kv else decoder_options())

    for actual, expected in pairs(Drawn(options, seed, first, new, flag)):
        assert_equal_to_rounding(actual, expected)


# recirculation in low precision

XPOS_4: Options = dict(dim=16, depth=3, heads=2, attn_dim_head=8, rotary_emb_dim=8, verbose=False)
XPOS_4.update(rotary_xpos=True, rotary_xpos_scale_base=4)


@pytest.mark.parametrize(("dtype", "num_mem_kv"), [(torch.bfloat16, 3), (torch.float16, 0)])
@pytest.mark.regression
def test_recirculation_in_half_precision_is_right_and_not_limited_by_what_is_in_the_cache(dtype, num_mem_kv):
    options = {**XPOS_4, "attn_num_mem_kv": num_mem_kv}
    half, model = build(options, 0, dtype), build({**options, "attn_custom_attn_fn": softmax}, 0)
    for param, rounded in zip(model.parameters(), half.parameters()):
        param.copy_(rounded)
    # in float16 44 queries in one call are the most at this scale base
    x = tokens(0, 1, 150)

    replayed = Recirculation(half, 2, 0, alpha=0.0, beta=1.0)(x)

    # the roundings of some four layers
    full = model(x)
    assert (replayed.double() - full).abs().max() <= 16 * torch.finfo(dtype).eps * full.abs().max()


# what
