"""Projected Jacobians: one layer's Jacobian in another's bases, the matrices that coupling reduces to a number."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import Indices, check_index, resolve_indices, resolve_one_k, resolve_sublayers
from tlcoupling.coupling.depth import depth_groups
from tlcoupling.coupling.metric import Bases, coupling
from tlcoupling.coupling.null import null_coupling
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.pairs import decompose, project
from tlcoupling.coupling.schedule import Comparison, make_schedule
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.svd import SolverName
from tlcoupling.linalg.triplets import Triplets
from tlcoupling.results.base import Result


@dataclass(frozen=True, repr=False, eq=False)
class ProjectedJacobians(Result):
    r"""U2^T J1 V2 of all ordered pairs of some layers, at one token.

    For a layer with itself this is the diagonal matrix of singular values. Layers with the same top singular vectors
    give a diagonal matrix too. Unrelated bases give nearly normal entries of standard deviation ||J1||_F / d_model.
    Singular vectors are defined up to the sign of a pair (u, v): signs off the diagonal mean nothing, signs on it do.

    Attributes:
        values: U2^T J1 V2, ``[sublayer, layer, basis_layer, left, right]``. ``layer`` gives J1, ``basis_layer`` the
            bases.
        singular_values: the top K of each J1, ``[sublayer, layer, rank]``.
        frobenius: ||J1||_F, ``[sublayer, layer]``.
        sublayers: ``block``, ``attn``, ``mlp``.
        layers: the layers.
        position: the token's position.
        token: its text.
        d_model: the width.
        bases: ``"uv"``, or ``"vu"``: V2^T J1 U2.
    """

    values: Float[Tensor, "sublayer layer layer K K"]
    singular_values: Float[Tensor, "sublayer layer K"]
    frobenius: Float[Tensor, "sublayer layer"]
    sublayers: tuple[str, ...]
    layers: tuple[int, ...]
    position: int
    token: str
    d_model: int
    bases: str

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "values": ("sublayer", "layer", "basis_layer", "left", "right"),
        "singular_values": ("sublayer", "layer", "rank"),
        "frobenius": ("sublayer", "layer"),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "coupling": ("sublayer", "layer", "basis_layer"),
        "null": ("sublayer", "layer"),
        "null_entry": ("sublayer", "layer"),
    }

    def __repr__(self) -> str:
        """One line."""
        layers = ", ".join(map(str, self.layers))
        return f"ProjectedJacobians({', '.join(self.sublayers)} of layers {layers}, K={self.singular_values.shape[-1]})"

    @property
    def coupling(self) -> Float[Tensor, "sublayer layer layer"]:
        """Return c_K of each pair with ``depth_coupling``'s defaults: Frobenius normaliser, absolute values."""
        return coupling(self.values, self.singular_values[:, :, None])

    @property
    def null(self) -> Float[Tensor, "sublayer layer"]:
        """Return the coupling expected for independent random bases of the whole width; it depends on J1 alone."""
        return null_coupling(self.singular_values, self.frobenius, self.d_model)

    @property
    def null_entry(self) -> Float[Tensor, "sublayer layer"]:
        """Return the expected |entry| under independent random bases, sqrt(2 / pi) ||J1||_F / d_model."""
        return math.sqrt(2 / math.pi) * self.frobenius / self.d_model

    def _coords(self) -> dict[str, Sequence[Any]]:
        rank = range(self.singular_values.shape[-1])
        layers = {"layer": self.layers, "basis_layer": self.layers}
        return {"sublayer": self.sublayers, **layers, "left": rank, "right": rank, "rank": rank}


@measured
def projected_jacobians(
    trace: Trace,
    layers: Indices,
    k: int | float = 10,
    *,
    sublayers: str | Sequence[str] | None = None,
    token: int = -1,
    bases: Bases = "uv",
    engine: EngineName = "auto",
    solver: SolverName = "auto",
) -> ProjectedJacobians:
    r"""Return U2^T J1 V2 of all ordered pairs of some layers, the matrices from which ``depth_coupling`` computes c_K.

    Source: arXiv 2407.07810, section 3 (the matrices in its figures).

    Args:
        trace: a trace of the model.
        layers: block indices.
        k: number of singular vectors, or a fraction of d_model.
        sublayers: as in ``depth_coupling``.
        token: a position.
        bases: as in ``depth_coupling``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.

    Raises:
        ArgumentError: an argument out of range (K above the rank of a Jacobian, an unknown token or layer).
        InsufficientMemoryError: more memory is needed than is free. Raised before any work starts.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> projected = tlc.projected_jacobians(trace, layers=[8, 12, 16], k=10)  # doctest: +SKIP
        >>> tlc.viz.figures.projected_jacobians(projected)  # doctest: +SKIP
    """
    return projected_with_bases(trace, layers, k, sublayers, token, bases, engine, solver)[0]


def projected_with_bases(
    trace: Trace,
    layers: Indices,
    k: int | float,
    sublayers: str | Sequence[str] | None,
    token: int,
    bases: Bases,
    engine: EngineName,
    solver: SolverName,
) -> tuple[ProjectedJacobians, dict[tuple[str, int], Triplets]]:
    """Return ``projected_jacobians`` and the triplets behind them, by sublayer and layer."""
    require_trace(trace)
    started = time.perf_counter()
    names = resolve_sublayers(sublayers, trace.sublayers, trace.refusal)
    size = resolve_one_k("k", k, trace.d_model)
    options = Options.resolve(trace.d_model, size, "frobenius", bases, True, engine, solver)
    position = check_index("token", token, trace.n_tokens)
    chosen = resolve_indices("layers", layers, trace.n_layers)
    groups = depth_groups(chosen, [position])
    schedule = make_schedule(Comparison.of(trace, names, groups, options))
    jacobians = JacobianEngine(trace, engine, {(position, position)}, schedule.forms)
    spectra = decompose(jacobians, schedule, [(name, place) for place in sorted(groups[0].places) for name in names])
    values, s, frobenius = [], [], []
    for name in names:
        rows = [spectra[name, place] for place in groups[0].rows]
        device = rows[0].frobenius.device
        u, v = (torch.stack([getattr(one.triplets, side).to(device) for one in rows]) for side in "uv")
        left, right = (u, v) if bases == "uv" else (v, u)
        all_right = rearrange(right, "column d i -> d (column i)")
        values.append(torch.stack([project(one, left, all_right) for one in rows]).cpu())
        s.append(torch.stack([one.triplets.s.cpu() for one in rows]))
        frobenius.append(torch.stack([one.frobenius.cpu() for one in rows]))
    settings = {"layers": list(chosen), "token": position, "sublayers": list(names), **options.settings()}
    found = ProjectedJacobians(
        provenance=trace.provenance(settings=settings, seconds=time.perf_counter() - started, engine=jacobians.used),
        values=torch.stack(values),
        singular_values=torch.stack(s),
        frobenius=torch.stack(frobenius),
        sublayers=names,
        layers=chosen,
        position=position,
        token=trace.str_tokens[position],
        d_model=trace.d_model,
        bases=bases,
    )
    return found, {(name, place.layer): one.triplets for (name, place), one in spectra.items()}
