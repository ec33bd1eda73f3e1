"""How far xPos is from being the same at every length with keys that have no position, and across attention.

    python benchmarks/features.py          # and with PYTHONPATH as in accuracy.py, for upstream

Whole models in float64; the largest difference, relative to the largest output.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from strategies import build, softmax, tokens

OPTIONS = dict(
    dim=64,
    depth=2,
    heads=4,
    attn_dim_head=16,
    attn_custom_attn_fn=softmax,
    rotary_emb_dim=16,
    rotary_xpos=True,
    rotary_xpos_scale_base=32,
    verbose=False,
)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def prefix(x: Tensor, options: dict, **kwargs: object) -> float:
    model = build({**OPTIONS, **options}, 0)
    return relative(model(x[:, :8], **kwargs), model(x, **kwargs)[:, :8])


def main() -> None:
    x = tokens(0, 2, 40)
    torch.manual_seed(0)
    added = [tuple(torch.randn(2, 4, 3, 16).double() for _ in range(2)) for _ in range(2)]
    context, mask = torch.randn(2, 50, 64).double(), torch.arange(50).expand(2, 50) < 30

    print(f"attn_num_mem_kv = 4, prefix               {prefix(x, dict(attn_num_mem_kv=4)):.1e}")
    print(f"the same with attn_qk_norm                {prefix(x, dict(attn_num_mem_kv=4, attn_qk_norm=True)):.1e}")
    print(f"self_attn_additional_kv, prefix           {prefix(x, {}, self_attn_additional_kv=added):.1e}")
    cross = dict(context=context[:, :30], context_pos=torch.arange(30))
    print(f"context_pos, prefix                       {prefix(x, dict(cross_attend=True), **cross):.1e}")
    model = build({**OPTIONS, "cross_attend": True}, 0)
    padded = model(x, context=context, context_pos=torch.arange(50), context_mask=mask)
    expected = model(x, **cross, context_mask=mask[:, :30])
    print(f"context_pos, context padded and masked    {relative(padded, expected):.1e}")


if __name__ == "__main__":
    main()
