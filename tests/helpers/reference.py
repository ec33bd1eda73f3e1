"""The xPos score in float64, written from the paper, independent of the code under test.

Sun et al., "A Length-Extrapolatable Transformer", arXiv:2212.10554. A query q at position m and a
key k at position n, rotated dimensions read as complex numbers from the pairs (2d, 2d + 1), score

    Re sum_d  q_d  conj(k_d)  zeta_d ** ((m - n) / S)  exp(i (m - n) theta_d)

with theta_d = base ** (-2d / D) and zeta_d = (2d / D + gamma) / (1 + gamma), gamma = 0.4. Nothing
here splits the decay between query and key, so nothing here has a center.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 0.4


def complex_pairs(t: Tensor) -> Tensor:
    """(..., D) real -> (..., D / 2) complex128."""
    return torch.view_as_complex(t.double().unflatten(-1, (-1, 2)).contiguous())


def angular_frequency(dim: int, base: float = 10_000.0, interpolation_factor: float = 1.0) -> Tensor:
    """(D / 2,) radians per position; of an odd D one more, as upstream has it."""
    return base ** -(torch.arange(0, dim, 2).double() / dim) / interpolation_factor


def decay(dim: int) -> Tensor:
    """(D / 2,) zeta, between 0 and 1."""
    return (torch.arange(0, dim, 2).double() / dim + GAMMA) / (1 + GAMMA)


def rescaled_base(dim: int, base_rescale_factor: float) -> float:
    """The base that `rotary_base_rescale_factor` stands for (NTK-aware scaling)."""
    return 10_000.0 * base_rescale_factor ** (dim / (dim - 2))


def xpos_score(
    q: Tensor,
    k: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    *,
    scale_base: float = 512,
    base: float = 10_000.0,
    interpolation_factor: float = 1.0,
    rotated_dim: int | None = None,
) -> Tensor:
    """Scores (..., i, j) in float64 of queries (..., i, d) at `q_pos` (i,) with keys (..., j, d) at `k_pos` (j,).

    The first `rotated_dim` dimensions (all by default) have xPos, the rest is a plain dot product.
    """
    dim = q.shape[-1] if rotated_dim is None else rotated_dim
    q_rot, k_rot = complex_pairs(q[..., :dim]), complex_pairs(k[..., :dim])

    distance = q_pos.double()[:, None] - k_pos.double()[None, :]
    score = q[..., dim:].double() @ k[..., dim:].double().transpose(-1, -2)

    for d, (theta, zeta) in enumerate(zip(angular_frequency(dim, base, interpolation_factor), decay(dim))):
        weight = torch.polar(zeta ** (distance / scale_base), distance * theta)
        score = score + (q_rot[..., :, None, d] * k_rot[..., None, :, d].conj() * weight).real

    return score


def xpos_score_magnitude(q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, *, scale_base: float = 512) -> Tensor:
    """(..., i, j): the sum of the sizes of all products in a score, to which its rounding errors are relative.

    A component of a rotated pair is a sum of two products, at most |x| + |y| in size.
    """
    size_q, size_k = (t.double().unflatten(-1, (-1, 2)).abs().sum(-1) for t in (q, k))
    distance = q_pos.double()[:, None] - k_pos.double()[None, :]
    magnitude = torch.zeros(*q.shape[:-1], k.shape[-2], dtype=torch.float64)

    for d, zeta in enumerate(decay(q.shape[-1])):
        magnitude = magnitude + 2 * size_q[..., :, None, d] * size_k[..., None, :, d] * zeta ** (distance / scale_base)

    return magnitude
