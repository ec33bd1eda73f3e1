"""How right xPos is, against the formula in float64 and against itself, for the package that is imported.

    python benchmarks/accuracy.py                                  # the fork
    pip install --no-deps --target <dir> x-transformers==2.31.10   # upstream, beside it, with what the tests import:
    cp -r x_transformers/xpos <dir>/x_transformers
    PYTHONPATH=<dir> python benchmarks/accuracy.py
    python benchmarks/accuracy.py --chunks 131072                  # a long text in chunks, in half precision: minutes

Errors are the largest, relative to the largest of what is right. What upstream's `forward` does not know is left out
there, so one script measures both.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))

from strategies import OPTIONS, build, softmax, tokens

from x_transformers import Attention, Decoder
from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb
from x_transformers.xpos.checker import formula

DIM, CHUNK, ROWS_PER_CHUNK = 64, 2_048, 4
HAS_WINDOW = "seq_len" in inspect.signature(RotaryEmbedding.forward).parameters
SMALL = {**OPTIONS, "dim": DIM, "heads": 4, "attn_dim_head": 16, "rotary_emb_dim": 16, "attn_custom_attn_fn": softmax}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# scores of unit-normal queries and keys, 64 rotated dims, scale base 512


def scores(context: int, num_queries: int, dtype: torch.dtype) -> float:
    """The last `num_queries` of `context` tokens, some of them where there are many."""
    q, k = randn(0, num_queries, DIM).to(dtype), randn(1, context, DIM).to(dtype)
    pos, first = torch.arange(context), context - num_queries
    window = dict(offset=first, seq_len=num_queries) if HAS_WINDOW else {}
    freqs, scale = RotaryEmbedding(DIM, use_xpos=True)(pos, **window)
    rotated_q = apply_rotary_pos_emb(q[None, None], freqs, scale)[0, 0].double()
    rotated_k = apply_rotary_pos_emb(k[None, None], freqs, scale**-1.0)[0, 0].double()
    pairs = []
    for row in torch.linspace(0, num_queries - 1, min(num_queries, 32)).long().tolist():
        seen = slice(first + row + 1)
        expected, _ = formula.scores(q[row, None], k[seen], pos[first + row, None], pos[seen], rotary_dim=DIM)
        pairs.append((rotated_q[row] @ rotated_k[seen].T, expected[0]))
    return relative(*map(torch.cat, zip(*pairs)))


def scores_of_cast_model(seq_len: int, dtype: torch.dtype) -> float:
    """Of one attention layer of a model that was cast, from its own queries and keys."""
    decoder, attention = one_layer(dtype, attn_flash=False, rotary_xpos=True, rotary_emb_dim=DIM)
    queries: list[Tensor] = []
    attention.to_q.register_forward_hook(lambda module, args, out: queries.append(out))
    _, intermediates = decoder(randn(0, 1, seq_len, DIM).to(dtype), return_hiddens=True)
    inter, pos = intermediates.attn_intermediates[0], torch.arange(seq_len)
    seen = pos[None, :] <= pos[:, None]
    expected, _ = formula.scores(queries[0][0], inter.cached_kv[0][0, 0], pos, pos, rotary_dim=DIM)
    return relative(inter.qk_similarities[0, 0][seen].double(), expected[seen] * DIM**-0.5)


def one_layer(dtype: torch.dtype, **options: object) -> tuple[nn.Module, Attention]:
    torch.manual_seed(0)
    decoder = Decoder(dim=DIM, depth=1, heads=1, attn_dim_head=DIM, verbose=False, **options)
    attention = next(module for module in decoder.modules() if isinstance(module, Attention))
    return decoder.to(dtype).eval().requires_grad_(False), attention


# whole models, in float64 where they have keys without a position or attend across


def prefix(options: dict[str, Any], **kwargs: object) -> float:
    """The first 8 of 40 tokens against the 8 alone."""
    model, x = build({**SMALL, **options}, 0), tokens(0, 2, 40)
    return relative(model(x[:, :8], **kwargs), model(x, **kwargs)[:, :8])


def errors() -> Iterator[tuple[str, float]]:
    for n in (100_000, 1_000_000):
        for dtype in DTYPES:
            yield f"one query, context {n:,}, {name(dtype)}", scores(n, 1, dtype)
    for n in (4_096, 65_536):
        yield f"{n:,} queries in one call, float32", scores(n, n, torch.float32)
    for dtype in DTYPES[1:]:
        yield f"model cast to {name(dtype)}, 512 tokens", scores_of_cast_model(512, dtype)

    x, mask = tokens(0, 2, 40), torch.arange(50).expand(2, 50) < 30
    torch.manual_seed(0)
    added = [tuple(torch.randn(2, 4, 3, 16).double() for _ in range(2)) for _ in range(2)]
    context = torch.randn(2, 50, DIM).double()
    cross = dict(context=context[:, :30], context_pos=torch.arange(30))
    yield "attn_num_mem_kv = 4, prefix", prefix(dict(attn_num_mem_kv=4))
    yield "the same with attn_qk_norm", prefix(dict(attn_num_mem_kv=4, attn_qk_norm=True))
    yield "self_attn_additional_kv, prefix", prefix({}, self_attn_additional_kv=added)
    yield "context_pos, prefix", prefix(dict(cross_attend=True), **cross)
    model = build({**SMALL, "cross_attend": True}, 0)
    padded = model(x, context=context, context_pos=torch.arange(50), context_mask=mask)
    yield "context_pos, context padded and masked", relative(padded, model(x, **cross, context_mask=mask[:, :30]))


# what flash attention gives for a long text in chunks, against the formula and the softmax in float64


def attend(q: Tensor, k: Tensor, v: Tensor, at: int, *, xpos: bool) -> Tensor:
    """(d,) in float64, of a query (d,) to the keys (j, d) up to its own."""
    q, k, v = q[None].double(), k[: at + 1].double(), v[: at + 1].double()
    pos = torch.arange(at + 1)
    found = formula.scores(q, k, pos[-1:], pos, rotary_dim=DIM // 2)[0] if xpos else q @ k.T
    return ((found * DIM**-0.5).softmax(dim=-1) @ v)[0]


@torch.no_grad()
def in_chunks(length: int, dtype: torch.dtype, *, xpos: bool) -> float:
    decoder, attention = one_layer(dtype, attn_flash=True, rotary_xpos=xpos)
    for projection in (attention.to_q, attention.to_k, attention.to_v):
        nn.init.normal_(projection.weight, std=DIM**-0.5)
    queries: list[Tensor] = []
    outputs: list[Tensor] = []
    attention.to_q.register_forward_hook(lambda module, args, out: queries.append(out[0]))
    attention.attend.register_forward_hook(lambda module, args, out: outputs.append(out[0][0, 0]))
    generator = torch.Generator().manual_seed(0)
    cache, pairs = None, []
    for start in range(0, length, CHUNK):
        x = torch.randn(1, CHUNK, DIM, generator=generator).to(dtype)
        new = dict(cache=cache, cache_age=CHUNK, input_not_include_cache=True)
        _, cache = decoder(x, **new, return_hiddens=True)
        k, v = (t[0, 0] for t in cache.attn_intermediates[0].cached_kv)
        q, out = queries.pop(), outputs.pop()
        for row in torch.randint(CHUNK, (ROWS_PER_CHUNK,), generator=generator).tolist():
            pairs.append((out[row].double(), attend(q[row], k, v, start + row, xpos=xpos)))
    return relative(*map(torch.stack, zip(*pairs)))


def errors_in_chunks(length: int) -> Iterator[tuple[str, float]]:
    for dtype in DTYPES[1:]:
        for xpos in (False, True):
            how = "xPos" if xpos else "no positions"
            yield f"{length:,} tokens, {name(dtype)}, {how}", in_chunks(length, dtype, xpos=xpos)


def main() -> None:
    parser = argparse.ArgumentParser(description="How right xPos is, in the package that is imported.")
    parser.add_argument("--chunks", type=int, metavar="N", help=f"only: N tokens through the KV cache, {CHUNK} a call")
    options = parser.parse_args()
    for what, error in errors() if options.chunks is None else errors_in_chunks(options.chunks):
        print(f"{what:<45} {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
