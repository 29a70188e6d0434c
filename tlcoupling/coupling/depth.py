"""Depth-wise coupling: one token, Jacobians of different layers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling.metric import Bases, Normalizer, coupling, null_coupling, subspace_overlap
from tlcoupling.coupling.spectra import Spectrum, matrices_fit, matrix_spectrum, prefers_products, product_spectrum
from tlcoupling.errors import ArgumentError
from tlcoupling.jacobian.engine import EngineName, JacobianEngine, check_index, check_sublayers
from tlcoupling.results import Result, off_diagonal_mean
from tlcoupling.svd.auto import SolverName
from tlcoupling.trace import Trace

KSpec = int | float | Sequence[int | float]

_PAIRS = ("sublayer", "pos", "k", "layer", "basis_layer")


@dataclass(frozen=True, repr=False, eq=False)
class DepthCoupling(Result):
    """Coupling of the Jacobians of all pairs of layers, at one or more tokens.

    In each matrix the row is the layer that gives the Jacobian, the column the layer that gives the bases; it is not
    symmetric, and its diagonal is 1 for the ``"uv"`` bases.

    Attributes:
        values: coupling c_K, at most 1. ``[sublayer, pos, k, layer, basis_layer]``.
        null: what independent random bases would give, c_null; it depends on the row alone. Same axes.
        overlap_u: overlap of the spaces that two layers write, from 0 to 1; its null is ``overlap_null``. Same axes.
        overlap_v: overlap of the spaces that two layers read. Same axes.
        overlap_null: K / d_model. ``[k]``.
        singular_values: the top singular values. ``[sublayer, pos, layer, rank]``.
        frobenius: ||J||_F of each Jacobian. ``[sublayer, pos, layer]``.
        frobenius_error: relative standard error of that where the matrix was too large to form; 0 where it is exact.
            Same axes.
        residual: the worst residual of each truncated SVD, relative to s_1. ``[sublayer, pos, layer]``.
        sublayers: ``block``, ``attn``, ``mlp``.
        positions: the tokens' positions.
        tokens: their text.
        ks: number of singular vectors compared.
        layers: the layers compared.
        normalizer: ``"frobenius"`` or ``"trace"``.
        bases: ``"uv"`` or ``"vu"``.
        absolute: whether absolute values of U^T J V were taken.
    """

    values: Float[Tensor, "sublayer token k layer layer"]
    null: Float[Tensor, "sublayer token k layer layer"]
    overlap_u: Float[Tensor, "sublayer token k layer layer"]
    overlap_v: Float[Tensor, "sublayer token k layer layer"]
    overlap_null: Float[Tensor, " k"]
    singular_values: Float[Tensor, "sublayer token layer rank"]
    frobenius: Float[Tensor, "sublayer token layer"]
    frobenius_error: Float[Tensor, "sublayer token layer"]
    residual: Float[Tensor, "sublayer token layer"]
    sublayers: tuple[str, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    ks: tuple[int, ...]
    layers: tuple[int, ...]
    normalizer: str
    bases: str
    absolute: bool

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "values": _PAIRS,
        "null": _PAIRS,
        "overlap_u": _PAIRS,
        "overlap_v": _PAIRS,
        "overlap_null": ("k",),
        "singular_values": ("sublayer", "pos", "layer", "rank"),
        "frobenius": ("sublayer", "pos", "layer"),
        "frobenius_error": ("sublayer", "pos", "layer"),
        "residual": ("sublayer", "pos", "layer"),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {"excess": _PAIRS}

    def __repr__(self) -> str:
        """One line."""
        means = self.mean()
        shown = ", ".join(
            f"{name} {value:.4f} (null {null:.4f})"
            for name, value, null in zip(self.sublayers, means[:, 0, 0], self.mean("null")[:, 0, 0], strict=True)
        )
        return f"DepthCoupling({len(self.layers)} layers, {len(self.positions)} tokens, K={self.ks[0]}: {shown})"

    @property
    def excess(self) -> Float[Tensor, "sublayer token k layer layer"]:
        """Coupling above its null, c - c_null: the finding, free of what width alone gives."""
        return self.values - self.null

    def mean(
        self, quantity: Literal["values", "null", "excess", "overlap_u", "overlap_v"] = "values"
    ) -> Float[Tensor, "sublayer token k"]:
        """Mean over the ordered pairs of different layers; NaN for a model of one layer.

        Raises:
            ArgumentError: an unknown quantity.
        """
        return off_diagonal_mean(self._pairs(quantity))

    def profile(
        self, quantity: Literal["values", "null", "excess", "overlap_u", "overlap_v"] = "values"
    ) -> Float[Tensor, "sublayer token k distance"]:
        """Mean over the pairs at each distance |l - l'| = 1, 2, ... in ``layers``.

        A band matrix has the same profile at every depth, while the mean over all its pairs moves with depth alone.

        Raises:
            ArgumentError: an unknown quantity.
        """
        matrix = self._pairs(quantity)
        both = [
            torch.cat([matrix.diagonal(step, -2, -1), matrix.diagonal(-step, -2, -1)], dim=-1).mean(-1)
            for step in range(1, len(self.layers))
        ]
        return torch.stack(both, dim=-1) if both else matrix.new_zeros(*matrix.shape[:3], 0)

    def _pairs(self, quantity: str) -> Tensor:
        allowed = ("values", "null", "excess", "overlap_u", "overlap_v")
        if quantity not in allowed:
            raise ArgumentError("quantity", quantity, f"one of {', '.join(allowed)}")
        return getattr(self, quantity)

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "sublayer": self.sublayers,
            "pos": self.positions,
            "k": self.ks,
            "layer": self.layers,
            "basis_layer": self.layers,
            "rank": range(self.singular_values.shape[-1]),
        }


def depth_coupling(
    trace: Trace,
    k: KSpec = 10,
    *,
    sublayers: str | Sequence[str] | None = None,
    tokens: int | Sequence[int] | Literal["all"] = -1,
    layers: Sequence[int] | None = None,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    absolute: bool = True,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
    progress: bool = False,
) -> DepthCoupling:
    r"""How far the top singular vectors of a token's Jacobians agree across layers.

    c_K(J1, J2) = 1 - || abs(U2^T J1 V2) - S1 ||_F / norm(S1) for all ordered pairs of layers, with the null that
    independent random bases would give. Source: arXiv 2407.07810, section 3.

    Args:
        trace: a trace of the model.
        k: how many singular vectors to compare: an int, a fraction of d_model (0 < k < 1), or several of these.
        sublayers: ``"block"``, ``"attn"``, ``"mlp"``, or several; by default all that the model has.
        tokens: a position, several, or ``"all"``.
        layers: block indices; by default all.
        normalizer: ``"frobenius"`` divides by ||S1||_F, ``"trace"`` by the sum of S1. The trace normaliser moves with
            width alone: read it against its null.
        bases: ``"uv"`` as above; ``"vu"`` swaps U2 and V2: what one block writes, another reads.
        absolute: True as in the authors' code, False as in the paper's formula.
        engine: ``"auto"``, ``"analytic"`` or ``"autograd"``.
        solver: ``"auto"``, ``"dense"`` or ``"krylov"``.
        progress: show a progress bar.

    Returns:
        ``DepthCoupling``, all its matrices on the CPU.

    Raises:
        ArgumentError: an argument out of range (K above the rank of a Jacobian, a token or layer that is not there).
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> coupling = tlc.depth_coupling(trace, k=10)  # doctest: +SKIP
        >>> coupling.mean("excess")  # doctest: +SKIP
    """
    started = time.perf_counter()
    names = trace.sublayers if sublayers is None else (sublayers,) if isinstance(sublayers, str) else tuple(sublayers)
    check_sublayers(trace, names)
    ks = resolve_k(k, trace.d_model)
    positions = resolve_indices("tokens", tokens, trace.n_tokens)
    chosen = resolve_indices("layers", "all" if layers is None else layers, trace.n_layers)
    for argument, value, allowed in (
        ("normalizer", normalizer, get_args(Normalizer)),
        ("bases", bases, get_args(Bases)),
        ("solver", solver, get_args(SolverName)),
    ):
        if value not in allowed:
            raise ArgumentError(argument, value, f"one of {', '.join(allowed)}")
    jacobians = JacobianEngine(trace, engine)
    columns = []
    # asked once: what is kept meanwhile must not change the answer from layer to layer
    fits = matrices_fit(len(names) * len(chosen), trace.d_model, trace.resid.dtype, trace.resid.device)
    steps = _ticks(len(positions) * len(chosen) * len(names), progress)
    for pos in positions:
        spectra: dict[str, list[Spectrum]] = {name: [] for name in names}
        for layer, name in product(chosen, names):
            next(steps)
            make = partial(jacobians.operator, layer, name, pos, pos)
            operator = make()
            try:
                if fits and not prefers_products(operator, max(ks), len(chosen)):
                    spectrum = matrix_spectrum(operator, max(ks), solver)
                else:
                    spectrum = product_spectrum(operator, make, max(ks), solver)
                spectra[name].append(spectrum)
            except ArgumentError as error:
                where = f"{error.allowed} ({name} of layer {layer}, token {pos})"
                raise ArgumentError(error.name, error.value, where) from error
        columns.append([_compare(spectra[name], ks, normalizer, bases, absolute) for name in names])
    next(steps, None)
    fields = {
        name: torch.stack([torch.stack([cell[name] for cell in cells]) for cells in columns], dim=1).cpu()
        for name in columns[0][0]
    }
    settings = {
        "k": list(ks),
        "tokens": list(positions),
        "sublayers": list(names),
        "layers": list(chosen),
        "normalizer": normalizer,
        "bases": bases,
        "absolute": absolute,
        "engine": engine,
        "solver": solver,
    }
    seconds = time.perf_counter() - started
    return DepthCoupling(
        provenance=trace.provenance(settings=settings, seconds=seconds, engine=jacobians.used),
        **fields,
        overlap_null=torch.tensor(ks, dtype=torch.float64) / trace.d_model,
        sublayers=names,
        positions=positions,
        tokens=tuple(trace.str_tokens[pos] for pos in positions),
        ks=ks,
        layers=chosen,
        normalizer=normalizer,
        bases=bases,
        absolute=absolute,
    )


def _ticks(total: int, progress: bool) -> Iterator[int]:
    """One item per step of the work, with a progress bar that moves as they are taken."""
    if not progress:
        return iter(range(total))
    from tqdm.auto import tqdm

    return iter(tqdm(range(total), desc="coupling", leave=False))


def _compare(
    spectra: Sequence[Spectrum],
    ks: Iterable[int],
    normalizer: Normalizer,
    bases: Bases,
    absolute: bool,
) -> dict[str, Tensor]:
    """All that is measured on the Jacobians of one token and sublayer, by field name."""
    device = spectra[0].frobenius.device
    u, s, v = (torch.stack([getattr(one.triplets, name).to(device) for one in spectra]) for name in "usv")
    frobenius = torch.stack([spectrum.frobenius.to(device) for spectrum in spectra])
    layers, width, rank = u.shape
    left, right = (u, v) if bases == "uv" else (v, u)
    all_right = right.transpose(0, 1).reshape(width, -1)
    projected = torch.stack(
        [
            left.mT
            @ one.multiply(all_right.to(one.triplets.u.device)).to(device).unflatten(1, (layers, rank)).transpose(0, 1)
            for one in spectra
        ]
    )  # [layer, basis_layer, K, K]
    found: dict[str, list[Tensor]] = {name: [] for name in ("values", "null", "overlap_u", "overlap_v")}
    for k in ks:
        top = s[:, :k]
        found["values"].append(coupling(projected[..., :k, :k], top[:, None], normalizer, absolute))
        null = null_coupling(top, frobenius, width, normalizer, absolute)
        found["null"].append(null[:, None].expand(layers, layers))
        found["overlap_u"].append(subspace_overlap(u[:, None, :, :k], u[None, :, :, :k]))
        found["overlap_v"].append(subspace_overlap(v[:, None, :, :k], v[None, :, :, :k]))
    residual = torch.stack([spectrum.triplets.residual.max().to(device) for spectrum in spectra])
    return {
        **{name: torch.stack(cells) for name, cells in found.items()},
        "singular_values": s,
        "frobenius": frobenius,
        "frobenius_error": torch.stack([spectrum.frobenius_error.to(device) for spectrum in spectra]),
        "residual": residual,
    }


def resolve_k(k: KSpec, d_model: int) -> tuple[int, ...]:
    """K as ints: fractions of d_model are rounded down, to at least 1.

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
            raise ArgumentError("k", item, f"an int from 1 to d_model = {d_model}, or a fraction of it between 0 and 1")
    if not resolved:
        raise ArgumentError("k", k, "at least one number")
    return tuple(resolved)


def resolve_indices(name: str, value: int | Sequence[int] | Literal["all"], size: int) -> tuple[int, ...]:
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
