r"""The coupling metric, its null and the subspace overlap.

Source: Aubry, Meng, Sugolov, Papyan, "Transformer Block Coupling and its Correlation with Generalization in LLMs",
ICLR 2025, arXiv 2407.07810, section 3. The null and the overlap are not in the paper.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalizer = Literal["frobenius", "trace"]
Bases = Literal["uv", "vu"]


def normalizer_of(s1: Float[Tensor, "... K"], normalizer: Normalizer) -> Float[Tensor, "..."]:
    """Return the divisor of the misalignment: ||S1||_F or tr S1."""
    return s1.norm(dim=-1) if normalizer == "frobenius" else s1.sum(-1)


def coupling(
    projected: Float[Tensor, "... K K"],
    s1: Float[Tensor, "... K"],
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
) -> Float[Tensor, "..."]:
    r"""Return c_K(J1, J2) = 1 - || abs(U2^T J1 V2) - S1 ||_F / norm(S1).

    Args:
        projected: U2^T J1 V2 (or V2^T J1 U2 for the "vu" bases).
        s1: the top K singular values of J1.
        normalizer: ``"frobenius"`` divides by ||S1||_F, ``"trace"`` by the sum of S1.
        absolute: True as in the authors' code, False as in the paper's formula. Diagonal signs do not depend on the
            sign of a pair (u, v), so a negative diagonal means anti-alignment.

    Returns:
        At most 1. It is 1 if J1 and J2 share their bases.
    """
    aligned = projected.abs() if absolute else projected
    misalignment = (aligned - torch.diag_embed(s1)).flatten(-2).norm(dim=-1)
    return 1 - misalignment / normalizer_of(s1, normalizer)


def null_coupling(
    s1: Float[Tensor, "... K"],
    frobenius: Float[Tensor, "..."],
    d_model: int,
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
) -> Float[Tensor, "..."]:
    r"""Return c_null, the coupling expected for independent Haar-random bases.

    With f = ||J1||_F, an entry of M = U^T J1 V is nearly normal with standard deviation f / d, so
    E Q = E || abs(M) - S1 ||_F^2 = K^2 f^2 / d^2 + sum S1^2 - 2 sqrt(2 / pi) (f / d) sum S1,
    without the last term if signs are kept. Then c_null = 1 - sqrt(E Q) / norm(S1).

    Args:
        s1: the top K singular values of J1.
        frobenius: ||J1||_F, of the whole matrix.
        d_model: the width, d.
        normalizer: as in ``coupling``.
        absolute: as in ``coupling``.
    """
    k = s1.shape[-1]
    spread = frobenius / d_model
    expected = (k * spread) ** 2 + s1.square().sum(-1)
    if absolute:
        expected = expected - 2 * math.sqrt(2 / math.pi) * spread * s1.sum(-1)
    return 1 - expected.sqrt() / normalizer_of(s1, normalizer)


def null_std(
    s1: Float[Tensor, "... K"],
    frobenius: Float[Tensor, "..."],
    d_model: int,
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
) -> Float[Tensor, "..."]:
    r"""Return the standard deviation of the coupling under independent Haar-random bases, to first order.

    With Q = || abs(M) - S1 ||_F^2 = ||M||_F^2 + sum S1^2 - 2 sum_i s_i |M_ii| and c = 1 - sqrt(Q) / norm(S1), the delta
    method gives std(c) = std(Q) / (2 sqrt(E Q) norm(S1)). Let f = ||J1||_F, let spread = f / d (of an entry of M), and
    let t be the sum of s^4 over the whole spectrum, taken as flat beyond the top K.

    - Var ||M||_F^2 is exact. ||M||_F^2 = tr(S P S P') for independent projectors P, P'; with a, b of
      ``projector_moments``, E ||M||_F^4 = (a^2 + 2 b^2) f^4 + (4 a b + 2 b^2) t.
    - Signed: Var sum_i s_i M_ii = spread^2 sum S1^2, exact; its covariance with ||M||_F^2 is 0 (flip one u_i).
    - Absolute: M_ij is normal given u_i (or v_j), and its conditional variance is modelled as a gamma variable of
      relative variance 2 r, r = (t / f^4 - 1 / d) d / (d + 2), 0 for a flat spectrum. With n = 1 / (2 r) and
      e = sqrt(2 / pi) Gamma(n + 1/2) / (Gamma(n) sqrt(n)): E |M_ii| = e spread, Var |M_ii| = (1 - e^2) spread^2, and
      Cov(||M||_F^2, sum_i s_i |M_ii|) = spread^3 e (1 + 2 K r) sum S1.

    ``tests/coupling/test_metric.py`` checks it by sampling.

    Args:
        s1: the top K singular values of J1.
        frobenius: ||J1||_F, of the whole matrix.
        d_model: the width, d.
        normalizer: as in ``coupling``.
        absolute: as in ``coupling``.
    """
    s1 = s1 / frobenius[..., None]  # the coupling is scale-free: from here f = 1, and no fourth power overflows
    k, d, spread = s1.shape[-1], d_model, 1 / d_model
    squares = s1.square().sum(-1)
    fourth = s1.pow(4).sum(-1) + (1 - squares).clamp(min=0).square() / max(d - k, 1)
    a, b = projector_moments(k, d)
    variance = a**2 + 2 * b**2 - (k / d) ** 4 + (4 * a * b + 2 * b**2) * fourth
    if absolute:
        uneven = ((fourth - 1 / d) * d / (d + 2)).clamp(min=1e-6)  # r; at 0 the gamma function has only a limit
        mean = math.sqrt(2 / math.pi) * _mean_root(2 * uneven)
        variance = variance + 4 * spread**2 * (1 - mean.square()) * squares
        variance = variance - 4 * spread**3 * mean * (1 + 2 * k * uneven) * s1.sum(-1)
    else:
        variance = variance + 4 * spread**2 * squares
    norm = normalizer_of(s1, normalizer)
    misalignment = (1 - null_coupling(s1, torch.ones_like(frobenius), d, normalizer, absolute)) * norm
    return variance.clamp(min=0).sqrt() / (2 * misalignment * norm)


def projector_moments(k: int, d: int) -> tuple[float, float]:
    r"""Return the moments a, b of a projector P onto K Haar-random directions of R^d.

    E[P_ij P_kl] = a delta_ij delta_kl + b (delta_ik delta_jl + delta_il delta_jk). From E (tr P)^2 = K^2 and
    E tr P^2 = K: a = K (K (d+1) - 2) / (d (d-1) (d+2)), b = K (d-K) / (d (d-1) (d+2)).
    """
    share = k / (d * max(d - 1, 1) * (d + 2))
    return share * (k * (d + 1) - 2), share * (d - k)


def _mean_root(relative_variance: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Return E sqrt(X) of a gamma variable of mean 1: Gamma(n + 1/2) / (Gamma(n) sqrt(n)) with n = 1 / Var X."""
    n = 1 / relative_variance.double()  # large logarithms cancel below
    return (torch.lgamma(n + 0.5) - torch.lgamma(n) - 0.5 * n.log()).exp().to(relative_variance)


def subspace_overlap(inner: Float[Tensor, "... K K"]) -> Float[Tensor, "..."]:
    """Return ||B1^T B2||_F^2 / K of two orthonormal bases, from 0 to 1; K / d for independent Haar-random subspaces.

    Args:
        inner: B1^T B2.
    """
    return inner.square().sum((-2, -1)) / inner.shape[-1]


def off_diagonal_mean(matrix: Tensor) -> Tensor:
    """Return the mean over ordered pairs of different indices of the last two axes; NaN for a single index."""
    size = matrix.shape[-1]
    mask = ~torch.eye(size, dtype=torch.bool, device=matrix.device)
    return matrix[..., mask].mean(-1)
