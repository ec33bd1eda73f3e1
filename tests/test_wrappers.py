"""xPos inside of what the package wraps around a decoder.

What holds there with plain rotary embeddings has to hold with xPos. Memory key values are part of most models
here, since of all that a decoder can have they are the quickest to tell when a center does not cancel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import NUM_TOKENS, build, decoder_options, randomize_, seeds, softmax, splits, tokens
from test_properties import assert_equal_to_rounding
from torch import Tensor
from torch.nn import Module

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    EntropyBasedTokenizer,
    MultiInputTransformerWrapper,
    NeoMLP,
    NextLatentWrapper,
    PrefixDecoder,
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

# a model runs once for each token here, so fewer of them
few = settings(max_examples=max(settings.default.max_examples // 4, 10))

prompt_lens = st.integers(1, 8)
nums_new = st.integers(1, 8)
depths_from_2 = st.integers(2, 3)

# a decoder with keys that have no position
MEM_KV: dict[str, Any] = dict(
    dim=16,
    depth=1,
    heads=2,
    attn_dim_head=8,
    attn_num_mem_kv=2,
    rotary_xpos=True,
    rotary_emb_dim=8,
    rotary_xpos_scale_base=8,
    verbose=False,
)


@st.composite
def mem_kv_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a decoder with keys that have no position."""
    return {**draw(decoder_options()), "attn_num_mem_kv": draw(st.integers(1, 3))}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepare(module: Module, seed: int) -> Module:
    return randomize_(module.double(), seed).eval().requires_grad_(False)


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a wrapper that builds its own decoders takes itself, and what it passes on to them."""
    own = ("dim", "depth", "heads", "attn_dim_head")
    return {k: options[k] for k in own}, {k: v for k, v in options.items() if k not in own}


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


# generation


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new, st.booleans())
@pytest.mark.regression
def test_generation_sees_the_logits_of_the_full_forward(options, seed, prompt_len, num_new, cache_kv):
    model, prompt, greedy = build(options, seed), tokens(seed, 2, prompt_len), Greedy()

    new = AutoregressiveWrapper(model).generate(prompt, num_new, filter_logits_fn=greedy, cache_kv=cache_kv)

    full = model(torch.cat((prompt, new), dim=1))
    assert_equal_to_rounding(greedy.logits, full[:, prompt_len - 1 : -1])


@few
@given(decoder_options(), seeds, st.integers(3, 8), nums_new, st.data())
def test_generation_past_max_seq_len_equals_attending_as_far_back(options, seed, window, num_new, data):
    model = build(options, seed)
    model.max_seq_len = window
    prompt_len = data.draw(st.integers(1, window))
    prompt, greedy = tokens(seed, 2, prompt_len), Greedy()

    new = AutoregressiveWrapper(model).generate(prompt, window + num_new, filter_logits_fn=greedy)

    full = build({**options, "attn_max_attend_past": window - 1}, seed)(torch.cat((prompt, new), dim=1))
    assert_equal_to_rounding(greedy.logits, full[:, prompt_len - 1 : -1])


@few
@given(decoder_options(), seeds, st.lists(prompt_lens, min_size=2, max_size=3), nums_new)
def test_a_list_of_prompts_generates_as_each_alone(options, seed, lens, num_new):
    wrapper = AutoregressiveWrapper(build(options, seed))
    prompts = [tokens(seed + row, 1, n)[0] for row, n in enumerate(lens)]
    together = Greedy()

    wrapper.generate(prompts, num_new, filter_logits_fn=together)

    for row, prompt in enumerate(prompts):
        alone = Greedy()
        wrapper.generate(prompt[None], num_new, filter_logits_fn=alone)
        assert_equal_to_rounding(together.logits[row : row + 1], alone.logits)


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new, st.integers(2, 3))
@pytest.mark.regression
def test_beam_search_is_the_same_with_and_without_a_cache(options, seed, prompt_len, num_new, beams):
    wrapper = AutoregressiveWrapper(build(options, seed))
    prompt = tokens(seed, 2, prompt_len)
    kwargs = dict(beams=beams, return_beams_and_scores=True)

    cached, cached_scores = wrapper.beam_search(prompt, num_new, cache_kv=True, **kwargs)
    uncached, uncached_scores = wrapper.beam_search(prompt, num_new, cache_kv=False, **kwargs)

    assert torch.equal(cached, uncached)
    torch.testing.assert_close(cached_scores, uncached_scores)  # added up in float32


@few
@given(mem_kv_options(), mem_kv_options(), seeds, prompt_lens, nums_new)
def test_contrastive_decoding_is_the_same_with_and_without_a_cache(options, amateur_options, seed, prompt_len, num_new):
    expert, amateur = build(options, seed), build(amateur_options, seed + 1)
    prompt = tokens(seed, 2, prompt_len)

    def generate(cache_kv: bool) -> Tensor:
        kwargs = dict(temperature=0.0, amateur_model=amateur, cache_kv=cache_kv)
        return AutoregressiveWrapper(expert).generate(prompt, 2 * num_new, **kwargs)

    assert torch.equal(generate(cache_kv=True), generate(cache_kv=False))


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new, st.integers(1, 6), st.booleans())
@pytest.mark.regression
def test_an_encoder_decoder_generates_with_the_logits_of_the_full_forward(
    options, seed, prompt_len, num_new, src_len, with_context_pos
):
    own, passed_on = split_options(options)
    model = XTransformer(
        dim=own.pop("dim"),
        enc_num_tokens=NUM_TOKENS,
        enc_max_seq_len=8,
        enc_depth=1,
        enc_verbose=False,
        dec_num_tokens=NUM_TOKENS,
        dec_max_seq_len=32,
        **{f"dec_{k}": v for k, v in {**own, **passed_on}.items()},
    )
    prepare(model, seed)
    src, prompt, greedy = tokens(seed + 1, 2, src_len), tokens(seed, 2, prompt_len), Greedy()
    kwargs = dict(context_pos=torch.arange(src_len)) if with_context_pos else {}

    new = model.generate(src, prompt, num_new, filter_logits_fn=greedy, **kwargs)

    context = model.encoder(src, return_embeddings=True)
    full = model.decoder.net(torch.cat((prompt, new), dim=1), context=context, **kwargs)
    assert_equal_to_rounding(greedy.logits, full[:, prompt_len - 1 : -1])


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new, st.booleans())
@pytest.mark.regression
def test_a_variational_model_generates_with_the_logits_of_the_full_forward(
    options, seed, prompt_len, num_new, cache_kv
):
    own, passed_on = split_options(options)
    model = GPTVAE(
        num_tokens=NUM_TOKENS, enc_depth=1, max_seq_len=32, enc_kwargs=dict(verbose=False), dec_kwargs=passed_on, **own
    )
    prepare(model, seed)
    prompt, latents, greedy = tokens(seed, 2, prompt_len), randn(seed, 2, own["dim"]), Greedy()

    new = model.generate(prompt, num_new, latents=latents, filter_logits_fn=greedy, cache_kv=cache_kv)

    prefix = model.from_latent_to_prepend_token(latents)
    full = model.decoder(torch.cat((prompt, new), dim=1), prepend_embeds=prefix)
    assert_equal_to_rounding(greedy.logits, full[:, prompt_len:-1])


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new, st.booleans())
@pytest.mark.regression
def test_a_latent_decoder_generates_with_the_logits_of_the_full_forward(options, seed, prompt_len, num_new, cache_kv):
    model = prepare(XMLatentDecoder(build(options, seed), num_latents=3), seed)
    prompt, latents, greedy = tokens(seed, 2, prompt_len), randn(seed, 2, 3, options["dim"]), Greedy()

    new = model.generate(prompt, num_new, latents=latents, filter_logits_fn=greedy, cache_kv=cache_kv)

    full = model.net(torch.cat((prompt, new), dim=1), prepend_embeds=model.latent_proj(latents))
    assert_equal_to_rounding(greedy.logits, full[:, prompt_len + 2 : -1])


def generate_with_free_transformer(options, head_depth, seed, prompt_len, num_new, use_kv_cache) -> Tensor:
    own, passed_on = split_options(options)
    model = FreeTransformer(
        num_tokens=NUM_TOKENS,
        dec_head_depth=head_depth,
        dec_tail_depth=own.pop("depth"),
        max_seq_len=32,
        latent_bits=2,
        enc_kwargs=dict(verbose=False),
        dec_kwargs=passed_on,
        **own,
    )
    prepare(model, seed)
    greedy, latents = Greedy(), randn(seed, 4)

    model.generate(
        tokens(seed, 2, prompt_len),
        prompt_len + num_new,
        latents=latents,
        filter_logits_fn=greedy,
        logit_filter_kwargs={},
        use_kv_cache=use_kv_cache,
    )
    return greedy.logits


@few
@given(decoder_options(), st.integers(0, 2), seeds, prompt_lens, nums_new)
def test_a_free_transformer_generates_the_same_with_and_without_a_cache(options, head_depth, seed, prompt_len, num_new):
    args = (options, head_depth, seed, prompt_len, num_new)
    assert_equal_to_rounding(generate_with_free_transformer(*args, True), generate_with_free_transformer(*args, False))


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new)
@pytest.mark.regression
def test_a_free_transformer_without_a_head_may_have_memory_key_values(options, seed, prompt_len, num_new):
    args = (options, 0, seed, prompt_len, num_new)
    assert_equal_to_rounding(generate_with_free_transformer(*args, True), generate_with_free_transformer(*args, False))


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new, st.booleans(), st.booleans())
@pytest.mark.regression
def test_a_belief_state_generates_the_same_with_and_without_a_cache(
    options, seed, prompt_len, num_new, backwards, with_suffix
):
    model = BeliefStateWrapper(build(options, seed), build(options, seed + 1))
    prepare(model, seed)
    suffix = tokens(seed + 1, 2, 4) if with_suffix else None

    def generate(cache_kv: bool) -> Tensor:
        torch.manual_seed(seed)  # decoding backwards draws a prefix
        greedy = Greedy()
        model.generate_with_suffix_cond(
            tokens(seed, 2, prompt_len),
            num_new,
            suffix=suffix,
            filter_logits_fn=greedy,
            filter_kwargs={},
            decode_backwards=backwards,
            cache_kv=cache_kv,
        )
        return greedy.logits

    assert_equal_to_rounding(generate(cache_kv=True), generate(cache_kv=False))


# segments


@few
@given(decoder_options(), seeds, st.integers(2, 6), st.integers(2, 20))
def test_the_loss_over_segments_equals_the_loss_of_the_whole(options, seed, segment_len, seq_len):
    model = build(options, seed, max_mem_len=1024)
    x = tokens(seed, 2, seq_len)

    whole = AutoregressiveWrapper(model)(x)
    model.max_seq_len = segment_len

    assert_equal_to_rounding(XLAutoregressiveWrapper(model)(x), whole)


@few
@given(decoder_options(), seeds, st.integers(2, 6), st.integers(1, 14))
def test_generation_after_segments_sees_the_logits_of_the_full_forward(options, seed, segment_len, prompt_len):
    # up to the end of the segment, beyond which upstream's cache leaves all but one token out of the mems
    model = build(options, seed, max_mem_len=1024)
    model.max_seq_len = segment_len
    prompt, greedy = tokens(seed, 2, prompt_len), Greedy()

    new = XLAutoregressiveWrapper(model).generate(
        prompt, segment_len - prompt_len % segment_len, filter_logits_fn=greedy
    )

    full = model(torch.cat((prompt, new), dim=1))
    assert_equal_to_rounding(greedy.logits, full[:, prompt_len - 1 : -1])


@few
@given(decoder_options(), seeds, prompt_lens, nums_new, st.integers(1, 3))
@pytest.mark.regression
def test_generation_with_episodic_memories_sees_the_logits_of_the_full_forward(
    options, seed, prompt_len, num_new, num_memories
):
    wrapper = prepare(XLAutoregressiveWrapper(build(options, seed), episodic_mem_len=num_memories), seed)
    prompt, greedy = tokens(seed, 2, prompt_len), Greedy()

    new = wrapper.generate(prompt, num_new, filter_logits_fn=greedy)

    full = wrapper.net(torch.cat((prompt, new), dim=1))
    assert_equal_to_rounding(greedy.logits, full[:, prompt_len - 1 : -1])


# recirculation passes a table of rotary embeddings of its own


@few
@given(mem_kv_options(), depths_from_2, seeds, st.integers(2, 16))
@pytest.mark.regression
def test_recirculation_that_mixes_nothing_equals_the_full_forward(options, depth, seed, seq_len):
    model = build({**options, "depth": depth}, seed)
    x = tokens(seed, 2, seq_len)

    replayed = Recirculation(model, source_layer=depth - 1, destination_layer=0, alpha=0.0, beta=1.0)(x)

    assert_equal_to_rounding(replayed, model(x))


@few
@given(mem_kv_options(), depths_from_2, seeds, prompt_lens, nums_new, st.booleans())
def test_generation_with_recirculation_sees_the_logits_of_its_full_forward(
    options, depth, seed, prompt_len, num_new, learned
):
    # the whole sequence is passed along with the cache in one, and a token at a time in the other
    model = Recirculation(
        build({**options, "depth": depth}, seed),
        source_layer=depth - 1,
        destination_layer=0,
        alpha=0.5,
        use_learned=learned,
    )
    prepare(model, seed)
    prompt, greedy = tokens(seed, 2, prompt_len), Greedy()

    new = AutoregressiveWrapper(model).generate(prompt, num_new, filter_logits_fn=greedy)

    full = model(torch.cat((prompt, new), dim=1))
    assert_equal_to_rounding(greedy.logits, full[:, prompt_len - 1 : -1])


@few
@given(decoder_options(), depths_from_2, seeds, st.integers(3, 6), nums_new)
def test_recirculation_past_max_seq_len_equals_attending_as_far_back(options, depth, seed, window, num_new):
    options = {**options, "depth": depth}
    model = Recirculation(build(options, seed), source_layer=depth - 1, destination_layer=0, alpha=0.0, beta=1.0)
    model.net.max_seq_len = window
    prompt, greedy = tokens(seed, 2, 2), Greedy()

    new = AutoregressiveWrapper(model).generate(prompt, window + num_new, filter_logits_fn=greedy)

    full = build({**options, "attn_max_attend_past": window - 1}, seed)(torch.cat((prompt, new), dim=1))
    assert_equal_to_rounding(greedy.logits, full[:, 1:-1])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.regression
def test_recirculation_in_bfloat16_is_as_accurate_as_the_full_forward(seed):
    options = dict(dim=16, depth=3, heads=2, attn_dim_head=8, rotary_emb_dim=8, attn_num_mem_kv=3, verbose=False)
    options.update(rotary_xpos=True, rotary_xpos_scale_base=4)
    model, reference = build(options, seed, torch.bfloat16), build({**options, "attn_custom_attn_fn": softmax}, seed)
    for param, rounded in zip(reference.parameters(), model.parameters()):
        param.copy_(rounded)
    x = tokens(seed, 2, 60)
    exact = reference(x)

    def rms_error(logits: Tensor) -> float:
        return (logits.double() - exact).square().mean().sqrt().item()

    replayed = Recirculation(model, source_layer=2, destination_layer=0, alpha=0.0, beta=1.0)(x)

    # the same roundings in another order
    assert rms_error(replayed) < 2 * rms_error(model(x)) < 0.2


@pytest.mark.regression
def test_recirculation_is_not_limited_by_what_is_in_the_cache():
    options = dict(dim=16, depth=3, heads=2, attn_dim_head=8, rotary_emb_dim=8, verbose=False)
    options.update(rotary_xpos=True, rotary_xpos_scale_base=4)
    model = build({**options, "attn_custom_attn_fn": softmax}, 0)
    half = build(options, 0, torch.float16)
    # in float16 44 queries in one call are the most at this scale base
    x = tokens(0, 1, 150)

    replayed = Recirculation(half, source_layer=2, destination_layer=0, alpha=0.0, beta=1.0)(x)

    # the roundings of some four layers
    full = model(x)
    assert (replayed.double() - full).abs().max() <= 64 * torch.finfo(torch.float16).eps * full.abs().max()


# loops, recycling and feedback


@few
@given(mem_kv_options(), seeds, splits(max_len=20), st.integers(2, 3))
@pytest.mark.regression
def test_recycling_keeps_prefix_consistency(options, seed, lens, steps):
    model = build(options, seed, recycling=True)
    x = tokens(seed, 2, sum(lens))

    prefix, full = model(x[:, : lens[0]], recycle_steps=steps), model(x, recycle_steps=steps)

    assert_equal_to_rounding(prefix, full[:, : lens[0]])


@few
@given(mem_kv_options(), seeds, splits(max_len=20), st.integers(2, 3))
@pytest.mark.regression
def test_a_looped_model_keeps_prefix_consistency(options, seed, lens, steps):
    model = build({**options, "pre_and_post_norm": True}, seed, looped=True)
    x = tokens(seed, 2, sum(lens))

    prefix, full = model(x[:, : lens[0]], looped_steps=steps), model(x, looped_steps=steps)

    assert_equal_to_rounding(prefix, full[:, : lens[0]])


@few
@given(mem_kv_options(), seeds, st.integers(2, 12), st.integers(2, 3))
@pytest.mark.regression
def test_a_looped_model_decodes_the_first_token_after_a_prompt_as_the_full_forward(options, seed, prompt_len, steps):
    # of the tokens after it, only the keys of the last loop are cached
    model = build({**options, "pre_and_post_norm": True}, seed, looped=True)
    x = tokens(seed, 1, prompt_len + 1)
    kwargs = dict(looped_inference=True, looped_steps=steps)

    _, cache = model(x[:, :-1], return_intermediates=True, **kwargs)

    assert_equal_to_rounding(model(x, cache=cache, **kwargs), model(x, **kwargs)[:, -1:])


def build_full_bandwidth(options: dict[str, Any], seed: int) -> FullBandwidth:
    net = build({**options, "depth_scale_residual": True}, seed, tie_embedding=True, post_emb_norm=True)
    return prepare(FullBandwidth(net, jitter_noise_delta=0.0), seed)


@few
@given(mem_kv_options(), seeds, splits(max_len=20), st.integers(2, 3))
@pytest.mark.regression
def test_feedback_passes_keep_prefix_consistency(options, seed, lens, passes):
    model = build_full_bandwidth(options, seed)
    x = tokens(seed, 2, sum(lens))
    kwargs = dict(return_loss=False, temporal_parallel_passes=passes)

    assert_equal_to_rounding(model(x[:, : lens[0]], **kwargs), model(x, **kwargs)[:, : lens[0]])


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new)
@pytest.mark.regression
def test_feedback_while_decoding_equals_feedback_without_a_cache(options, seed, prompt_len, num_new):
    model, greedy = build_full_bandwidth(options, seed), Greedy()
    net, (transition,) = model.net, model.transitions.values()
    prompt = tokens(seed, 2, prompt_len)

    new = model.generate(prompt, num_new, filter_logits_fn=greedy, process_prompt=False)

    x, latents, expected = torch.cat((prompt, new), dim=1), [], []

    def fuse(stream: Tensor) -> Tensor:
        if not latents:
            return stream
        fused = transition(torch.cat(latents, dim=1), stream[:, prompt_len:])
        return torch.cat((stream[:, :prompt_len], fused), dim=1)

    for end in range(prompt_len, x.shape[1]):
        logits, intermediates = net(x[:, :end], transform_block_inputs={1: fuse}, return_intermediates=True)
        latents.append(intermediates.last_hidden[:, -1:])
        expected.append(logits[:, -1])

    assert_equal_to_rounding(greedy.logits, torch.stack(expected, dim=1))


# other inputs than tokens


def build_continuous(options: dict[str, Any], seed: int, **kwargs: Any) -> ContinuousTransformerWrapper:
    return prepare(ContinuousTransformerWrapper(dim_in=3, dim_out=3, attn_layers=Decoder(**options), **kwargs), seed)


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new, st.sampled_from([None, 16]))
@pytest.mark.regression
def test_continuous_generation_is_the_same_with_and_without_a_cache(options, seed, prompt_len, num_new, max_seq_len):
    wrapper = ContinuousAutoregressiveWrapper(build_continuous(options, seed, max_seq_len=max_seq_len))
    prompt = randn(seed, 2, prompt_len, 3)

    cached, uncached = (wrapper.generate(prompt, num_new, cache_kv=cache_kv) for cache_kv in (True, False))

    assert_equal_to_rounding(cached, uncached)


@few
@given(decoder_options(), seeds, st.integers(1, 16), st.integers(1, 16))
def test_two_continuous_segments_equal_the_whole(options, seed, first_len, second_len):
    model = build_continuous(options, seed, max_mem_len=1024)
    x = randn(seed, 2, first_len + second_len, 3)

    first, mems = model(x[:, :first_len], return_mems=True)
    second = model(x[:, first_len:], mems=list(mems))

    assert_equal_to_rounding(torch.cat((first, second), dim=1), model(x))


@few
@given(mem_kv_options(), seeds, st.integers(2, 6), nums_new)
def test_continuous_generation_past_max_seq_len_attends_to_all_that_is_cached(options, seed, max_seq_len, num_new):
    # the wrapper crops its input to `max_seq_len`, but not the cache
    short, long = (build_continuous(options, seed, max_seq_len=n, use_abs_pos_emb=False) for n in (max_seq_len, 64))
    prompt = randn(seed, 2, max_seq_len, 3)

    new, expected = (ContinuousAutoregressiveWrapper(m).generate(prompt, num_new + 1) for m in (short, long))

    assert_equal_to_rounding(new, expected)


@few
@given(mem_kv_options(), seeds, st.lists(st.integers(1, 12), min_size=2, max_size=3))
@pytest.mark.regression
def test_padded_rows_reconstruct_as_each_alone(options, seed, lens):
    own, passed_on = split_options(options)
    model = ContinuousTransformerAutoencoder(
        enc_depth=1,
        dec_depth=own.pop("depth"),
        dim_input=3,
        max_seq_len=16,
        enc_kwargs=dict(verbose=False),
        dec_kwargs=passed_on,
        **own,
    )
    prepare(model, seed)
    x = randn(seed, len(lens), max(lens), 3)

    together = model(x, lens=torch.tensor(lens), return_unreduced_loss=True)

    for row, n in enumerate(lens):
        alone = model(x[row : row + 1, :n], lens=torch.tensor([n]), return_unreduced_loss=True)
        assert_equal_to_rounding(together[row : row + 1], alone)


@few
@given(mem_kv_options(), seeds, splits(max_len=16), st.booleans())
@pytest.mark.regression
def test_several_inputs_decode_in_chunks_as_the_full_forward(options, seed, lens, mems):
    if mems:  # starting at 0 anew in each segment, plain rotary would move the keys without a position too
        options = {**options, "attn_num_mem_kv": 0}
    attn_layers = Decoder(**options)
    names = dict(a=NUM_TOKENS, b=NUM_TOKENS)
    model = MultiInputTransformerWrapper(num_tokens=names, max_seq_len=32, max_mem_len=64, attn_layers=attn_layers)
    prepare(model, seed)
    x = dict(a=tokens(seed, 2, sum(lens)), b=tokens(seed + 1, 2, sum(lens)))
    out, state = [], None

    for chunk in zip(*(t.split(lens, dim=1) for t in x.values())):
        inputs = dict(zip(x, chunk))
        if mems:
            logits, state = model(inputs, mems=state, return_mems=True)
        else:
            logits, state = model(inputs, cache=state, cache_age=chunk[0].shape[1], return_intermediates=True)
        out.append(logits["b"])

    assert_equal_to_rounding(torch.cat(out, dim=1), model(x)["b"])


@few
@given(mem_kv_options(), seeds, prompt_lens, nums_new)
@pytest.mark.regression
def test_generation_with_numbers_sees_the_logits_of_the_full_forward(options, seed, prompt_len, num_new):
    model = XValTransformerWrapper(
        num_tokens=NUM_TOKENS, max_seq_len=32, numerical_token_id=3, attn_layers=Decoder(**options)
    )
    prepare(model, seed)
    prompt, numbers, greedy = tokens(seed, 2, prompt_len), randn(seed, 2, prompt_len), Greedy()

    out = XValAutoregressiveWrapper(model).generate(prompt, numbers, num_new, filter_logits_fn=greedy)

    x = torch.cat((prompt, out.sampled_token_ids), dim=1)
    logits, _ = model(x, torch.cat((numbers, out.sampled_numbers.nan_to_num()), dim=1))
    assert_equal_to_rounding(greedy.logits, logits[:, prompt_len - 1 : -1])


# losses and what else is read off a single forward

LOSSES = {
    "next token": lambda net, dim: AutoregressiveWrapper(net),
    "next latent": lambda net, dim: NextLatentWrapper(net, dim=dim, num_rollouts=2),
    "jepa": lambda net, dim: LatentAutoregressive(net, dim=dim, num_rollouts=2),
}


@few
@given(mem_kv_options(), seeds, st.integers(4, 12), st.integers(1, 12), st.sampled_from(list(LOSSES)))
@pytest.mark.regression
def test_padding_on_the_right_changes_no_loss(options, seed, seq_len, padding, kind):
    x = tokens(seed, 2, seq_len)
    padded = torch.cat((x, torch.full((2, padding), -100)), dim=1)
    model = prepare(LOSSES[kind](build(options, seed), options["dim"]), seed)

    def loss(seq: Tensor) -> Tensor:
        torch.manual_seed(seed)
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # of the directions that the loss of LeJEPA draws
        try:
            return model(seq)
        finally:
            torch.set_default_dtype(default_dtype)

    assert_equal_to_rounding(loss(padded), loss(x))


@few
@given(mem_kv_options(), seeds, st.integers(2, 12), st.integers(1, 12))
@pytest.mark.regression
def test_padding_on_the_right_changes_no_preference(options, seed, seq_len, padding):
    model = DPO(build(options, seed))
    randomize_(model.ref_model, seed + 1)
    preferred, unpreferred = (tokens(seed + i, 2, seq_len + padding) for i in range(2))

    def loss(total: int) -> Tensor:
        mask = (torch.arange(total) < seq_len - 1).expand(2, -1)  # of targets, so one shorter
        return model(
            preferred[:, :total],
            unpreferred[:, :total],
            prompt_mask=torch.zeros_like(mask),
            preferred_seq_mask=mask,
            unpreferred_seq_mask=mask,
        )

    assert_equal_to_rounding(loss(seq_len + padding), loss(seq_len))


@few
@given(mem_kv_options(), seeds, st.lists(st.integers(1, 16), min_size=2, max_size=3))
# a cut is a threshold, which few changes of the output cross: this one does, with seed 3
@example(MEM_KV, 3, [16, 3])
@pytest.mark.regression
def test_padded_rows_are_cut_where_each_alone_is(options, seed, lens):
    tokenizer = EntropyBasedTokenizer(build(options, seed), entropy_threshold=2.5)
    x = tokens(seed, len(lens), max(lens))

    together = tokenizer(x, lens=torch.tensor(lens), return_segmented_seq=True)

    for row, n in enumerate(lens):
        alone = tokenizer(x[row, :n], return_segmented_seq=True)
        assert [t.tolist() for t in together[row]] == [t.tolist() for t in alone]


@few
@given(mem_kv_options(), seeds, st.lists(st.integers(1, 12), min_size=2, max_size=3))
@pytest.mark.regression
def test_padded_rows_are_encoded_and_decoded_as_each_alone(options, seed, lens):
    decoder = build(options, seed)
    model = DiscoverDecoder(decoder=decoder, num_fillers=NUM_TOKENS, bos_id=0, pad_id=1, max_seq_len=16)
    x = tokens(seed, len(lens), max(lens))
    mask = torch.arange(max(lens)) < torch.tensor(lens)[:, None]

    encodings = model.encode(x, mask)
    decoded = model.decode(encodings, lengths=torch.tensor(lens))

    for row, n in enumerate(lens):
        alone = model.encode(x[row : row + 1, :n])
        assert_equal_to_rounding(encodings[row : row + 1], alone)
        assert torch.equal(decoded[row : row + 1, :n], model.decode(alone, lengths=torch.tensor([n])))


# what is not causal


@pytest.mark.parametrize(
    "build_bidirectional",
    [
        lambda **kwargs: PrefixDecoder(dim=8, depth=1, **kwargs),
        lambda **kwargs: NeoMLP(dim_in=2, dim_hidden=2, dim_out=2, dim_model=8, depth=1, encoder_kwargs=kwargs),
        lambda **kwargs: GPTVAE(num_tokens=4, dim=8, depth=1, enc_depth=1, max_seq_len=8, **kwargs),
        lambda **kwargs: FreeTransformer(
            num_tokens=4, dim=8, dec_head_depth=1, dec_tail_depth=1, max_seq_len=8, **kwargs
        ),
        lambda **kwargs: ContinuousTransformerAutoencoder(dim=8, enc_depth=1, dec_depth=1, max_seq_len=8, **kwargs),
    ],
    ids=["prefix decoder", "neo mlp", "gpt vae", "free transformer", "continuous autoencoder"],
)
def test_a_bidirectional_part_is_refused(build_bidirectional):
    with pytest.raises(AssertionError, match="bidirectional"):
        build_bidirectional(rotary_xpos=True, verbose=False)
