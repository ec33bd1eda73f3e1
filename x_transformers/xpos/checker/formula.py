"""The xPos score as the paper states it, in float64: what the scores of a model are measured against.

    score(m, n) = dim_head ** -0.5 * (Re Σ_d q_d conj(k_d) ζ_d ** ((m - n) / S) exp(i (m - n) θ_d) + Σ_j q_j k_j)

for a query at position m and a key at position n (Sun et al., "A Length-Extrapolatable Transformer",
arXiv:2212.10554, section 2 and algorithm 1). The first `rotary_dim` dims of a head are complex numbers in pairs
(2d, 2d + 1), the dims j after them are not rotated. θ_d = 10,000 ** (-2d / rotary_dim), S = 512 and
ζ_d = (2d / rotary_dim + 0.4) / 1.4, the paper's gamma being 0.4. Only m - n enters, so there is no center and nothing
to overflow: the sums are written out, O(n²), and share no code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 0.4
BASE = 10_000.0
SCALE_BASE = 512.0


def decays(rotary_dim: int) -> Tensor:
    """ζ of each pair, float64, shape `(rotary_dim / 2,)`: the smallest, of the first pair, is 2 / 7."""
    return (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim + GAMMA) / (1 + GAMMA)


def angles(rotary_dim: int) -> Tensor:
    """θ of each pair in radians per position, float64, shape `(rotary_dim / 2,)`."""
    return BASE ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def scores(q: Tensor, k: Tensor, query_pos: Tensor, key_pos: Tensor, *, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """Scores of unrotated queries (heads, i, dim_head) and keys (heads, j, dim_head) at positions (i,) and (j,).

    Returns two float64 tensors (heads, i, j) on the CPU: the scores, in the unit of the softmax's argument, and the
    same sums over absolute values, which bound what a rounding of q or k can do to a score. Keys after their query
    (n > m) are not attended to and hold 0 in both.
    """
    q, k, query_pos, key_pos = q.detach().cpu().double(), k.detach().cpu().double(), query_pos.cpu(), key_pos.cpu()
    q_pairs, q_plain = _pairs(q[..., :rotary_dim]), q[..., rotary_dim:]
    k_pairs, k_plain = _pairs(k[..., :rotary_dim]), k[..., rotary_dim:]
    log_decay, angle = decays(rotary_dim).log() / SCALE_BASE, angles(rotary_dim)

    found_scores, found_sizes = [], []
    # a query at a time, as the terms of all may need gigabytes
    for of_query, plain, pos in zip(q_pairs.unbind(1), q_plain.unbind(1), query_pos):
        distance = pos - key_pos
        power = distance.clamp(min=0).double()[:, None]
        terms = of_query[:, None] * k_pairs.conj() * torch.polar((power * log_decay).exp(), power * angle)
        score = terms.real.sum(dim=-1) + (k_plain @ plain[..., None])[..., 0]
        size = terms.abs().sum(dim=-1) + (k_plain.abs() @ plain.abs()[..., None])[..., 0]
        found_scores.append(torch.where(distance >= 0, score, 0.0))
        found_sizes.append(torch.where(distance >= 0, size, 0.0))
    scale = q.shape[-1] ** -0.5
    return torch.stack(found_scores, dim=1) * scale, torch.stack(found_sizes, dim=1) * scale


def _pairs(t: Tensor) -> Tensor:
    """Dims (2d, 2d + 1) as the complex number d: `(..., dim)` to `(..., dim / 2)`."""
    return torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
