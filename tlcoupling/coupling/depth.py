"""Depth-wise coupling: one token, Jacobians of different layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tlcoupling.arguments import Indices, KSpec, resolve_indices, resolve_sublayers
from tlcoupling.coupling.groups import Group, Place
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.result import OrderedCoupling, Wanted, measure
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName
from tlcoupling.text import counted


@dataclass(frozen=True, repr=False, eq=False)
class DepthCoupling(OrderedCoupling, group=("sublayer", "pos"), member="layer"):
    """Coupling of the Jacobians of all pairs of layers, at one or more tokens.

    ``values``, ``null``, ``null_std``, ``excess``, ``z`` and the overlaps are
    ``[sublayer, pos, k, layer, basis_layer]``. ``Coupling`` explains them.

    Attributes:
        positions: the tokens' positions.
        tokens: their text.
        layers: the layers compared.
    """

    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]

    def _described(self) -> str:
        return f"{counted(len(self.layers), 'layer')}, {counted(len(self.positions), 'token')}"

    def _labels(self) -> dict[str, Sequence[Any]]:
        return {"pos": self.positions, "layer": self.layers, "basis_layer": self.layers}


def depth_coupling(
    trace: Trace,
    k: KSpec = 10,
    *,
    sublayers: str | Sequence[str] | None = None,
    tokens: Indices = -1,
    layers: Indices | None = None,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    absolute: bool = True,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
    progress: bool | None = None,
) -> DepthCoupling:
    r"""Measure how far the top singular vectors of a token's Jacobians agree across layers.

    c_K(J1, J2) = 1 - || abs(U2^T J1 V2) - S1 ||_F / norm(S1) for all ordered pairs of layers, with the null of
    independent random bases. Source: arXiv 2407.07810, section 3.

    Args:
        trace: a trace of the model.
        k: number of singular vectors to compare: an int, a fraction of d_model (0 < k < 1), or several of these.
        sublayers: ``"block"``, ``"attn"``, ``"mlp"``, or several; by default all that the model has.
        tokens: a position, several, or ``"all"``.
        layers: block indices; by default all.
        normalizer: ``"frobenius"`` divides by ||S1||_F, ``"trace"`` by the sum of S1. The trace version also changes
            with the width, so compare it with its null.
        bases: ``"uv"`` as above. ``"vu"`` swaps U2 and V2: does one block read what another writes?
        absolute: True as in the authors' code, False as in the paper's formula.
        engine: ``"auto"``, ``"analytic"`` or ``"autograd"``.
        solver: ``"auto"``, ``"dense"`` or ``"krylov"``.
        progress: show a progress bar; by default on a terminal or in a notebook, after two seconds.

    Returns:
        ``DepthCoupling``, all its tensors on the CPU.

    Raises:
        ArgumentError: an argument out of range (K above the rank of a Jacobian, an unknown token or layer).
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> coupling = tlc.depth_coupling(trace, k=10)  # doctest: +SKIP
        >>> coupling.mean("excess")  # doctest: +SKIP
    """
    require_trace(trace)
    names = resolve_sublayers(sublayers, trace.sublayers, trace.refusal)
    options = Options.resolve(trace.d_model, k, normalizer, bases, absolute, engine, solver)
    positions = resolve_indices("tokens", tokens, trace.n_tokens)
    chosen = resolve_indices("layers", layers, trace.n_layers)
    wanted = Wanted(
        DepthCoupling,
        names,
        depth_groups(chosen, positions),
        {"tokens": list(positions), "layers": list(chosen)},
        {
            "positions": positions,
            "tokens": tuple(trace.str_tokens[pos] for pos in positions),
            "layers": chosen,
        },
    )
    return measure(trace, [wanted], options, progress)[0]


def depth_groups(layers: Sequence[int], positions: Sequence[int]) -> list[Group]:
    """Return the groups to compare: at each position, the Jacobians of all layers."""
    return [Group.of([Place(layer, pos, pos) for layer in layers]) for pos in positions]
