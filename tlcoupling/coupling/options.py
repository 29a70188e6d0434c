"""Options that all kinds of coupling share: how Jacobians are made, decomposed and compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from tlcoupling.arguments import KSpec, check_name, resolve_k
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName


@dataclass(frozen=True)
class Options:
    """How Jacobians are made, decomposed and compared.

    Attributes:
        k: numbers of singular vectors compared.
        normalizer: ``"frobenius"`` or ``"trace"``.
        bases: ``"uv"`` or ``"vu"``.
        absolute: whether absolute values of U^T J V are taken.
        engine: ``"auto"``, ``"analytic"`` or ``"autograd"``.
        solver: ``"auto"``, ``"dense"`` or ``"krylov"``.
    """

    k: tuple[int, ...]
    normalizer: Normalizer
    bases: Bases
    absolute: bool
    engine: EngineName
    solver: SolverName

    @classmethod
    def resolve(
        cls,
        d_model: int,
        k: KSpec,
        normalizer: Normalizer,
        bases: Bases,
        absolute: bool,
        engine: EngineName,
        solver: SolverName,
    ) -> Options:
        """Check the options, before anything is planned or run.

        Raises:
            ArgumentError: K is out of range for this d_model, or a name is unknown.
        """
        check_name("normalizer", normalizer, get_args(Normalizer))
        check_name("bases", bases, get_args(Bases))
        check_name("engine", engine, get_args(EngineName))
        check_name("solver", solver, get_args(SolverName))
        return cls(resolve_k(k, d_model), normalizer, bases, absolute, engine, solver)

    def settings(self) -> dict[str, Any]:
        """Return the options as a provenance stores them."""
        return {**asdict(self), "k": list(self.k)}
