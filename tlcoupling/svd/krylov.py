"""The block Krylov solver: products with J and J^T only.

Randomised block Lanczos bidiagonalisation with full reorthogonalisation (Golub and Kahan 1965; randomised start and
block analysis: Musco and Musco, NeurIPS 2015, arXiv 1504.05477).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.jacobian.operator import JacobianOperator
from tlcoupling.svd.triplets import Triplets, residuals

OVERSAMPLING = 6  # columns of a block beyond k
FIRST_CHECK, LONGEST_WAIT, MAX_STEPS = 5, 4, 40
DECAY = 6.0  # by which a step usually lowers the residual; it tells when to look again


def krylov_svd(operator: JacobianOperator, k: int, tolerance: float) -> Triplets:
    """The top k triplets, iterated until every residual is at most ``tolerance`` or the space is exhausted.

    The start is random with a fixed seed, so that equal input gives equal output. The result's ``residual`` says how
    far it came; the caller decides what to do with a triplet that has not converged.

    Args:
        operator: J, of shape [m, n].
        k: number of triplets, at most min(m, n).
        tolerance: largest residual, relative to s_1.
    """
    rows, columns = operator.shape
    width = min(k + OVERSAMPLING, rows, columns)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, width, generator=generator, dtype=operator.dtype).to(operator.device)
    new_v = torch.linalg.qr(start).Q
    v, u, jtu = new_v, start.new_zeros(rows, 0), start.new_zeros(columns, 0)
    check = FIRST_CHECK
    for step in range(1, MAX_STEPS + 1):
        new_u = _orthogonalise(operator.mm(new_v)[:, : rows - u.shape[1]], u)
        u = torch.cat([u, new_u], dim=1)
        pulled = operator.rmm(new_u)
        jtu = torch.cat([jtu, pulled], dim=1)
        last = u.shape[1] == rows or v.shape[1] == columns or step == MAX_STEPS
        if not last and step == check:
            found = _ritz(u, v, jtu, k)
            reached = float(found.residual.max())
            if not reached > tolerance:  # NaN: J is zero
                return found
            due = math.ceil(math.log(min(reached, 1.0) / tolerance, DECAY))
            check = step + min(max(due, 1), LONGEST_WAIT)
        if not last or (u.shape[1] == rows and v.shape[1] < columns):
            new_v = _orthogonalise(pulled[:, : columns - v.shape[1]], v)
            v = torch.cat([v, new_v], dim=1)
        if last:
            break
    return _ritz(u, v, jtu, k)


def _ritz(u: Float[Tensor, "m p"], v: Float[Tensor, "n q"], jtu: Float[Tensor, "n p"], k: int) -> Triplets:
    """The best triplets within the spaces of U and V, from B = U^T J V."""
    inner = jtu.mT @ v
    left, s, right = torch.linalg.svd(inner)
    left, s, right = left[:, :k], s[:k], right[:k].mT
    jv = u @ (inner @ right)  # J V lies in the space of U, by construction
    return Triplets(u @ left, s, v @ right, residuals(jv, jtu @ left, u @ left, s, v @ right), "krylov")


def _orthogonalise(block: Float[Tensor, "n w"], basis: Float[Tensor, "n b"]) -> Float[Tensor, "n w"]:
    """An orthonormal basis of a block, orthogonal to what is there already.

    Projecting twice is enough (Kahan), unless little of the block is left; then it is done again on the unit vectors,
    or on random ones where nothing is left at all (J of low rank).
    """
    for _ in range(2):
        block = block - basis @ (basis.mT @ block)
    if not block.any():
        generator = torch.Generator().manual_seed(basis.shape[1])
        block = torch.randn(block.shape, generator=generator, dtype=block.dtype).to(block)
    block = torch.linalg.qr(block).Q
    while (basis.mT @ block).abs().sum() > 1e3 * torch.finfo(block.dtype).eps * block.shape[1]:
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block
