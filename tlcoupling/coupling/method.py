"""The three methods of decomposing a Jacobian and comparing it with others, and the choice of the cheapest.

A method forms the matrix and keeps it; or forms it, decomposes it and drops it, and compares by products with the
Jacobian itself; or takes products alone, so that nothing of size d x d is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from tlcoupling.jacobian.cost import Cost
from tlcoupling.linalg.krylov import OVERSAMPLING, USUAL_STEPS
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.linalg.svd import SolverName, svd_work
from tlcoupling.linalg.work import Work

# A product with few columns reaches about half the rate of a product of matrices on a CPU, a seventh on an H100.
THIN, THIN_ON_DEVICE = 2.0, 7.0
PROBES = 64  # random probes of ||J||_F, where there is no matrix


@dataclass(frozen=True)
class Method:
    """How a Jacobian is decomposed and compared.

    Attributes:
        name: ``"matrix kept"``, ``"matrix dropped"`` or ``"products"``.
        forming: work of forming the matrix.
        decomposing: work of the top triplets, and of the norm where there is no matrix.
        comparing: work of products with the basis of one other.
        cost: floating-point operations by which methods are compared: those of thin products count more.
    """

    name: str
    forming: Work
    decomposing: Work
    comparing: Work
    cost: float


def methods(
    jacobian: Cost | JacobianOperator, size: int, k: int, columns: int, solver: SolverName, thin: float = THIN
) -> list[Method]:
    """Return all methods for coupling a Jacobian of R^size with the top k bases of ``columns`` others.

    An operation of a product with few columns counts as ``thin`` others.
    """
    vectors, on_matrix = 2 * USUAL_STEPS * (k + OVERSAMPLING), 2.0 * size**2
    form, product = jacobian.dense_flops, jacobian.product_flops

    def formed(name: str, per_column: float) -> Method:
        cost = form + thin * (vectors * on_matrix + columns * k * per_column)
        decomposing = svd_work(size, k, on_matrix, 0.0, solver)
        comparing = Work(weights=k * product) if name == "matrix dropped" else Work(thin=k * on_matrix)
        return Method(name, Work(matmul=form), decomposing, comparing, cost)

    possible = [formed("matrix kept", on_matrix), formed("matrix dropped", product)]
    if solver != "dense":
        decomposing = svd_work(size, k, product, form, solver, of_weights=True) + Work(weights=PROBES * product)
        cost = thin * (vectors + PROBES + columns * k) * product
        possible.append(Method("products", Work(), decomposing, Work(weights=k * product), cost))
    return possible


def cheapest(
    jacobian: Cost | JacobianOperator,
    size: int,
    k: int,
    columns: int,
    solver: SolverName,
    keep: bool,
    thin: float = THIN,
) -> Method:
    """Return the cheapest method; ``keep`` tells whether matrices may be kept."""
    possible = methods(jacobian, size, k, columns, solver, thin)
    return min(possible if keep else possible[1:], key=lambda method: method.cost)
