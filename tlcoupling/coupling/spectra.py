"""What is kept of a Jacobian to compare it with others: its top triplets, its Frobenius norm, and its products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling.method import PROBES
from tlcoupling.errors import ArgumentError
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.linalg.svd import SolverName, truncated_svds
from tlcoupling.linalg.triplets import Triplets

COLUMNS = 1024  # columns of a product that are taken at a time, which bounds its memory


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What coupling needs of a Jacobian.

    Attributes:
        triplets: its top singular triplets.
        frobenius: ||J||_F.
        frobenius_error: relative standard error of that; 0 where it is exact.
        multiply: X -> J X.
        kept: whether ``multiply`` is a product with a kept matrix; otherwise it makes the Jacobian again.
    """

    triplets: Triplets
    frobenius: Float[Tensor, ""]
    frobenius_error: Float[Tensor, ""]
    multiply: Callable[[Float[Tensor, "d n"]], Float[Tensor, "d n"]]
    kept: bool


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A Jacobian, and how it is to be decomposed.

    Attributes:
        operator: the Jacobian.
        make: makes it again for later products, where its matrix is not kept.
        method: name of a ``Method``.
        where: which Jacobian it is, as an error names it.
    """

    operator: JacobianOperator
    make: Callable[[], JacobianOperator]
    method: str
    where: str


def spectra_of(parts: Sequence[Decomposition], k: int, solver: SolverName) -> list[Spectrum]:
    """Decompose Jacobians of one shape. Those whose matrices are formed are decomposed together.

    Args:
        parts: the Jacobians.
        k: number of triplets.
        solver: ``"auto"``, ``"dense"`` or ``"krylov"``.

    Raises:
        ArgumentError: K above the rank of one of them; the message says which.
    """
    formed = {index: part.operator.dense() for index, part in enumerate(parts) if part.method != "products"}
    found: dict[int, Triplets] = {}
    for device in {matrix.device for matrix in formed.values()}:
        here = [index for index, matrix in formed.items() if matrix.device == device]
        triplets = _triplets([Projection(formed[i]) for i in here], [parts[i] for i in here], k, solver)
        found.update(zip(here, triplets, strict=True))
    spectra = []
    for index, part in enumerate(parts):
        kept = part.method == "matrix kept"
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
    """Return the top triplets; an error names its Jacobian."""
    try:
        return truncated_svds(operators, k, solver)
    except ArgumentError as error:
        if len(operators) > 1:  # which of them?
            return [
                _triplets([operator], [part], k, solver)[0] for operator, part in zip(operators, parts, strict=True)
            ]
        raise ArgumentError(error.name, error.value, f"{error.allowed} ({parts[0].where})") from error


def _products(make: Callable[[], JacobianOperator]) -> Callable[[Float[Tensor, "d n"]], Float[Tensor, "d n"]]:
    """Return X -> J X by a Jacobian that is made again for each call, some columns at a time."""

    def multiply(x: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        operator = make()
        return torch.cat([operator.mm(part) for part in x.split(COLUMNS, dim=1)], dim=1)

    return multiply


def estimate_frobenius(operator: JacobianOperator, triplets: Triplets) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""Return ||J||_F and its relative standard error, from the top triplets and random probes of the rest.

    ||J||_F^2 = sum s_k^2 + ||J (I - V V^T)||_F^2, the last term by Hutchinson's estimator with 64 normal probes (Girard
    1989; deflation as in Hutch++, Meyer et al. 2021, arXiv 2010.09649).
    """
    v = triplets.v
    generator = torch.Generator().manual_seed(1)
    probes = torch.randn(operator.shape[1], PROBES, generator=generator, dtype=operator.dtype).to(operator.device)
    rest = operator.mm(probes - v @ (v.mT @ probes)).square().sum(0)
    squared = triplets.s.square().sum() + rest.mean()
    return squared.sqrt(), rest.std() / math.sqrt(PROBES) / (2 * squared)
