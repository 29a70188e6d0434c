"""Context coupling: one layer, Jacobians from one token to several, or from several to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tlcoupling.arguments import Indices, KSpec, check_index, check_name, resolve_indices, resolve_sublayers
from tlcoupling.coupling.groups import Group, Place
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.result import OrderedCoupling, measure
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName

Fixed = Literal["src", "dest"]


@dataclass(frozen=True, repr=False, eq=False)
class ContextCoupling(OrderedCoupling, group=("sublayer", "layer"), member="pos"):
    """Coupling of the Jacobians from one token to all later ones, or from all earlier tokens to one, in each layer.

    ``values``, ``null``, ``null_std``, ``excess``, ``z`` and the overlaps are
    ``[sublayer, layer, k, pos, basis_pos]``, where pos is the end that is not fixed; see ``Coupling`` for what they
    are.

    Attributes:
        fixed: ``"src"`` or ``"dest"``.
        position: the fixed position.
        positions: the positions at the other end.
        tokens: their text.
        layers: the layers measured.
    """

    fixed: str
    position: int
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]

    def _described(self) -> str:
        way = "from" if self.fixed == "src" else "to"
        return f"{len(self.layers)} layers, {len(self.positions)} pairs {way} position {self.position}"

    def _labels(self) -> dict[str, Sequence[Any]]:
        return {"layer": self.layers, "pos": self.positions, "basis_pos": self.positions}


def context_coupling(
    trace: Trace,
    fixed: Fixed = "src",
    position: int | None = None,
    k: KSpec = 10,
    *,
    sublayers: str | Sequence[str] | None = None,
    tokens: Indices = "all",
    layers: Indices | None = None,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    absolute: bool = True,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
    progress: bool = False,
) -> ContextCoupling:
    r"""How far the top singular vectors of a layer's Jacobians agree across the context of a token.

    Fixed src s: c_K(J[l, s->t], J[l, s->t']) for t, t' >= s. Fixed dest t: c_K(J[l, s->t], J[l, s'->t]) for s, s' <= t.
    J[l, s->t] is that of the block less the identity where s = t, and that of the block itself where s < t, since a
    position reaches a later one without a skip. Source: arXiv 2407.07810, section 3.

    All pairs of a layer share its weights, so they agree in an untrained model too, as in ``token_coupling``: read the
    excess against that of a random model.

    Args:
        trace: a trace of the model.
        fixed: which end is held, ``"src"`` or ``"dest"``.
        position: where it is held; by default the first token for ``"src"``, the last for ``"dest"``, which see all.
        k: as in ``depth_coupling``; at most the rank of each Jacobian, which attention between two tokens limits to
            the number of heads times their width.
        sublayers: ``"block"``, ``"attn"`` or both (the default). An MLP does not reach another position.
        tokens: positions at the other end, ``"all"`` that attention reaches, or several of them.
        layers: block indices; by default all.
        normalizer: as in ``depth_coupling``.
        bases: as in ``depth_coupling``.
        absolute: as in ``depth_coupling``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.
        progress: show a progress bar.

    Returns:
        ``ContextCoupling``, all its matrices on the CPU.

    Raises:
        ArgumentError: an argument out of range; a context of fewer than two tokens, which has no pair to compare; K
            above the rank of a Jacobian (0 where a local attention window ends).
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> coupling = tlc.context_coupling(trace, "dest", -1)  # doctest: +SKIP
    """
    check_name("fixed", fixed, get_args(Fixed))
    names = ("block", "attn") if sublayers is None else resolve_sublayers(sublayers, trace.sublayers)
    if "mlp" in names:
        raise ArgumentError("sublayers", "mlp", "block, attn: an MLP does not reach another position")
    options = Options.resolve(trace.d_model, k, normalizer, bases, absolute, engine, solver)
    default = 0 if fixed == "src" else -1
    held = check_index("position", default if position is None else position, trace.n_tokens)
    positions = _reached(trace, fixed, held, tokens)
    chosen = resolve_indices("layers", layers, trace.n_layers)
    return measure(
        ContextCoupling,
        trace,
        names,
        context_groups(chosen, fixed, held, positions),
        options,
        {"fixed": fixed, "position": held, "tokens": list(positions), "layers": list(chosen)},
        progress,
        fixed=fixed,
        position=held,
        positions=positions,
        tokens=tuple(trace.str_tokens[pos] for pos in positions),
        layers=chosen,
    )


def context_groups(layers: Sequence[int], fixed: Fixed, held: int, positions: Sequence[int]) -> list[Group]:
    """What is compared: in each layer, the Jacobians from one position to all others, or from all to one."""
    return [
        Group.of([Place(layer, pos, held) if fixed == "src" else Place(layer, held, pos) for pos in positions])
        for layer in layers
    ]


def _reached(trace: Trace, fixed: Fixed, held: int, tokens: Indices) -> tuple[int, ...]:
    """The positions at the other end: those asked for, all of them within reach of the fixed one.

    Raises:
        ArgumentError: one out of reach, or fewer than two.
    """
    reach = range(held, trace.n_tokens) if fixed == "src" else range(held + 1)
    if len(reach) < 2:
        which = "only itself after" if fixed == "src" else "only itself before"
        raise ArgumentError(
            "position", held, f"a {fixed} with two tokens or more to compare; {which} this one of {trace.n_tokens}"
        )
    positions = (
        tuple(reach)
        if isinstance(tokens, str) and tokens == "all"
        else resolve_indices("tokens", tokens, trace.n_tokens)
    )
    outside = [pos for pos in positions if pos not in reach]
    if outside:
        raise ArgumentError(
            "tokens",
            outside[0],
            f"positions from {reach[0]} to {reach[-1]}, what {fixed}={held} reaches in causal attention",
        )
    if len(positions) < 2:
        raise ArgumentError("tokens", tokens, "two positions or more: a single pair (src, dest) compares with nothing")
    return positions
