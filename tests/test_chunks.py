"""A sequence that is taken in chunks gives the logits and the cache of one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import build, decoder_options, seeds, tokens

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, XTransformer
from x_transformers.xpos import prefill

# rounding of float64 through three layers, relative to outputs of about 1
TOLERANCE = 1e-12
OPTIONS: dict[str, Any] = dict(
    dim=8, depth=1, heads=2, attn_dim_head=8, attn_flash=True, rotary_xpos=True, verbose=False
)


@given(st.data(), decoder_options(), seeds, st.integers(1, 40), st.integers(1, 45))
def test_chunks_give_what_one_call_gives(
    data: st.DataObject, options: dict[str, Any], seed: int, seq_len: int, chunk: int
) -> None:
    wrapped, cross, padded, mem_kv = (data.draw(st.booleans(), name) for name in ("wrapped", "cross", "pad", "mem kv"))
    model = build({**options, "cross_attend": cross, "attn_num_mem_kv": 2 * mem_kv}, seed)
    x, given_too = tokens(seed, 2, seq_len), {}
    if cross:
        given_too["context"] = torch.randn(2, 5, options["dim"], dtype=torch.float64)
        given_too["context_mask"] = torch.tensor([5, 3])[:, None] > torch.arange(5)
    start = seq_len // 3 if padded else 0
    if padded:
        given_too["seq_start_pos"] = torch.tensor([0, start])

    logits, cache = prefill(AutoregressiveWrapper(model) if wrapped else model, x, chunk, **given_too)
    expected, cache_of_one = model(x, return_intermediates=True, **given_too)

    for row, first in enumerate((0, start)):  # padding attends to nothing
        torch.testing.assert_close(logits[row, first:], expected[row, first:], atol=TOLERANCE, rtol=0)
    new = dict(input_not_include_cache=True, return_intermediates=True, **given_too)
    ours, theirs = (model(tokens(seed + 1, 2, 1), cache=each, **new)[0] for each in (cache, cache_of_one))
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_what_one_call_has_no_range_for() -> None:
    model = build({**OPTIONS, "rotary_xpos_scale_base": 4}, 0, torch.float32, use_abs_pos_emb=False)
    x = tokens(0, 1, 900)
    with pytest.raises(ValueError, match=r"x_transformers\.xpos\.prefill"):
        model(x)

    exact = build({**OPTIONS, "rotary_xpos_scale_base": 4}, 0, use_abs_pos_emb=False)(x)
    # embedding, attention, feedforward and logits, each with some roundings of float32
    tolerance = 64 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    torch.testing.assert_close(prefill(model, x, 64)[0].double(), exact, atol=tolerance, rtol=0)


def test_embeddings_instead_of_logits() -> None:
    model, x = build(OPTIONS, 0), tokens(0, 1, 20)
    embeddings, _ = prefill(model, x, 7, return_embeddings=True)
    torch.testing.assert_close(model.to_logits(embeddings), model(x), atol=TOLERANCE, rtol=0)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(OPTIONS, 0), tokens(0, 1, 20)
    prefill(model, x, 7, progress=True)
    assert not any(capsys.readouterr())  # no terminal

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    prefill(model, x, 7, progress=True)
    assert "20/20" in capsys.readouterr().err
    prefill(model, x, 7)
    assert not any(capsys.readouterr())


def language_model(layers: torch.nn.Module | None = None, **options: Any) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=32, max_seq_len=64, attn_layers=layers or Decoder(**OPTIONS), **options)


PLAIN = {**OPTIONS, "rotary_xpos": False, "rotary_pos_emb": True}
REFUSED: dict[str, tuple[Any, Any, Any, dict[str, Any], str]] = {
    "no wrapper": (lambda: Decoder(**OPTIONS), (1, 8), 4, {}, "Decoder with 0 TransformerWrappers"),
    "two": (
        lambda: XTransformer(
            dim=8,
            enc_num_tokens=32,
            enc_depth=1,
            enc_max_seq_len=64,
            dec_num_tokens=32,
            dec_depth=1,
            dec_max_seq_len=64,
        ),
        (1, 8),
        4,
        {},
        "XTransformer with 2 TransformerWrappers",
    ),
    "no batch": (language_model, (8,), 4, {}, r"tokens has the shape \(8,\)"),
    "no tokens": (language_model, (1, 0), 4, {}, r"tokens has the shape \(1, 0\)"),
    "no chunk": (language_model, (1, 8), 0, {}, "chunk is 0"),
    "mask": (language_model, (1, 8), 4, {"mask": None, "pos": None}, "mask, pos: prefill takes context, "),
    "not causal": (lambda: language_model(Encoder(**PLAIN)), (1, 8), 4, {}, "not causal"),
    "memory tokens": (lambda: language_model(num_memory_tokens=2), (1, 8), 4, {}, "have no KV cache"),
    "selective": (
        lambda: language_model(Decoder(**{**OPTIONS, "attn_flash": False}, attn_selective=True)),
        (1, 8),
        4,
        {},
        "have no KV cache",
    ),
    "looped": (
        lambda: language_model(Decoder(**OPTIONS, pre_and_post_norm=True), looped=True),
        (1, 8),
        4,
        {},
        "one token at a time",
    ),
    "shift": (lambda: language_model(Decoder(**OPTIONS, shift_tokens=1)), (1, 8), 4, {}, "shift_tokens is wrong"),
    "pooled": (lambda: language_model(average_pool_embed=True), (1, 8), 4, {}, "no logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, shape, chunk, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prefill(make(), torch.zeros(shape, dtype=torch.long), chunk, **options)
