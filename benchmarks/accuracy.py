"""The error of xPos scores against the formula in float64, for the package that is imported.

    python benchmarks/accuracy.py                                  # the fork
    pip install --no-deps --target <dir> x-transformers==2.31.10   # upstream, beside it:
    PYTHONPATH=<dir> python benchmarks/accuracy.py

Unit-normal queries and keys, 64 rotated dimensions, scale base 512; the largest error over all scores, relative to the
largest score. What upstream's `forward` does not know is left out there, so one script measures both.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from reference import xpos_score

from x_transformers import Attention, Decoder
from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb

DIM = 64
HAS_WINDOW = "seq_len" in inspect.signature(RotaryEmbedding.forward).parameters


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(error: Tensor, expected: Tensor) -> float:
    return (error.abs().max() / expected.abs().max()).item()


def table(context: int, num_queries: int) -> tuple[Tensor, Tensor]:
    rotary = RotaryEmbedding(DIM, use_xpos=True)
    window = {"offset": context - num_queries, "seq_len": num_queries} if HAS_WINDOW else {}
    return rotary(torch.arange(context), **window)


def one_query(context: int, dtype: torch.dtype) -> float:
    q, k = randn(0, 1, DIM).to(dtype), randn(1, context, DIM).to(dtype)
    pos = torch.arange(context)
    freqs, scale = table(context, 1)
    rotated_q = apply_rotary_pos_emb(q[None, None], freqs, scale)[0, 0].double()
    rotated_k = apply_rotary_pos_emb(k[None, None], freqs, scale**-1.0)[0, 0].double()
    expected = xpos_score(q, k, pos[-1:], pos)
    return relative(rotated_q @ rotated_k.T - expected, expected)


def many_queries(seq_len: int) -> float:
    q, k = randn(0, seq_len, DIM), randn(1, seq_len, DIM)
    pos = torch.arange(seq_len)
    freqs, scale = table(seq_len, seq_len)
    rotated_q = apply_rotary_pos_emb(q[None, None], freqs, scale)[0, 0].double()
    rotated_k = apply_rotary_pos_emb(k[None, None], freqs, scale**-1.0)[0, 0].double()
    rows = torch.linspace(0, seq_len - 1, 32).long().tolist()
    expected = [xpos_score(q[i, None], k[: i + 1], pos[i, None], pos[: i + 1])[0] for i in rows]
    errors = [rotated_q[i] @ rotated_k[: i + 1].T - e for i, e in zip(rows, expected)]
    return relative(torch.cat(errors), torch.cat(expected))


def cast_model(seq_len: int, dtype: torch.dtype) -> float:
    """Scores of one attention layer of a model that was cast, from its own queries and keys."""
    torch.manual_seed(0)
    decoder = Decoder(
        dim=DIM, depth=1, heads=1, attn_dim_head=DIM, attn_flash=False, rotary_xpos=True, rotary_emb_dim=DIM
    )
    decoder = decoder.to(dtype).eval().requires_grad_(False)
    attention = next(module for module in decoder.modules() if isinstance(module, Attention))
    queries: list[Tensor] = []
    attention.to_q.register_forward_hook(lambda module, args, out: queries.append(out))
    _, intermediates = decoder(randn(0, 1, seq_len, DIM).to(dtype), return_hiddens=True)
    inter = intermediates.attn_intermediates[0]
    pos = torch.arange(seq_len)
    seen = pos[None, :] <= pos[:, None]
    expected = xpos_score(queries[0][0], inter.cached_kv[0][0, 0], pos, pos)[seen] * DIM**-0.5
    return relative(inter.qk_similarities[0, 0][seen].double() - expected, expected)


def main() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    rows = [
        (f"one query, context {context:,}, {str(dtype)[6:]}", one_query(context, dtype))
        for context in (100_000, 1_000_000)
        for dtype in dtypes
    ]
    rows += [(f"{n:,} queries in one call, float32", many_queries(n)) for n in (4_096, 65_536)]
    rows += [(f"model cast to {str(dtype)[6:]}, 512 tokens", cast_model(512, dtype)) for dtype in dtypes[1:]]

    for name, error in rows:
        print(f"{name:<45} {error:.1e}")


if __name__ == "__main__":
    main()
