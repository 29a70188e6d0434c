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
from tlcoupling.precision import full_precision

SolverName = Literal["auto", "dense", "krylov"]

# A residual of 1e-4 moves the coupling of SmolLM2's blocks by 2e-6; float32 products allow 1e-6.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-10}


def truncated_svd(
    operator: JacobianOperator, k: int, solver: SolverName = "auto", tolerance: float | None = None
) -> Triplets:
    """Return the top k singular triplets of an operator.

    Args:
        operator: J, of shape [m, n].
        k: number of triplets, from 1 to the rank of J.
        solver: ``"dense"`` (full SVD of the matrix), ``"krylov"`` (products only), or ``"auto"``: the cheaper one, and
            dense if Krylov does not reach the tolerance.
        tolerance: largest residual that Krylov may leave, relative to s_1; by default 3e-5 in float32, 1e-10 in
            float64.

    Returns:
        Triplets with their residuals.

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
    if solver == "dense" or (solver == "auto" and all(_dense_is_cheaper(one, k) for one in operators)):
        results = [dense_svd(one, k) for one in operators]
    else:
        results = krylov_svd(operators, k, tolerance)
        for index, one in enumerate(operators):
            reached = float(results[index].residual.max())
            if reached <= tolerance:
                continue
            if solver == "auto":
                results[index] = dense_svd(one, k)
            else:
                warnings.warn(
                    f"block Krylov reached a residual of {reached:.1e}, not {tolerance:.0e}: the gap between singular "
                    "values is too small; solver='dense' is exact",
                    stacklevel=4,
                )
    for one, triplets in zip(operators, results, strict=True):
        _require_rank(one, triplets)
    return results


def _dense_is_cheaper(operator: JacobianOperator, k: int) -> bool:
    """Return whether a full SVD costs less than the usual number of Krylov steps."""
    size = min(operator.shape)
    vectors = (k + OVERSAMPLING) * USUAL_STEPS
    if vectors >= size // 2:
        return True
    whole = operator.dense_flops + 20.0 * size**3
    steps = 2 * vectors * operator.product_flops + 8.0 * size * vectors**2
    return whole < steps


def _require_rank(operator: JacobianOperator, triplets: Triplets) -> None:
    """Raise an error for triplets beyond the numerical rank: their vectors are rounding errors."""
    floor = triplets.s[0] * max(operator.shape) * torch.finfo(operator.dtype).eps
    rank = int((triplets.s > floor).sum())
    if rank < len(triplets.s):
        raise ArgumentError("k", len(triplets.s), f"at most {rank}, the numerical rank of this Jacobian")
