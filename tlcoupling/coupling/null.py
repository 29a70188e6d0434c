r"""The coupling that independent Haar-random bases give: its mean and its standard deviation, in closed form.

Let D be the singular values of J1, f = ||J1||_F, and u, v Haar-random unit vectors. With M = U2^T J1 V2 and
Q = || abs(M) - S1 ||_F^2 = ||M||_F^2 + sum S1^2 - 2 sum_i s_i |M_ii|, the coupling is c = 1 - sqrt(Q) / norm(S1). The
mean and the variance of Q follow from moments of ||M||_F^2 and |M_ii|. Then, by the delta method,

    E c = 1 - sqrt(E Q) (1 - Var Q / (8 (E Q)^2)) / norm(S1),      std(c) = std(Q) / (2 sqrt(E Q) norm(S1)).

None of this is in the paper. ``benchmarks/statistics.py`` holds it against draws of bases.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling.metric import Normalizer, normalizer_of

_NODES = 33  # of each half of the quadrature, one a unit of log t; its error is below 1e-6


def null_coupling(
    s1: Float[Tensor, "... K"],
    frobenius: Float[Tensor, "..."],
    d_model: int,
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
) -> Float[Tensor, "..."]:
    r"""Return c_null, the coupling expected for independent Haar-random bases, to second order (see the module).

    Args:
        s1: the top K singular values of J1.
        frobenius: ||J1||_F, of the whole matrix.
        d_model: the width, d.
        normalizer: as in ``coupling``.
        absolute: as in ``coupling``.
    """
    s = s1.double() / frobenius.double()[..., None]  # the coupling is scale-free: from here f = 1
    mean, variance = _moments(s, d_model, absolute)
    root = mean.sqrt() * (1 - variance / (8 * mean.square()))
    return (1 - root / normalizer_of(s, normalizer)).to(s1)


def null_std(
    s1: Float[Tensor, "... K"],
    frobenius: Float[Tensor, "..."],
    d_model: int,
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
) -> Float[Tensor, "..."]:
    r"""Return the standard deviation of the coupling under independent Haar-random bases, to first order.

    Args:
        s1: the top K singular values of J1.
        frobenius: ||J1||_F, of the whole matrix.
        d_model: the width, d.
        normalizer: as in ``coupling``.
        absolute: as in ``coupling``.
    """
    s = s1.double() / frobenius.double()[..., None]
    mean, variance = _moments(s, d_model, absolute)
    return (variance.sqrt() / (2 * mean.sqrt() * normalizer_of(s, normalizer))).to(s1)


def _moments(s: Float[Tensor, "... K"], d: int, absolute: bool) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    r"""Return the mean and the variance of Q for f = 1; beyond the top K, the spectrum is taken as flat.

    - E ||M||_F^2 = K^2 / d^2 and its variance are exact: ||M||_F^2 = tr(D P D P') for independent projectors, so
      E ||M||_F^4 = a^2 + 2 b^2 + (4 a b + 2 b^2) sum D^4 with a, b of ``projector_moments``.
    - Signed: E M_ii = 0, Var sum_i s_i M_ii = sum S1^2 / d^2, and its covariance with ||M||_F^2 is 0 (flip one u_i).
    - Absolute: u^T D v is distributed as ||D u|| v_1, so that E |M_11| = m = E ||D u|| E |v_1|. Entries beside it, in
      its row or column, have E M_12^2 |M_11| = r = E ||D u||^3 E |v_1| / (d + 1), and E |M_11|^3 = 2 r. Entries of
      another row and column have E M_22^2 |M_11| = w = (m - 2 d r) / (d - 1)^2. The sum of these is
      Cov(||M||_F^2, |M_11|) = 2 K r + (K - 1)^2 w - (K / d)^2 m. All this is exact. In Cov(|M_11|, |M_22|), |M_22| is
      replaced by m d^2 M_22^2 / 2, the first term of its series in Hermite polynomials.
    """
    k = s.shape[-1]
    squares, total = s.square().sum(-1), s.sum(-1)
    rest = (1 - squares).clamp(min=0) / max(d - k, 1)
    fourth = s.pow(4).sum(-1) + rest.square() * (d - k)
    a, b = projector_moments(k, d)
    mean = (k / d) ** 2 + squares
    variance = a**2 + 2 * b**2 - (k / d) ** 4 + (4 * a * b + 2 * b**2) * fourth
    if absolute:
        length = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))  # E of d normal numbers
        root, cube = (moment * math.sqrt(2 / math.pi) / length**2 for moment in _root_moments(s.square(), rest, d - k))
        m, r = root, cube / (d + 1) ** 2
        w = (m - 2 * d * r) / max(d - 1, 1) ** 2
        with_size = 2 * k * r + (k - 1) ** 2 * w - (k / d) ** 2 * m
        with_other = m * d**2 / 2 * (w - m / d**2)
        mean = mean - 2 * m * total
        variance = variance - 4 * total * with_size
        variance = variance + 4 * (squares * (1 / d**2 - m.square()) + (total.square() - squares) * with_other)
    else:
        variance = variance + 4 * squares / d**2
    return mean, variance.clamp(min=0)


def _root_moments(
    top: Float[Tensor, "... K"], rest: Float[Tensor, "..."], count: int
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    r"""Return E sqrt(Y) and E Y^(3/2) of Y = sum_i l_i g_i^2 for independent normal g_i, where the l_i sum to 1.

    With phi(t) = E exp(-t Y) = prod_i (1 + 2 l_i t)^(-1/2), a moment of sqrt(Y) times h(Y) is
    integral of (E h(Y) - E h(Y) exp(-t Y)) t^(-3/2) dt / (2 sqrt(pi)). The trapezoidal rule in log t converges
    exponentially.

    Args:
        top: l_i of the top K.
        rest: l_i of each of the others.
        count: number of the others.
    """
    nodes = torch.arange(1.0 - _NODES, _NODES, dtype=top.dtype, device=top.device)
    t, weights = nodes.exp(), (-nodes / 2).exp() / (2 * math.sqrt(math.pi))
    grown, grown_rest = 1 + 2 * t * top[..., None], 1 + 2 * t * rest[..., None]  # [..., K, node], [..., node]
    phi = (-(grown.log().sum(-2) + count * grown_rest.log()) / 2).exp()
    slope = phi * ((top[..., None] / grown).sum(-2) + count * rest[..., None] / grown_rest)
    return ((1 - phi) * weights).sum(-1), ((1 - slope) * weights).sum(-1)


def projector_moments(k: int, d: int) -> tuple[float, float]:
    r"""Return the moments a, b of a projector P onto K Haar-random directions of R^d.

    E[P_ij P_kl] = a delta_ij delta_kl + b (delta_ik delta_jl + delta_il delta_jk). From E (tr P)^2 = K^2 and
    E tr P^2 = K: a = K (K (d+1) - 2) / (d (d-1) (d+2)), b = K (d-K) / (d (d-1) (d+2)).
    """
    share = k / (d * max(d - 1, 1) * (d + 2))
    return share * (k * (d + 1) - 2), share * (d - k)
