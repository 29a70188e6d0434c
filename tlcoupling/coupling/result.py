"""What the results of all kinds of coupling share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlcoupling.arguments import check_int
from tlcoupling.coupling.chance import CouplingTest, Drawn, rotation_test
from tlcoupling.coupling.groups import Group
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.pairs import Cell, compare_groups
from tlcoupling.coupling.schedule import Comparison, make_schedule
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.linalg.triplets import DETERMINED
from tlcoupling.results.base import Result
from tlcoupling.results.intervals import check_confidence
from tlcoupling.results.labelled import labelled

Quantity = Literal["values", "null", "excess", "overlap_u", "overlap_v", "overlap_null_u", "overlap_null_v"]
FEW_TOKENS = 4  # that a warning names
CouplingT = TypeVar("CouplingT", bound="Coupling")
KindT_co = TypeVar("KindT_co", bound="Coupling", covariant=True)


@dataclass(frozen=True, repr=False, eq=False)
class Coupling(Result):
    """Coupling of Jacobians with each other, in square matrices: the base of all kinds.

    In each matrix the row is what gives the Jacobian, the column what gives the bases; it is not symmetric, and where
    both are the same it is 1 for the ``"uv"`` bases. ``group`` stands for the axes before the matrices.

    Attributes:
        values: coupling c_K, at most 1. ``[*group, k, row, column]``.
        null: what independent random bases would give, c_null: it depends on the row's singular values and
            ``null_width``. Same axes.
        null_std: the standard deviation of the coupling under independent random bases, of a single pair. Same axes.
        overlap_u: overlap of the spaces that two Jacobians write, from 0 to 1. Same axes.
        overlap_v: overlap of the spaces that two Jacobians read. Same axes.
        overlap_null: K / d_model, the overlap of random subspaces of the whole width. ``[k]``.
        singular_values: the top singular values of each row. ``[*group, row, rank]``.
        frobenius: ||J||_F of each row. ``[*group, row]``.
        frobenius_error: relative standard error of that where the matrix was too large to form; 0 where it is exact.
            Same axes.
        residual: the worst residual of each row's singular triplets, relative to the triplet's own singular value (to
            s_1 in files of version 0.1). Same axes.
        sublayers: ``block``, ``attn``, ``mlp``.
        ks: number of singular vectors compared.
        normalizer: ``"frobenius"`` or ``"trace"``.
        bases: ``"uv"`` or ``"vu"``.
        absolute: whether absolute values of U^T J V were taken.
        gaps: distance of each singular value of a column's Jacobian to the nearest other one, s_{K+1} included,
            relative to itself. ``[*group, column, rank]``.
        uncertainty: how far the singular vectors of a column may be from the exact ones, given the gap, the residual
            and the precision: a bound on the sine of the angle, from 0 to 1 (``Triplets.uncertainty``). Same axes.
        subspace_uncertainty: the same bound for the spaces that the top K vectors of each row span. ``[*group, k,
            row]``.
        basis_subspace_uncertainty: the same of each column. ``[*group, k, column]``.
        overlap_null_u: the null of ``overlap_u``: K over the effective width, which is smaller than d_model where both
            Jacobians miss a direction, such as what a norm projects out. Axes of ``values``.
        overlap_null_v: the null of ``overlap_v``. Same axes.
        null_width: the effective width for which ``null`` was computed, the geometric mean of both sides'.
            ``[*group, row, column]``. These seven are None in results of version 0.1.
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
    gaps: Float[Tensor, "*group n rank"] | None = field(default=None, kw_only=True)
    uncertainty: Float[Tensor, "*group n rank"] | None = field(default=None, kw_only=True)
    subspace_uncertainty: Float[Tensor, "*group k n"] | None = field(default=None, kw_only=True)
    basis_subspace_uncertainty: Float[Tensor, "*group k n"] | None = field(default=None, kw_only=True)
    overlap_null_u: Float[Tensor, "*group k n n"] | None = field(default=None, kw_only=True)
    overlap_null_v: Float[Tensor, "*group k n n"] | None = field(default=None, kw_only=True)
    null_width: Float[Tensor, "*group n n"] | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, group: Sequence[str] = (), member: str = "", **kwargs: Any) -> None:
        """Name the axes: those of the groups, and of what is compared in each."""
        super().__init_subclass__(**kwargs)
        if not member:
            return
        pairs, members, bases = (*group, "k", member, f"basis_{member}"), (*group, member), (*group, f"basis_{member}")
        cls._axes = {
            **dict.fromkeys(("values", "null", "null_std", "overlap_u", "overlap_v"), pairs),
            **dict.fromkeys(("overlap_null_u", "overlap_null_v"), pairs),
            "null_width": (*group, *pairs[-2:]),
            "overlap_null": ("k",),
            "singular_values": (*members, "rank"),
            **dict.fromkeys(("frobenius", "frobenius_error", "residual"), members),
            **dict.fromkeys(("gaps", "uncertainty"), (*bases, "rank")),
            "subspace_uncertainty": pairs[:-1],
            "basis_subspace_uncertainty": (*group, "k", f"basis_{member}"),
        }
        cls._derived = {
            **dict.fromkeys(("excess", "z", "values_determined", "overlap_determined"), pairs),
            "determined": (*bases, "rank"),
        }

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

        It describes a pair, and is not a test: the null is skewed, so that z lies beyond 3.09 in 0.3 % of pairs
        (K = 10) and more by chance, not in 0.1 %. For p-values take ``test``.
        """
        return self.excess / self.null_std

    @property
    def d_model(self) -> int:
        """Return the width for which the null of the overlap was computed."""
        return round(self.ks[0] / self.overlap_null[0].item())

    @property
    def determined(self) -> Bool[Tensor, "*group n rank"] | None:
        """Return which singular vectors of each column are determined: ``uncertainty`` at most 0.01; None if unknown.

        Equal or nearly equal singular values leave their vectors undetermined. Two exact solvers may then return
        different vectors, so coupling that uses them differs too.
        """
        return None if self.uncertainty is None else self.uncertainty <= DETERMINED

    @property
    def values_determined(self) -> Bool[Tensor, "*group k n n"] | None:
        """Return which values use determined singular vectors alone: all top K of the column; None if unknown."""
        if (determined := self.determined) is None:
            return None
        each = torch.stack([determined[..., :k].all(-1) for k in self.ks], dim=-2)
        return each[..., None, :].expand(self.values.shape)

    @property
    def overlap_determined(self) -> Bool[Tensor, "*group k n n"] | None:
        """Return which overlaps compare determined subspaces; only the gap behind the top K counts; None if unknown."""
        if self.subspace_uncertainty is None or self.basis_subspace_uncertainty is None:
            return None
        rows, columns = (each <= DETERMINED for each in (self.subspace_uncertainty, self.basis_subspace_uncertainty))
        return rows[..., None] & columns[..., None, :]

    def mean(self, quantity: Quantity = "values", *, determined: bool = False) -> Float[Tensor, "*group k"]:
        """Mean over the ordered pairs of different members; NaN where there is none.

        The tensor displays itself with its labels, and ``to_series()`` returns them.

        Args:
            quantity: what is averaged.
            determined: leave out pairs whose number the Jacobians do not determine (``values_determined``; for the
                overlaps ``overlap_determined``). Compare with the mean of all pairs to see whether they matter.

        Raises:
            ArgumentError: an unknown quantity, or ``determined`` of a result that does not record it (version 0.1).
        """
        matrix = self._pairs(quantity)
        if determined:
            marks = self.overlap_determined if quantity.startswith("overlap") else self.values_determined
            if marks is None:
                raise ArgumentError("determined", True, "False for a result of version 0.1, which does not record it")
            matrix = torch.where(marks, matrix, torch.nan)
        pairs = matrix[..., self._compared()]
        return labelled(pairs.nanmean(-1) if determined else pairs.mean(-1), quantity, self._group_coords())

    def _group_coords(self) -> dict[str, Sequence[Any]]:
        """Return the labels of the axes before the matrices."""
        coords = self._coords()
        return {axis: coords[axis] for axis in self._axes["values"][:-2]}

    def _compared(self) -> Bool[Tensor, "n n"]:
        """Return the pairs over which means run."""
        return ~torch.eye(self.values.shape[-1], dtype=torch.bool)

    def test(
        self,
        *,
        blocks: Mapping[str, Sequence[int]] | None = None,
        draws: int = 999,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> CouplingTest:
        """Test whether the mean excess is more than independent random bases give, by random rotations.

        The null hypothesis is that the bases of the members (layers, tokens or heads) are independent: each draw
        rotates each member's bases at random, one rotation for all pairs that share them. It holds for layers with
        fresh weights, and not for what shares weights: the tokens of a layer, the contexts of a token.

        Tested are the means over all pairs, over the pairs at each distance (in the order of the layers or positions
        measured, as in ``profile``), and over blocks of members. Choose blocks before you look at the numbers: the
        p-values are not corrected for their number. Each group (sublayer, token) is tested by itself.

        Args:
            blocks: members by name, such as ``{"early": range(8), "late": range(22, 30)}``: the pairs within each
                block, and between each two.
            draws: number of draws, 39 or more. The least possible p-value is 2 / (draws + 1).
            confidence: level of the intervals, between 0 and 1.
            seed: seed of the draws.

        Returns:
            ``CouplingTest``: mean excess, p-value and interval of each group and set of pairs.

        Raises:
            ArgumentError: an argument out of range, an unknown member of a block, or a block without a pair.

        Example:
            >>> coupling.test().p  # doctest: +SKIP
        """
        check_int("draws", draws, 39, note="fewer cannot show p <= 0.05")
        check_confidence(confidence)
        axes = self._axes["values"][:-2]
        coords = self._coords()
        sets = {**self._sets(), **self._between(blocks or {})}
        started = time.perf_counter()
        drawn = Drawn(
            self.singular_values,
            self.frobenius,
            self.null,
            torch.full_like(self.null[..., 0, :, :], self.d_model) if self.null_width is None else self.null_width,
            self._shared(),
            self.d_model,
            self.ks,
            self.normalizer,
            self.bases,
            self.absolute,
        )
        fields = rotation_test(self.excess, drawn, sets, draws, confidence, seed)
        return CouplingTest(
            provenance=replace(
                self.provenance,
                settings={**self.provenance.settings, "draws": draws, "seed": seed},
                seconds=time.perf_counter() - started,
            ),
            **fields,
            draws=draws,
            confidence=confidence,
            axes=(*axes, "pairs"),
            labels=(*(tuple(coords[axis]) for axis in axes), tuple(sets)),
        )

    def _sets(self) -> dict[str, Bool[Tensor, "n n"]]:
        """Return the pairs over which a mean is tested, by name."""
        return {"all": self._compared()}

    def _between(self, blocks: Mapping[str, Sequence[int]]) -> dict[str, Bool[Tensor, "n n"]]:
        """Return the pairs of different members within each block, and between each two.

        Raises:
            ArgumentError: an unknown member, or a block without a pair.
        """
        axis = self._axes["values"][-2]
        members = list(self._coords()[axis])
        within = {}
        for name, block in blocks.items():
            if unknown := [one for one in block if one not in members]:
                raise ArgumentError("blocks", unknown[0], f"of the {axis}s measured, in block {name!r}: {members}")
            within[name] = torch.tensor([one in block for one in members])
        sets = {name: inside[:, None] & inside for name, inside in within.items()}
        for (one, first), (other, second) in combinations(within.items(), 2):
            sets[f"{one} with {other}"] = (first[:, None] & second) | (second[:, None] & first)
        sets = {name: pairs & self._compared() for name, pairs in sets.items()}
        if empty := [name for name, pairs in sets.items() if not pairs.any()]:
            raise ArgumentError("blocks", empty[0], f"blocks with two or more different {axis}s")
        return sets

    def _shared(self) -> Bool[Tensor, "*group"]:
        """Return in which groups the rows are also the columns."""
        return torch.ones(self.values.shape[:-3], dtype=torch.bool)

    def _pairs(self, quantity: str) -> Tensor:
        if quantity not in (allowed := get_args(Quantity)):
            raise ArgumentError("quantity", quantity, f"one of {', '.join(allowed)}")
        if (matrix := getattr(self, quantity)) is None:
            raise ArgumentError("quantity", quantity, "another one for a result of version 0.1, which does not have it")
        return matrix

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
        means = torch.stack(both, dim=-1) if both else matrix.new_zeros(*matrix.shape[:-2], 0)
        return labelled(means, quantity, {**self._group_coords(), "distance": range(1, len(both) + 1)})

    def _sets(self) -> dict[str, Bool[Tensor, "n n"]]:
        place = torch.arange(self.values.shape[-1])
        apart = (place[:, None] - place).abs()
        return {**super()._sets(), **{f"distance {step}": apart == step for step in range(1, len(place))}}


@dataclass(frozen=True, repr=False, eq=False)
class WithinLayers(OrderedCoupling):
    """Coupling of positions, by the layer whose Jacobians are compared and the layer that gives the bases.

    Attributes:
        positions: the positions compared.
        tokens: their text.
        layers: the layers whose Jacobians are compared.
        basis_layers: for each of these layers, the layer that gives the bases; the layers themselves by default.
    """

    positions: tuple[int, ...] = field(kw_only=True)
    tokens: tuple[str, ...] = field(kw_only=True)
    layers: tuple[int, ...] = field(kw_only=True)
    basis_layers: tuple[int, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        """Take the layers themselves where none are named, as in files of version 0.1."""
        object.__setattr__(self, "basis_layers", self.basis_layers or self.layers)

    def _labels(self) -> dict[str, Sequence[Any]]:
        return {"layer": self.layers, "pos": self.positions, "basis_pos": self.positions}

    def _shared(self) -> Bool[Tensor, "sublayer layer"]:
        same = torch.tensor([layer == basis for layer, basis in zip(self.layers, self.basis_layers, strict=True)])
        return same.expand(len(self.sublayers), -1)

    def _across(self) -> str:
        """Say where the bases come from, if that is another layer."""
        if self.layers == self.basis_layers:
            return ""
        named = sorted({*self.basis_layers})
        return f", bases of layer{'s' if len(named) > 1 else ''} {', '.join(map(str, named))}"


@dataclass(frozen=True)
class Wanted(Generic[KindT_co]):
    """A result that is to be measured.

    Attributes:
        kind: the kind of result.
        sublayers: what is measured of each layer.
        groups: the Jacobians to compare, in the order of the result's axes behind the sublayer.
        chosen: what was chosen, for the provenance.
        labels: the kind's own fields.
    """

    kind: type[KindT_co]
    sublayers: tuple[str, ...]
    groups: Sequence[Group]
    chosen: Mapping[str, Any]
    labels: Mapping[str, Any]


@measured
def measure(
    trace: Trace, several: Sequence[Wanted[CouplingT]], options: Options, progress: bool | None
) -> list[CouplingT]:
    """Compare the Jacobians of each group and make results of them.

    Several results share all that they need of a layer: its runs, its checks, its Jacobians.

    Args:
        trace: a trace of the model.
        several: the results.
        options: how Jacobians are compared.
        progress: show a progress bar; None decides as ``ticking`` does.

    Raises:
        ArgumentError: K above the rank of a Jacobian.
        InsufficientMemoryError: more memory is needed than is free; nothing was begun.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Warns:
        UserWarning: singular values lie so close together that their vectors, or the subspace of the top K, are not
            determined; the warning names the layers.
    """
    started = time.perf_counter()
    sublayers = tuple(dict.fromkeys(name for wanted in several for name in wanted.sublayers))
    groups = [group for wanted in several for group in wanted.groups]
    schedule = make_schedule(Comparison.of(trace, sublayers, groups, options))
    pairs = {(place.src, place.dest) for group in groups for place in group.places}
    jacobians = JacobianEngine(trace, options.engine, pairs, schedule.forms)
    cells = compare_groups(jacobians, schedule, progress)
    seconds = time.perf_counter() - started
    results: list[CouplingT] = []
    for wanted in several:  # no comprehension: it is a frame of its own before Python 3.12, and warnings count frames
        results.append(_result(wanted, trace, cells, options, jacobians, seconds))
    return results


def _result(
    wanted: Wanted[CouplingT],
    trace: Trace,
    cells: Mapping[Group, Cell],
    options: Options,
    jacobians: JacobianEngine,
    seconds: float,
) -> CouplingT:
    """Make a result of what was measured of its groups; warn of what is not determined."""
    sublayers, mine = wanted.sublayers, [cells[group] for group in wanted.groups]
    # a group of each layer lies on that layer's device, so they meet on the CPU
    fields = {
        field: torch.stack([torch.stack([cell[name][field].cpu() for cell in mine]) for name in sublayers])
        for field in mine[0][sublayers[0]]
    }
    _warn_of_undetermined(fields, sublayers, wanted.groups)
    if "sublayer" not in wanted.kind._axes["values"]:
        fields = {name: tensor[0] for name, tensor in fields.items()}
    places = {(place.layer, place.src, place.dest) for group in wanted.groups for place in group.places}
    settings = {**wanted.chosen, "sublayers": list(sublayers), **options.settings()}
    return wanted.kind(
        provenance=trace.provenance(settings=settings, seconds=seconds, engine=jacobians.used_at(sublayers, places)),
        **fields,
        overlap_null=torch.tensor(options.k, dtype=torch.float64) / trace.d_model,
        sublayers=sublayers,
        ks=options.k,
        normalizer=options.normalizer,
        bases=options.bases,
        absolute=options.absolute,
        **wanted.labels,
    )


def _warn_of_undetermined(fields: Mapping[str, Tensor], sublayers: Sequence[str], groups: Sequence[Group]) -> None:
    """Warn of singular vectors and subspaces that are not determined; name the layers, and the tokens if few."""
    vectors = fields["uncertainty"] > DETERMINED  # [sublayer, group, column, rank]
    rows, columns = ((fields[f"{of}subspace_uncertainty"] > DETERMINED).any(-2) for of in ("", "basis_"))
    concerned = {
        (index, getattr(groups[group], side)[at])
        for undetermined, side in ((vectors.any(-1) | columns, "columns"), (rows, "rows"))
        for index, group, at in undetermined.nonzero().tolist()
    }
    if not concerned:
        return
    modules, places = ({pair[part] for pair in concerned} for part in (0, 1))
    names = ", ".join(name for index, name in enumerate(sublayers) if index in modules)
    where = _few("layer", sorted({place.layer for place in places}))
    tokens = sorted({pos for place in places for pos in (place.src, place.dest)})
    if len(tokens) <= FEW_TOKENS:
        where += f" at {_few('token', tokens)}"
    vectors_text = (
        f"{int(vectors.sum())} of {vectors.numel()} pairs of singular vectors are not determined, because singular "
        f"values nearly coincide: {names} of {where}. Coupling in these bases depends on the solver and on rounding, "
        "and is marked (`determined`, `values_determined`)"
    )
    overlaps_text = "subspace overlaps where singular values at K and K + 1 nearly coincide (`overlap_determined`)"
    if not vectors.any():
        text = f"the solver and rounding move {overlaps_text}: {names} of {where}"
    elif rows.any() or columns.any():
        text = f"{vectors_text}; so do {overlaps_text}"
    else:
        text = f"{vectors_text}; subspace overlaps are determined"
    warnings.warn(text, stacklevel=6)


def _few(noun: str, numbers: Sequence[int]) -> str:
    """Name one or several layers or tokens."""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
