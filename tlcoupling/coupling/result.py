"""What the results of all kinds of coupling share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling.groups import Group
from tlcoupling.coupling.metric import off_diagonal_mean
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.pairs import compare_groups
from tlcoupling.coupling.plan import Job, make_plan
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.results.base import Result

Quantity = Literal["values", "null", "excess", "overlap_u", "overlap_v"]
CouplingT = TypeVar("CouplingT", bound="Coupling")


@dataclass(frozen=True, repr=False, eq=False)
class Coupling(Result):
    """Coupling of Jacobians with each other, in square matrices: the base of all kinds.

    In each matrix the row is what gives the Jacobian, the column what gives the bases; it is not symmetric, and where
    both are the same it is 1 for the ``"uv"`` bases. ``group`` stands for the axes before the matrices.

    Attributes:
        values: coupling c_K, at most 1. ``[*group, k, row, column]``.
        null: what independent random bases would give, c_null; it depends on the row alone. Same axes.
        null_std: the standard deviation of the coupling under independent random bases, of a single pair. Same axes.
        overlap_u: overlap of the spaces that two Jacobians write, from 0 to 1; its null is ``overlap_null``. Same axes.
        overlap_v: overlap of the spaces that two Jacobians read. Same axes.
        overlap_null: K / d_model. ``[k]``.
        singular_values: the top singular values of each row. ``[*group, row, rank]``.
        frobenius: ||J||_F of each row. ``[*group, row]``.
        frobenius_error: relative standard error of that where the matrix was too large to form; 0 where it is exact.
            Same axes.
        residual: the worst residual of each row's truncated SVD, relative to s_1. Same axes.
        sublayers: ``block``, ``attn``, ``mlp``.
        ks: number of singular vectors compared.
        normalizer: ``"frobenius"`` or ``"trace"``.
        bases: ``"uv"`` or ``"vu"``.
        absolute: whether absolute values of U^T J V were taken.
    """

    values: Float[Tensor, "*group k n n"]
    null: Float[Tensor, "*group k n n"]
    null_std: Float[Tensor, "*group k n n"]
    overlap_u: Float[Tensor, "*group k n n"]
    overlap_v: Float[Tensor, "*group k n n"]
    overlap_null: Float[Tensor, " k"]
    singular_values: Float[Tensor, "*group n rank"]
    frobenius: Float[Tensor, "*group n"]
    frobenius_error: Float[Tensor, "*group n"]
    residual: Float[Tensor, "*group n"]
    sublayers: tuple[str, ...]
    ks: tuple[int, ...]
    normalizer: str
    bases: str
    absolute: bool

    def __init_subclass__(cls, group: Sequence[str] = (), member: str = "", **kwargs: Any) -> None:
        """Name the axes: those of the groups, and of what is compared in each."""
        super().__init_subclass__(**kwargs)
        if not member:
            return
        pairs, members = (*group, "k", member, f"basis_{member}"), (*group, member)
        cls._axes = {
            **dict.fromkeys(("values", "null", "null_std", "overlap_u", "overlap_v"), pairs),
            "overlap_null": ("k",),
            "singular_values": (*members, "rank"),
            **dict.fromkeys(("frobenius", "frobenius_error", "residual"), members),
        }
        cls._derived = {"excess": pairs, "z": pairs}

    def __repr__(self) -> str:
        """One line."""
        means, nulls = (
            self.mean(name)[..., 0].reshape(len(self.sublayers), -1).nanmean(1) for name in ("values", "null")
        )
        shown = ", ".join(
            f"{name} {mean:.4f} (null {null:.4f})"
            for name, mean, null in zip(self.sublayers, means, nulls, strict=True)
        )
        return f"{type(self).__name__}({self._described()}, K={self.ks[0]}: {shown})"

    def _described(self) -> str:
        """What was compared, for the one line."""
        raise NotImplementedError

    @property
    def excess(self) -> Float[Tensor, "*group k n n"]:
        """Coupling above its null, c - c_null: the finding, free of what width alone gives."""
        return self.values - self.null

    @property
    def z(self) -> Float[Tensor, "*group k n n"]:
        """Excess in standard deviations of the null, (c - c_null) / null_std, of each single pair.

        Its null hypothesis is that the two bases are independent and random. The pairs of one matrix share their
        bases, so they are not independent draws: the z of their mean is not z sqrt(n).
        """
        return self.excess / self.null_std

    def mean(self, quantity: Quantity = "values") -> Float[Tensor, "*group k"]:
        """Mean over the ordered pairs of different members; NaN where there is only one.

        Raises:
            ArgumentError: an unknown quantity.
        """
        return off_diagonal_mean(self._pairs(quantity))

    def _pairs(self, quantity: str) -> Tensor:
        allowed = ("values", "null", "excess", "overlap_u", "overlap_v")
        if quantity not in allowed:
            raise ArgumentError("quantity", quantity, f"one of {', '.join(allowed)}")
        return getattr(self, quantity)

    def _labels(self) -> dict[str, Sequence[Any]]:
        """Labels of the axes that are this kind's own."""
        raise NotImplementedError

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "sublayer": self.sublayers,
            "k": self.ks,
            "rank": range(self.singular_values.shape[-1]),
            **self._labels(),
        }


@dataclass(frozen=True, repr=False, eq=False)
class OrderedCoupling(Coupling):
    """Coupling of what has an order: layers or positions."""

    def profile(self, quantity: Quantity = "values") -> Float[Tensor, "*group k distance"]:
        """Mean over the pairs at each distance 1, 2, ... in the order of the layers or positions measured.

        A band matrix has the same profile at every size, while the mean over all its pairs moves with size alone.

        Raises:
            ArgumentError: an unknown quantity.
        """
        matrix = self._pairs(quantity)
        both = [
            torch.cat([matrix.diagonal(step, -2, -1), matrix.diagonal(-step, -2, -1)], dim=-1).mean(-1)
            for step in range(1, matrix.shape[-1])
        ]
        return torch.stack(both, dim=-1) if both else matrix.new_zeros(*matrix.shape[:-2], 0)


@measured
def measure(
    kind: type[CouplingT],
    trace: Trace,
    sublayers: tuple[str, ...],
    groups: Sequence[Group],
    options: Options,
    chosen: Mapping[str, Any],
    progress: bool,
    **labels: Any,
) -> CouplingT:
    """Compare the Jacobians of each group and make a result of it.

    Args:
        kind: the kind of result.
        trace: a trace of the model.
        sublayers: what is measured of each layer.
        groups: in the order of the result's axes behind the sublayer.
        options: how they are compared.
        chosen: what was chosen, for the provenance.
        progress: show a progress bar.
        labels: the kind's own fields.

    Raises:
        ArgumentError: K above the rank of a Jacobian.
        InsufficientMemoryError: more memory is needed than is free; nothing was begun.
        StaleTraceError: the model or its hooks have changed since the trace was taken.
    """
    started = time.perf_counter()
    job = Job(trace.model, trace.topology, trace.n_tokens, trace.resid.dtype, sublayers, groups, options)
    plan = make_plan(job)
    jacobians = JacobianEngine(trace, options.engine, {place.dest for group in groups for place in group.places})
    fields = compare_groups(jacobians, sublayers, plan, options, progress)
    if "sublayer" not in kind._axes["values"]:
        fields = {name: tensor[0] for name, tensor in fields.items()}
    settings = {**chosen, "sublayers": list(sublayers), **options.settings()}
    return kind(
        provenance=trace.provenance(settings=settings, seconds=time.perf_counter() - started, engine=jacobians.used),
        **fields,
        overlap_null=torch.tensor(options.k, dtype=torch.float64) / trace.d_model,
        sublayers=sublayers,
        ks=options.k,
        normalizer=options.normalizer,
        bases=options.bases,
        absolute=options.absolute,
        **labels,
    )
