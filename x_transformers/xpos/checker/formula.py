"""The xPos score as the paper states it, in float64: what scores are measured against, by the check and by the tests.

    score(m, n) = Re Σ_d q_d conj(k_d) ζ_d ** ((m - n) / S) exp(i (m - n) θ_d) + Σ_j q_j k_j

for a query at position m and a key at position n (Sun et al., "A Length-Extrapolatable Transformer",
arXiv:2212.10554, section 2 and algorithm 1). The first `rotary_dim` dims of a head are complex numbers in pairs
(2d, 2d + 1), the dims j after them are not rotated. θ_d = base ** (-2d / rotary_dim), ζ_d = (2d / rotary_dim + 0.4)
/ 1.4, the paper's gamma being 0.4. Only m - n enters, so there is no center and, where n <= m, nothing to overflow: the
sums are written out, O(n²), and share no code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 0.4


def decays(rotary_dim: int) -> Tensor:
    """ζ of each pair, float64, shape `(rotary_dim / 2,)`: the smallest, of the first pair, is 2 / 7."""
    return (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim + GAMMA) / (1 + GAMMA)


def angles(rotary_dim: int, base: float = 10_000.0) -> Tensor:
    """θ of each pair in radians per position, float64, shape `(rotary_dim / 2,)`."""
    return base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def rescaled_base(rotary_dim: int, factor: float) -> float:
    """The base that `rotary_base_rescale_factor` stands for (NTK-aware scaling)."""
    return 10_000.0 * factor ** (rotary_dim / (rotary_dim - 2))


def scores(
    q: Tensor,
    k: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    *,
    rotary_dim: int,
    scale_base: float = 512.0,
    base: float = 10_000.0,
    interpolation: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scores of unrotated queries (..., i, dim_head) and keys (..., j, dim_head) at positions (i,) and (j,).

    Returns two float64 tensors (..., i, j) on the CPU: the scores, before they are scaled by the size of a head, and
    the same sums over absolute values, which bound what a rounding of q or k can do to a score.
    """
    q, k = q.detach().cpu().double(), k.detach().cpu().double()
    distance = (query_pos[:, None] - key_pos).cpu().double()
    score = q[..., rotary_dim:] @ k[..., rotary_dim:].mT
    size = q[..., rotary_dim:].abs() @ k[..., rotary_dim:].abs().mT
    pairs = (torch.view_as_complex(t[..., :rotary_dim].unflatten(-1, (-1, 2)).contiguous()) for t in (q, k))
    of_pair = zip(*(t.unbind(-1) for t in pairs), decays(rotary_dim), angles(rotary_dim, base) / interpolation)
    # a pair at a time, as the terms of all may need gigabytes
    for of_q, of_k, zeta, theta in of_pair:
        term = of_q[..., :, None] * of_k[..., None, :].conj()
        term = term * torch.polar(zeta ** (distance / scale_base), distance * theta)
        score, size = score + term.real, size + term.abs()
    return score, size
