"""A sequence that is taken in chunks gives the logits and the cache of one call."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import OPTIONS, build, decoder_options, seeds, tokens

from x_transformers import AutoregressiveWrapper, Encoder, TransformerWrapper
from x_transformers.xpos import prefill

# rounding of float64 through three layers, relative to outputs of about 1
TOLERANCE = 1e-12


@given(st.data(), decoder_options(max_mem_kv=2), seeds, st.integers(1, 40), st.integers(1, 45))
def test_chunks_give_what_one_call_gives(
    data: st.DataObject, options: dict[str, Any], seed: int, seq_len: int, chunk: int
) -> None:
    cross, padded, embeddings = (data.draw(st.booleans(), name) for name in ("cross", "pad", "embeddings"))
    model = build({**options, "cross_attend": cross}, seed)
    x, given_too = tokens(seed, 2, seq_len), dict[str, Any](return_embeddings=embeddings)
    if cross:
        given_too["context"] = torch.randn(2, 5, options["dim"], dtype=torch.float64)
        given_too["context_mask"] = torch.tensor([5, 3])[:, None] > torch.arange(5)
    start = seq_len // 3 if padded else 0
    if padded:
        given_too["seq_start_pos"] = torch.tensor([0, start])

    logits, cache = prefill(AutoregressiveWrapper(model), x, chunk, **given_too)
    expected, cache_of_one = model(x, return_intermediates=True, **given_too)

    for row, first in enumerate((0, start)):  # padding attends to nothing
        torch.testing.assert_close(logits[row, first:], expected[row, first:], atol=TOLERANCE, rtol=0)
    new = dict(input_not_include_cache=True, return_intermediates=True, **given_too)
    ours, theirs = (model(tokens(seed + 1, 2, 1), cache=each, **new)[0] for each in (cache, cache_of_one))
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda is_terminal=is_terminal: is_terminal)
        prefill(build(OPTIONS, 0), tokens(0, 1, 20), 7, progress=True)
        assert ("3/3" in capsys.readouterr().err) is is_terminal
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install tqdm"):
        prefill(build(OPTIONS, 0), tokens(0, 1, 20), 7, progress=True)


ENCODER = partial(TransformerWrapper, num_tokens=32, max_seq_len=64, attn_layers=Encoder(dim=8, depth=1))
EIGHT = torch.zeros(1, 8, dtype=torch.long)
# what is passed in place of a language model, 8 tokens and chunks of 4, and what the message says
REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(tokens=EIGHT[0]), r"tokens is int64 \(8,\): pass token ids"),
    (dict(tokens=EIGHT[:, :0]), r"tokens is int64 \(1, 0\)"),
    (dict(tokens=[1, 2, 3]), "tokens is list"),
    (dict(tokens=torch.zeros(1, 8)), r"tokens is float32 \(1, 8\)"),
    (dict(tokens=torch.tensor([[3, 32]])), "tokens has ids from 3 to 32: the model has ids from 0 to 31"),
    (dict(tokens=torch.tensor([[-1, 3]])), "tokens has ids from -1 to 3: .* seq_start_pos"),
    (dict(chunk_size=0), "chunk_size is 0"),
    (dict(chunk_size=2.5), "chunk_size is 2.5"),
    (dict(cache=None), "cache: prefill takes context, "),
    (dict(mask=None, pos=None), "mask, pos: prefill takes context, "),
    (dict(model=ENCODER), "not causal"),
    (dict(model=lambda: build(OPTIONS, 0, num_memory_tokens=2)), "have no KV cache"),
    (dict(model=lambda: build({**OPTIONS, "attn_selective": True}, 0)), "have no KV cache"),
    (dict(model=lambda: build({**OPTIONS, "pre_and_post_norm": True}, 0, looped=True)), "one token at a time"),
    (dict(model=lambda: build({**OPTIONS, "shift_tokens": 1}, 0)), "shift_tokens is wrong"),
    (dict(model=lambda: build(OPTIONS, 0, average_pool_embed=True)), "one row for each token"),
]


@pytest.mark.parametrize(("passed", "message"), REFUSED)
def test_refused(passed: dict[str, Any], message: str) -> None:
    call = {"model": partial(build, OPTIONS, 0), "tokens": EIGHT, "chunk_size": 4, **passed}
    with pytest.raises(ValueError, match=message):
        prefill(call.pop("model")(), **call)
