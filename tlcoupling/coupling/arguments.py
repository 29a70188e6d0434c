"""The arguments that all kinds of coupling share, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.stream import Outline
from tlcoupling.jacobian.engine import EngineName, check_index, check_sublayers
from tlcoupling.linalg.svd import SolverName

KSpec = int | float | Sequence[int | float]
Indices = int | Sequence[int] | Literal["all"]


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
        trace: Outline,
        k: KSpec,
        normalizer: Normalizer,
        bases: Bases,
        absolute: bool,
        engine: EngineName,
        solver: SolverName,
    ) -> Options:
        """Check them.

        Raises:
            ArgumentError: a K out of range, or an unknown name; before anything is planned or run.
        """
        ks = resolve_k(k, trace.d_model)
        for argument, value, allowed in (
            ("normalizer", normalizer, get_args(Normalizer)),
            ("bases", bases, get_args(Bases)),
            ("engine", engine, get_args(EngineName)),
            ("solver", solver, get_args(SolverName)),
        ):
            if value not in allowed:
                raise ArgumentError(argument, value, f"one of {', '.join(allowed)}")
        return cls(ks, normalizer, bases, absolute, engine, solver)

    def settings(self) -> dict[str, Any]:
        """As a provenance keeps them."""
        return {**asdict(self), "k": list(self.k)}


def resolve_sublayers(trace: Outline, sublayers: str | Sequence[str] | None) -> tuple[str, ...]:
    """The sublayers to measure, by default all that the model has.

    Raises:
        ArgumentError: one that the model has not, or none.
    """
    names = trace.sublayers if sublayers is None else (sublayers,) if isinstance(sublayers, str) else tuple(sublayers)
    check_sublayers(trace, names)
    return names


def resolve_k(k: KSpec, d_model: int, name: str = "k") -> tuple[int, ...]:
    """K as ints: fractions of d_model are rounded down, to at least 1.

    Args:
        k: one or several.
        d_model: the width.
        name: of the argument, for the error.

    Raises:
        ArgumentError: below 1, above d_model, or no number.
    """
    items = k if isinstance(k, Sequence) and not isinstance(k, str) else (k,)
    resolved = []
    for item in items:
        if isinstance(item, float) and 0 < item < 1:
            resolved.append(max(1, int(item * d_model)))
        elif isinstance(item, int) and not isinstance(item, bool) and 1 <= item <= d_model:
            resolved.append(item)
        else:
            raise ArgumentError(
                name, item, f"an int from 1 to d_model = {d_model}, or a fraction of it between 0 and 1"
            )
    if not resolved:
        raise ArgumentError(name, k, "at least one number")
    return tuple(resolved)


def resolve_one_k(name: str, value: KSpec, d_model: int) -> int:
    """``resolve_k`` where there is one.

    Raises:
        ArgumentError: as ``resolve_k``, or several; the message names the argument.
    """
    first, *others = resolve_k(value, d_model, name)
    if others:
        raise ArgumentError(name, value, "one number")
    return first


def resolve_indices(name: str, value: Indices, size: int) -> tuple[int, ...]:
    """Indices from 0 to size - 1.

    Raises:
        ArgumentError: out of range, twice the same, or none.
    """
    if isinstance(value, str):
        if value != "all":
            raise ArgumentError(name, value, f"an int, several, or 'all' ({size} there are)")
        return tuple(range(size))
    items = [value] if isinstance(value, int) else list(value)
    indices = tuple(check_index(name, item, size) for item in items)
    if not indices or len(set(indices)) < len(indices):
        raise ArgumentError(name, value, "one or more different indices")
    return indices
