"""What is kept of a Jacobian to compare it with others: its top triplets, its Frobenius norm, and its products.

There are three ways to these, and ``cheapest`` chooses between them: form the matrix and keep it; form it, decompose it
and drop it, and make products anew for the comparison; or take products alone, so that nothing d x d is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import ArgumentError
from tlcoupling.linalg.krylov import OVERSAMPLING
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.linalg.svd import SolverName, truncated_svds
from tlcoupling.linalg.triplets import Triplets

STEPS = 8  # Krylov steps that a top-10 spectrum usually takes
THIN = 2.0  # a product with few columns reaches about half the rate of a product of matrices
PROBES = 64
COLUMNS = 1024  # of a product at a time: bounds the memory on its way


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A Jacobian as far as its coupling needs it.

    Attributes:
        triplets: its top singular triplets.
        frobenius: ||J||_F.
        frobenius_error: relative standard error of that; 0 where it is exact.
        multiply: X -> J X.
        kept: whether that is a product with a matrix that is there, not with a Jacobian made anew.
    """

    triplets: Triplets
    frobenius: Float[Tensor, ""]
    frobenius_error: Float[Tensor, ""]
    multiply: Callable[[Float[Tensor, "d n"]], Float[Tensor, "d n"]]
    kept: bool


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A Jacobian that is there, and how it is to be decomposed.

    Attributes:
        operator: the Jacobian.
        make: makes it anew for later products, where its matrix is not kept.
        way: name of a ``Way``.
        where: which it is, as an error names it.
    """

    operator: JacobianOperator
    make: Callable[[], JacobianOperator]
    way: str
    where: str


def spectra_of(parts: Sequence[Decomposition], k: int, solver: SolverName) -> list[Spectrum]:
    """Decompose Jacobians of one shape, those whose matrices are formed together.

    Args:
        parts: the Jacobians.
        k: number of triplets.
        solver: ``"auto"``, ``"dense"`` or ``"krylov"``.

    Raises:
        ArgumentError: K above the rank of one of them; the message says which.
    """
    formed = {index: part.operator.dense() for index, part in enumerate(parts) if part.way != "products"}
    found: dict[int, Triplets] = {}
    for device in {matrix.device for matrix in formed.values()}:
        here = [index for index, matrix in formed.items() if matrix.device == device]
        triplets = _triplets([Projection(formed[i]) for i in here], [parts[i] for i in here], k, solver)
        found.update(zip(here, triplets, strict=True))
    spectra = []
    for index, part in enumerate(parts):
        kept = part.way == "matrix kept"
        if index in formed:
            matrix = formed[index]
            multiply = matrix.__matmul__ if kept else _products(part.make)
            spectra.append(Spectrum(found[index], matrix.norm(), matrix.new_zeros(()), multiply, kept))
        else:
            (triplets,) = _triplets([part.operator], [part], k, solver)
            norm = estimate_frobenius(part.operator, triplets)
            spectra.append(Spectrum(triplets, *norm, _products(part.make), kept))
    return spectra


def _triplets(
    operators: Sequence[JacobianOperator], parts: Sequence[Decomposition], k: int, solver: SolverName
) -> list[Triplets]:
    """Top triplets; an error names the Jacobian that it is about."""
    try:
        return truncated_svds(operators, k, solver)
    except ArgumentError as error:
        if len(operators) > 1:  # which of them?
            return [
                _triplets([operator], [part], k, solver)[0] for operator, part in zip(operators, parts, strict=True)
            ]
        raise ArgumentError(error.name, error.value, f"{error.allowed} ({parts[0].where})") from error


def _products(make: Callable[[], JacobianOperator]) -> Callable[[Float[Tensor, "d n"]], Float[Tensor, "d n"]]:
    """X -> J X by a Jacobian made anew, some columns at a time."""

    def multiply(x: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        operator = make()
        return torch.cat([operator.mm(part) for part in x.split(COLUMNS, dim=1)], dim=1)

    return multiply


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


@dataclass(frozen=True)
class Way:
    """A way to the spectrum of a Jacobian and to its products with the bases of others.

    Attributes:
        name: ``"matrix kept"``, ``"matrix dropped"`` or ``"products"``.
        formed: floating-point operations of forming the matrix.
        thin: of products with few columns, to decompose.
        compared: of products with the bases.
    """

    name: str
    formed: float
    thin: float
    compared: float

    @property
    def flops(self) -> float:
        """All operations."""
        return self.formed + self.thin + self.compared

    @property
    def cost(self) -> float:
        """Operations, those of thin products counted by the time that they take."""
        return self.formed + THIN * (self.thin + self.compared)


@runtime_checkable
class Work(Protocol):
    """What a choice needs to know of a Jacobian: a ``JacobianOperator`` tells it, and so does a ``Cost``."""

    @property
    def product_flops(self) -> float:
        """Of one product with one vector."""
        ...

    @property
    def dense_flops(self) -> float:
        """Of forming the matrix."""
        ...


def ways(work: Work, size: int, k: int, columns: int, solver: SolverName) -> list[Way]:
    """All ways, for coupling a Jacobian of R^size with the top k bases of ``columns`` others."""
    steps, compared, on_matrix = 2 * STEPS * (k + OVERSAMPLING), columns * k, 2.0 * size**2
    form, product = work.dense_flops, work.product_flops
    found = [
        Way("matrix kept", form, steps * on_matrix, compared * on_matrix),
        Way("matrix dropped", form, steps * on_matrix, compared * product),
    ]
    if solver != "dense":
        found.append(Way("products", 0.0, (steps + PROBES) * product, compared * product))
    return found


def cheapest(work: Work, size: int, k: int, columns: int, solver: SolverName, keep: bool) -> Way:
    """The cheapest way; ``keep`` tells whether matrices may be kept."""
    possible = ways(work, size, k, columns, solver)
    return min(possible if keep else possible[1:], key=lambda way: way.cost)
