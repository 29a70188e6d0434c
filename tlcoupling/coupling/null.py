r"""The coupling that independent Haar-random bases give: its mean and its standard deviation, in closed form.

Let D be the singular values of J1, f = ||J1||_F, and u, v Haar-random unit vectors of R^w, with w the effective width
(``effective_width``): the width d, less what both Jacobians miss. With M = U2^T J1 V2 and
Q = || abs(M) - S1 ||_F^2 = ||M||_F^2 + sum S1^2 - 2 sum_i s_i |M_ii|, the coupling is c = 1 - sqrt(Q) / norm(S1). The
mean and the variance of Q follow from moments of ||M||_F^2 and |M_ii|. Then, by the delta method,

    E c = 1 - sqrt(E Q) (1 - Var Q / (8 (E Q)^2)) / norm(S1),      std(c) = std(Q) / (2 sqrt(E Q) norm(S1)).

None of this is in the paper. ``benchmarks/chance.py`` holds it against draws of bases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tlcoupling.coupling.metric import Normalizer, normalizer_of

UNREACHED = 1e-3  # of the share K / d that vectors have of a direction by chance
_NODES = 33  # of each half of the quadrature, one a unit of log t; its error is below 1e-6


def null_coupling(
    s1: Float[Tensor, "*#pair K"],
    frobenius: Float[Tensor, "*#pair"],
    d_model: int,
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
    width: Float[Tensor, "*#pair"] | None = None,
) -> Float[Tensor, "*pair"]:
    r"""Return c_null, the coupling expected for independent Haar-random bases, to second order (see the module).

    Args:
        s1: the top K singular values of J1.
        frobenius: ||J1||_F, of the whole matrix.
        d_model: the width, d.
        normalizer: as in ``coupling``.
        absolute: as in ``coupling``.
        width: the effective width (``effective_width``); by default d.
    """
    s = s1.double() / frobenius.double()[..., None]  # the coupling is scale-free: from here f = 1
    mean, variance = _moments(s, d_model, absolute, width)
    root = mean.sqrt() * (1 - variance / (8 * mean.square()))
    return (1 - root / normalizer_of(s, normalizer)).to(s1)


def null_std(
    s1: Float[Tensor, "*#pair K"],
    frobenius: Float[Tensor, "*#pair"],
    d_model: int,
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
    width: Float[Tensor, "*#pair"] | None = None,
) -> Float[Tensor, "*pair"]:
    r"""Return the standard deviation of the coupling under independent Haar-random bases, to first order.

    Args:
        s1: the top K singular values of J1.
        frobenius: ||J1||_F, of the whole matrix.
        d_model: the width, d.
        normalizer: as in ``coupling``.
        absolute: as in ``coupling``.
        width: the effective width (``effective_width``); by default d.
    """
    s = s1.double() / frobenius.double()[..., None]
    mean, variance = _moments(s, d_model, absolute, width)
    return (variance.sqrt() / (2 * mean.sqrt() * normalizer_of(s, normalizer))).to(s1)


def _moments(
    s: Float[Tensor, "*#pair K"], d_model: int, absolute: bool, width: Float[Tensor, "*#pair"] | None
) -> tuple[Float[Tensor, "*pair"], Float[Tensor, "*pair"]]:
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
    k, beyond = s.shape[-1], d_model - s.shape[-1]
    d = torch.full_like(s[..., 0], d_model) if width is None else width.to(s)
    squares, total = s.square().sum(-1), s.sum(-1)
    rest = (1 - squares).clamp(min=0) / max(beyond, 1)
    fourth = s.pow(4).sum(-1) + rest.square() * beyond
    a, b = projector_moments(k, d)
    mean = (k / d) ** 2 + squares
    variance = a**2 + 2 * b**2 - (k / d) ** 4 + (4 * a * b + 2 * b**2) * fourth
    if absolute:
        length = math.sqrt(2) * (torch.lgamma((d + 1) / 2) - torch.lgamma(d / 2)).exp()  # E of d normal numbers
        root, cube = (moment * math.sqrt(2 / math.pi) / length**2 for moment in _root_moments(s.square(), rest, beyond))
        m, r = root, cube / (d + 1) ** 2
        w = (m - 2 * d * r) / (d - 1).clamp(min=1) ** 2
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
    grown, grown_rest = 2 * t * top[..., None], 2 * t * rest[..., None]  # [..., K, node], [..., node]
    log_phi = -(grown.log1p().sum(-2) + count * grown_rest.log1p()) / 2
    lost = -log_phi.expm1()  # 1 - phi, which is small where the weights are large
    slope = (top[..., None] / (1 + grown)).sum(-2) + count * rest[..., None] / (1 + grown_rest)  # -phi' / phi
    flat = (top[..., None] * grown / (1 + grown)).sum(-2) + count * rest[..., None] * grown_rest / (1 + grown_rest)
    return (lost * weights).sum(-1), ((flat + slope * lost) * weights).sum(-1)


def unreached(vectors: Float[Tensor, "d K"], candidates: Float[Tensor, "d c"]) -> Float[Tensor, "d n"]:
    """Return an orthonormal basis of those directions among the candidates' span that the vectors do not reach.

    A norm projects out the stream's own direction, and a LayerNorm also the mean: vectors that random bases would have
    along such a direction lie in the other d - n. The share of K vectors along a direction that is not projected out is
    about K / d; one counts as unreached below a thousandth of that.

    Args:
        vectors: the top K singular vectors of one side, orthonormal.
        candidates: directions that may be projected out.
    """
    basis = torch.linalg.qr(candidates.to(vectors)).Q
    inner = vectors.mT @ basis
    shares, directions = torch.linalg.eigh(inner.mT @ inner)
    return basis @ directions[:, shares < UNREACHED * vectors.shape[1] / len(vectors)]


def unreached_of(
    u: Float[Tensor, "d K"], v: Float[Tensor, "d K"], reads: Float[Tensor, " d"]
) -> tuple[Float[Tensor, "d _"], Float[Tensor, "d _"]]:
    """Return what the top left singular vectors of a Jacobian do not reach, and what the right ones do not.

    Args:
        u: the left singular vectors. Written with centred weights, they miss the mean.
        v: the right ones. Read through a norm, they miss the stream, and the mean if the norm centres.
        reads: the stream that the Jacobian reads.
    """
    mean = torch.ones_like(reads)[:, None]
    return unreached(u, mean), unreached(v, torch.cat([mean, reads[:, None]], dim=1))


def effective_width(
    rows: Sequence[Float[Tensor, "d _"]], columns: Sequence[Float[Tensor, "d _"]]
) -> Float[Tensor, "row column"]:
    r"""Return the width w for which random vectors have E (u1 . u2)^2 = 1 / w, if they do not reach some directions.

    With P1, P2 the projectors onto what they may reach, of rank r1, r2, it is r1 r2 / tr(P1 P2): d if they reach
    everything, d - n if both miss the same n directions. Random subspaces of K dimensions overlap by K / w.

    The null of the coupling takes sqrt(w_left w_right), of both sides of U2^T J1 V2: E ||M||_F^2 is
    K^2 f^2 / (w_left w_right).

    Args:
        rows: an orthonormal basis of what each row's vectors do not reach.
        columns: the same of each column.
    """
    d, widest = len(rows[0]), max(each.shape[1] for each in (*rows, *columns))
    first, second = (
        torch.stack([nn.functional.pad(each.double(), (0, widest - each.shape[1])) for each in side])
        for side in (rows, columns)
    )
    both = torch.einsum("rdi,cdj->rcij", first, second).square().sum((-2, -1))
    missed, others = (torch.tensor([each.shape[1] for each in side]).to(both) for side in (rows, columns))
    reached = (d - missed)[:, None] * (d - others)
    return reached.clamp(min=1) / (d - missed[:, None] - others + both).clamp(min=1)


def projector_moments(k: int, d: Float[Tensor, "*any"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    r"""Return the moments a, b of a projector P onto K Haar-random directions of R^d.

    E[P_ij P_kl] = a delta_ij delta_kl + b (delta_ik delta_jl + delta_il delta_jk). From E (tr P)^2 = K^2 and
    E tr P^2 = K: a = K (K (d+1) - 2) / (d (d-1) (d+2)), b = K (d-K) / (d (d-1) (d+2)).
    """
    share = k / (d * (d - 1).clamp(min=1) * (d + 2))
    return share * (k * (d + 1) - 2), share * (d - k)
