"""The xPos score as the paper states it, in float64: what the scores of a model are measured against.

    score(m, n) = dim_head ** -0.5 * (Re Σ_d q_d conj(k_d) ζ_d ** ((m - n) / S) exp(i (m - n) θ_d) + Σ_j q_j k_j)

for a query at position m and a key at position n (Sun et al., "A Length-Extrapolatable Transformer",
arXiv:2212.10554, section 2 and algorithm 1). The first `rotary_dim` dims of a head are complex numbers in pairs
(2d, 2d + 1), the dims j after them are not rotated. θ_d = base ** (-2d / rotary_dim), S = `scale_base` and
ζ_d = (2d / rotary_dim + 0.4) / 1.4, the paper's gamma being 0.4. Only m - n enters, so there is no center and nothing
to overflow: the sums are written out, O(n²), and share no code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 0.4
BASE = 10_000.0
SCALE_BASE = 512.0

# Terms of the sum held at a time, 16 bytes each.
_CHUNK_TERMS = 2**22


def decays(rotary_dim: int) -> Tensor:
    """ζ of each pair, float64, shape `(rotary_dim / 2,)`: the smallest, of the first pair, is 2 / 7."""
    ratio = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return (ratio + GAMMA) / (1 + GAMMA)


def angles(rotary_dim: int, base: float = BASE) -> Tensor:
    """θ of each pair in radians per position, float64, shape `(rotary_dim / 2,)`."""
    ratio = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return base**-ratio


def scores(
    q: Tensor,
    k: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    *,
    rotary_dim: int,
    scale_base: float = SCALE_BASE,
    base: float = BASE,
) -> tuple[Tensor, Tensor]:
    """Scores of unrotated queries and keys, and the size of the terms that add up to each.

    `q` is `(heads, i, dim_head)`, `k` `(heads, j, dim_head)`, of any dtype and device; `query_pos` is `(i,)`,
    `key_pos` `(j,)`. Returns two float64 tensors `(heads, i, j)` on the CPU: the scores, in the unit of the softmax's
    argument, and the same sums over absolute values, which bound what a rounding of q or k can do to a score. Keys
    after their query (n > m) are not attended to and hold 0 in both.
    """
    dim_head = q.shape[-1]
    q, k = q.detach().cpu().double(), k.detach().cpu().double()
    query_pos, key_pos = query_pos.cpu(), key_pos.cpu()
    q_pairs, q_plain = _pairs(q[..., :rotary_dim]), q[..., rotary_dim:]
    k_pairs, k_plain = _pairs(k[..., :rotary_dim]), k[..., rotary_dim:]
    log_decay, angle = decays(rotary_dim).log(), angles(rotary_dim, base)

    heads, i, pairs = q_pairs.shape
    chunk = max(1, _CHUNK_TERMS // max(1, heads * i * pairs))
    found_scores, found_sizes = [], []
    for start in range(0, k.shape[-2], chunk):
        keys = slice(start, start + chunk)
        distance = query_pos[:, None] - key_pos[None, keys]
        attended = distance >= 0
        power = distance.clamp(min=0).double()[..., None]
        weight = torch.polar((power / scale_base * log_decay).exp(), power * angle)
        terms = q_pairs[:, :, None] * k_pairs[:, None, keys].conj() * weight
        score = terms.real.sum(dim=-1) + q_plain @ k_plain[:, keys].mT
        size = terms.abs().sum(dim=-1) + q_plain.abs() @ k_plain[:, keys].abs().mT
        found_scores.append(torch.where(attended, score, 0.0))
        found_sizes.append(torch.where(attended, size, 0.0))
    scale = dim_head**-0.5
    return torch.cat(found_scores, dim=-1) * scale, torch.cat(found_sizes, dim=-1) * scale


def _pairs(t: Tensor) -> Tensor:
    """Dims (2d, 2d + 1) as the complex number d: `(..., dim)` to `(..., dim / 2)`."""
    return torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
