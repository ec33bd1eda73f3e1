"""131,072 tokens through the KV cache in chunks, in half precision: whether it is finite, and how accurate.

    python benchmarks/long_prefill.py                     # and with PYTHONPATH as in accuracy.py, for upstream

One layer of one head of 64, 32 dims rotated, flash attention, unit-normal queries, keys and hidden states. What the
attention gives for sampled queries of every chunk is compared with the formula and the softmax in float64, from the
same rounded queries, keys and values; the largest error, relative to the largest output. The model without positions
beside it shows what the dtype forces without any rotation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from reference import xpos_score

from x_transformers import Attention, Decoder

DIM, ROTARY_DIM = 64, 32
ROWS_PER_CHUNK = 4


def build(dtype: torch.dtype, *, xpos: bool) -> tuple[nn.Module, Attention]:
    torch.manual_seed(0)
    decoder = Decoder(dim=DIM, depth=1, heads=1, attn_dim_head=DIM, attn_flash=True, rotary_xpos=xpos)
    attention = next(module for module in decoder.modules() if isinstance(module, Attention))
    for projection in (attention.to_q, attention.to_k, attention.to_v):
        nn.init.normal_(projection.weight, std=DIM**-0.5)
    return decoder.to(dtype).eval().requires_grad_(False), attention


def expected(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, *, xpos: bool) -> Tensor:
    """(i, d) in float64: the attention of queries (i, d) at `pos` (i,) to the keys (j, d) up to their own."""
    rows = []
    for row, at in zip(q.double(), pos.tolist()):
        keys, values = k[: at + 1].double(), v[: at + 1].double()
        if xpos:
            at_query, of_keys = torch.tensor([at]), torch.arange(at + 1)
            scores = xpos_score(row[None], keys, at_query, of_keys, rotated_dim=ROTARY_DIM)
        else:
            scores = row[None] @ keys.T
        rows.append((scores * DIM**-0.5).softmax(dim=-1) @ values)
    return torch.cat(rows)


@torch.no_grad()
def error(length: int, chunk: int, dtype: torch.dtype, *, xpos: bool) -> tuple[bool, float]:
    """Whether all outputs are finite, and the largest error of the sampled ones relative to the largest output."""
    decoder, attention = build(dtype, xpos=xpos)
    queries: list[Tensor] = []
    outputs: list[Tensor] = []
    attention.to_q.register_forward_hook(lambda _module, _args, out: queries.append(out[0]))
    attention.attend.register_forward_hook(lambda _module, _args, out: outputs.append(out[0][0, 0]))

    generator = torch.Generator().manual_seed(0)
    cache, finite, worst, largest = None, True, 0.0, 0.0
    for start in range(0, length, chunk):
        x = torch.randn(1, chunk, DIM, generator=generator).to(dtype)
        new = dict(cache=cache, cache_age=chunk, input_not_include_cache=True)
        y, cache = decoder(x, **new, return_hiddens=True)
        finite = finite and bool(y.isfinite().all())
        k, v = (t[0, 0] for t in cache.attn_intermediates[0].cached_kv)
        rows = torch.randint(0, chunk, (ROWS_PER_CHUNK,), generator=generator)
        found, right = outputs.pop()[rows], expected(queries.pop()[rows], k, v, rows + start, xpos=xpos)
        # a maximum that keeps nan, which Python's own may not
        worst = float(torch.tensor([worst, float((found - right).abs().max())]).max())
        largest = max(largest, float(right.abs().max()))
    return finite, worst / largest


def main() -> None:
    parser = argparse.ArgumentParser(description="A long text through the KV cache in chunks, in half precision.")
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--chunk", type=int, default=2_048)
    options = parser.parse_args()
    if options.chunk < 1 or options.length % options.chunk:
        parser.error(f"--length {options.length} is not a multiple of --chunk {options.chunk}")

    for dtype in (torch.float16, torch.bfloat16):
        for xpos in (False, True):
            finite, worst = error(options.length, options.chunk, dtype, xpos=xpos)
            name = f"{str(dtype)[6:]}, {'xPos' if xpos else 'no positions'}"
            print(f"{name:<25} {'finite' if finite else 'NOT FINITE':<12} {worst:.1e}", flush=True)


if __name__ == "__main__":
    main()
