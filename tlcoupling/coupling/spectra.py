"""What is kept of a Jacobian to compare it with others: its top triplets, its Frobenius norm, and its products.

A Jacobian is formed as a matrix where that costs less than the products that the measurement needs, and where the
matrices of all layers fit into memory; otherwise only products with it are taken, and nothing d x d is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.jacobian.maps import Projection
from tlcoupling.jacobian.operator import JacobianOperator
from tlcoupling.svd import Triplets, truncated_svd
from tlcoupling.svd.auto import SolverName
from tlcoupling.svd.krylov import OVERSAMPLING

STEPS = 8  # Krylov steps that a top-10 spectrum usually takes
THIN = 2.0  # a product with few columns reaches about half the rate of a product of matrices
PROBES = 64
MEMORY_SHARE = 0.5  # of what is free, for the matrices


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A Jacobian as far as its coupling needs it.

    Attributes:
        triplets: its top singular triplets.
        frobenius: ||J||_F.
        frobenius_error: relative standard error of that; 0 where it is exact.
        multiply: X -> J X.
    """

    triplets: Triplets
    frobenius: Float[Tensor, ""]
    frobenius_error: Float[Tensor, ""]
    multiply: Callable[[Float[Tensor, "d n"]], Float[Tensor, "d n"]]


def matrix_spectrum(operator: JacobianOperator, k: int, solver: SolverName) -> Spectrum:
    """Decompose the matrix of a Jacobian and keep it."""
    matrix = operator.dense()
    triplets = truncated_svd(Projection(matrix), k, solver)
    return Spectrum(triplets, matrix.norm(), matrix.new_zeros(()), matrix.__matmul__)


def product_spectrum(
    operator: JacobianOperator, make: Callable[[], JacobianOperator], k: int, solver: SolverName
) -> Spectrum:
    """Decompose a Jacobian by products alone; it is not kept, but made again for later ones."""
    triplets = truncated_svd(operator, k, solver)
    frobenius, error = estimate_frobenius(operator, triplets)
    return Spectrum(triplets, frobenius, error, lambda x: make().mm(x))


def estimate_frobenius(operator: JacobianOperator, triplets: Triplets) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""||J||_F and its relative standard error, from the top triplets and random probes of the rest.

    ||J||_F^2 = sum s_k^2 + ||J (I - V V^T)||_F^2, the last term by Hutchinson's estimator with 64 normal probes (Girard
    1989; deflation as in Hutch++, Meyer et al. 2021, arXiv 2010.09649).
    """
    v = triplets.v
    generator = torch.Generator().manual_seed(1)
    probes = torch.randn(operator.shape[1], PROBES, generator=generator, dtype=operator.dtype).to(operator.device)
    rest = operator.mm(probes - v @ (v.mT @ probes)).square().sum(0)
    squared = triplets.s.square().sum() + rest.mean()
    return squared.sqrt(), rest.std() / math.sqrt(PROBES) / (2 * squared)


def prefers_products(operator: JacobianOperator, k: int, n_layers: int) -> bool:
    """Whether products alone are cheaper than forming the matrix, for coupling with ``n_layers`` layers."""
    size = operator.shape[0]
    columns = 2 * STEPS * (k + OVERSAMPLING) + PROBES + n_layers * k
    by_matrix = operator.dense_flops + 2.0 * size**2 * columns
    return THIN * columns * operator.product_flops < by_matrix


def matrices_fit(count: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``count`` square matrices fit into the free memory of a device, with room for other work."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return count * size**2 * dtype.itemsize <= MEMORY_SHARE * free
