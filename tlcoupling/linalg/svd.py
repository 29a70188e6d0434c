"""Truncated SVD with a choice of solver."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from tlcoupling.arguments import check_int, check_name
from tlcoupling.errors import ArgumentError
from tlcoupling.linalg.dense import dense_svd
from tlcoupling.linalg.krylov import OVERSAMPLING, USUAL_STEPS, krylov_svd
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.linalg.triplets import Triplets
from tlcoupling.linalg.work import Work
from tlcoupling.memory import free_memory
from tlcoupling.precision import full_precision

SolverName = Literal["auto", "dense", "krylov"]

# A residual of 1e-4 moves the coupling of SmolLM2's blocks by 2e-6; float32 products allow 1e-6.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-10}
DENSE_COPIES = 6  # the matrix, its SVD and LAPACK's workspace hold at most as many numbers as these matrices

STEP_CALLS = 40.0  # small calls that take as long as what is not linear algebra in a Krylov step, measured


def truncated_svd(
    operator: JacobianOperator, k: int, solver: SolverName = "auto", tolerance: float | None = None
) -> Triplets:
    """Return the top k singular triplets of an operator.

    Args:
        operator: J, of shape [m, n].
        k: number of triplets, from 1 to the rank of J.
        solver: ``"dense"`` (full SVD of the matrix), ``"krylov"`` (products only), or ``"auto"``: the cheaper one, and
            dense if Krylov does not converge and the matrix fits into memory.
        tolerance: largest residual that Krylov may leave of a triplet, relative to its own s_k; by default 3e-5 in
            float32, 1e-10 in float64. Rounding leaves about 10 eps s_1 of each; Krylov stops at 32 eps s_1.

    Returns:
        Triplets with their residuals and the distances of their singular values.

    Warns:
        UserWarning: Krylov has not converged and the dense solver was not allowed, or its matrix does not fit into
            memory. The warning says which triplets.

    Raises:
        ArgumentError: k below 1 or above the numerical rank, an unknown solver, or a tolerance not above 0.
    """
    return truncated_svds([operator], k, solver, tolerance)[0]


@full_precision()
def truncated_svds(
    operators: Sequence[JacobianOperator], k: int, solver: SolverName = "auto", tolerance: float | None = None
) -> list[Triplets]:
    """Return the top k singular triplets of several operators of one shape, as ``truncated_svd`` does for one.

    One call for several operators is faster than one call each.
    """
    first = operators[0]
    size = min(first.shape)
    k = check_int("k", k, 1, size, "the size of the Jacobian")
    check_name("solver", solver, get_args(SolverName))
    if tolerance is None:
        tolerance = TOLERANCE[first.dtype]
    if not tolerance > 0:
        raise ArgumentError("tolerance", tolerance, "a number above 0")
    if solver == "dense" or (
        solver == "auto" and all(_dense_is_cheaper(size, k, one.product_flops, one.dense_flops) for one in operators)
    ):
        results = [dense_svd(one, k) for one in operators]
    else:
        results = krylov_svd(operators, k, tolerance)
        for index, one in enumerate(operators):
            left = ~results[index].converged
            if not left.any():
                continue
            if solver == "auto" and _dense_fits(one):
                results[index] = dense_svd(one, k)
            else:
                which = ", ".join(str(rank + 1) for rank in left.nonzero()[:, 0].tolist())
                warnings.warn(
                    f"block Krylov has not converged for triplets {which}: the largest residual is "
                    f"{float(results[index].residual[left].max()):.1e} of its singular value, not {tolerance:.0e}; the "
                    "gap between singular values is too small. solver='dense' is exact",
                    stacklevel=4,
                )
    for one, triplets in zip(operators, results, strict=True):
        _require_rank(one, triplets)
    return results


def _dense_is_cheaper(size: int, k: int, product_flops: float, dense_flops: float) -> bool:
    """Return whether a full SVD costs less than the usual number of Krylov steps."""
    vectors = (k + OVERSAMPLING) * USUAL_STEPS
    if vectors >= size // 2:
        return True
    whole = dense_flops + 20.0 * size**3
    steps = 2 * vectors * product_flops + 8.0 * size * vectors**2
    return whole < steps


def _dense_fits(operator: JacobianOperator) -> bool:
    """Return whether the matrix and its full SVD fit into memory."""
    rows, columns = operator.shape
    return DENSE_COPIES * rows * columns * operator.dtype.itemsize <= free_memory(operator.device)


def svd_work(
    size: int,
    k: int,
    product_flops: float,
    dense_flops: float,
    solver: SolverName = "auto",
    of_weights: bool = False,
) -> Work:
    """Return the work of ``truncated_svd``: of the solver that it would choose, at the usual number of Krylov steps.

    Args:
        size: the smaller dimension of the operator.
        k: number of triplets.
        product_flops: floating-point operations of one product with one vector.
        dense_flops: floating-point operations of forming the matrix.
        solver: as in ``truncated_svd``.
        of_weights: whether products are those of a block's weights, not of a matrix.
    """
    if solver == "dense" or (solver == "auto" and _dense_is_cheaper(size, k, product_flops, dense_flops)):
        return Work(matmul=dense_flops, thin=8.0 * size**2 * k, svd=20.0 * size**3, calls=STEP_CALLS)
    width = min(k + OVERSAMPLING, size)
    vectors = min(width * USUAL_STEPS, size)
    orthogonal = 12.0 * size * vectors**2 + 8.0 * size * width * vectors  # three projections and a QR on either side
    checks = 2.0  # a last one, and two in smaller spaces that cost about half of it each
    products = 2 * vectors * product_flops
    return Work(
        thin=orthogonal + checks * 4.0 * size * vectors**2 + (0.0 if of_weights else products),
        weights=products if of_weights else 0.0,
        svd=checks * 20.0 * vectors**3,
        calls=STEP_CALLS * USUAL_STEPS,
    )


def _require_rank(operator: JacobianOperator, triplets: Triplets) -> None:
    """Raise an error for triplets beyond the numerical rank: their vectors are rounding errors."""
    floor = triplets.s[0] * max(operator.shape) * torch.finfo(operator.dtype).eps
    rank = int((triplets.s > floor).sum())
    if rank < len(triplets.s):
        raise ArgumentError("k", len(triplets.s), f"at most {rank}, the numerical rank of this Jacobian")
