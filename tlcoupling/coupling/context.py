"""Context coupling: one layer, Jacobians from one token to several, or from several to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tlcoupling.arguments import (
    Indices,
    KSpec,
    check_index,
    check_name,
    resolve_basis_layers,
    resolve_indices,
    resolve_sublayers,
)
from tlcoupling.coupling.groups import Group, groups_of_layers
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.result import Wanted, WithinLayers, measure
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.split import POSITIONWISE
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName
from tlcoupling.text import counted

Fixed = Literal["src", "dest"]


@dataclass(frozen=True, repr=False, eq=False)
class ContextCoupling(WithinLayers, group=("sublayer", "layer"), member="pos"):
    """Coupling of the Jacobians from one token to others, or from others to one, in each layer.

    ``values``, ``null``, ``null_std``, ``excess``, ``z`` and the overlaps are
    ``[sublayer, layer, k, pos, basis_pos]``, where pos is the end that varies. ``Coupling`` explains them.
    ``mean`` and ``profile`` leave out pairs of equal positions, also if the bases come from another layer.

    Attributes:
        fixed: ``"src"`` or ``"dest"``.
        position: the fixed position.
    """

    fixed: str
    position: int

    def _described(self) -> str:
        direction = "from" if self.fixed == "src" else "to"
        pairs = counted(len(self.positions), "pair")
        return f"{counted(len(self.layers), 'layer')}, {pairs} {direction} position {self.position}{self._across()}"


def context_coupling(
    trace: Trace,
    fixed: Fixed = "src",
    position: int | None = None,
    k: KSpec = 10,
    *,
    sublayers: str | Sequence[str] | None = None,
    tokens: Indices = "all",
    layers: Indices | None = None,
    basis_layers: Indices | None = None,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    absolute: bool = True,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
    progress: bool | None = None,
) -> ContextCoupling:
    r"""Measure how far the top singular vectors of a layer's Jacobians agree across the context of a token.

    Fixed src s: c_K(J[l, s->t], J[l', s->t']) for t, t' >= s. Fixed dest t: c_K(J[l, s->t], J[l', s'->t]) for
    s, s' <= t. By default l' = l. In a bidirectional model the other end may be any position.
    J[l, s->s] leaves out the identity of the skip connection. J[l, s->t] with s < t has none to leave out. Source:
    arXiv 2407.07810, section 3.

    All pairs of a layer share its weights, so they agree even in an untrained model, as in ``token_coupling``: compare
    the excess with that of a random model. Across layers (``basis_layers``) a random model has no excess.

    Args:
        trace: a trace of the model.
        fixed: the fixed end, ``"src"`` or ``"dest"``.
        position: the fixed position; by default the first token for ``"src"`` and the last for ``"dest"``.
        k: as in ``depth_coupling``. Attention between two tokens has a rank of at most heads times head width.
        sublayers: ``"block"``, ``"attn"`` (or ``"mixer"``) or both (the default). An MLP reaches no other position.
        tokens: positions at the other end: several, or ``"all"`` within reach of attention.
        layers: block indices; by default all.
        basis_layers: the layer l' that gives the bases, one for each layer or one for all; by default l itself.
        normalizer: as in ``depth_coupling``.
        bases: as in ``depth_coupling``.
        absolute: as in ``depth_coupling``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.
        progress: show a progress bar; by default on a terminal or in a notebook, after two seconds.

    Returns:
        ``ContextCoupling``, all its tensors on the CPU.

    Raises:
        ArgumentError: an argument out of range; fewer than two tokens within reach; K above the rank of a Jacobian
            (0 beyond a local attention window); another number of ``basis_layers`` than of layers.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> coupling = tlc.context_coupling(trace, "dest", -1)  # doctest: +SKIP
    """
    require_trace(trace)
    options = Options.resolve(trace.d_model, k, normalizer, bases, absolute, engine, solver)
    wanted = wanted_of_context(trace, fixed, position, sublayers, tokens, layers, basis_layers)
    return measure(trace, [wanted], options, progress)[0]


def wanted_of_context(
    trace: Trace,
    fixed: Fixed,
    position: int | None = None,
    sublayers: str | Sequence[str] | None = None,
    tokens: Indices = "all",
    layers: Indices | None = None,
    basis_layers: Indices | None = None,
) -> Wanted[ContextCoupling]:
    """Return what ``context_coupling`` measures, for arguments as it takes them.

    Raises:
        ArgumentError: one is out of range, or fewer than two tokens are within reach.
    """
    check_name("fixed", fixed, get_args(Fixed))
    reaching = tuple(name for name in trace.sublayers if name not in POSITIONWISE)
    names = resolve_sublayers(sublayers or reaching, trace.sublayers, trace.refusal)
    if apart := [name for name in names if name in POSITIONWISE]:
        raise ArgumentError("sublayers", apart[0], f"{', '.join(reaching)}: it does not reach another position")
    default = 0 if fixed == "src" else -1
    held = check_index("position", default if position is None else position, trace.n_tokens)
    positions = _reached(trace, fixed, held, tokens)
    chosen = resolve_indices("layers", layers, trace.n_layers)
    others = resolve_basis_layers(basis_layers, chosen, trace.n_layers)
    return Wanted(
        ContextCoupling,
        names,
        context_groups(chosen, others, fixed, held, positions),
        {
            "fixed": fixed,
            "position": held,
            "tokens": list(positions),
            "layers": list(chosen),
            "basis_layers": list(others),
        },
        {
            "fixed": fixed,
            "position": held,
            "positions": positions,
            "tokens": tuple(trace.str_tokens[pos] for pos in positions),
            "layers": chosen,
            "basis_layers": others,
        },
    )


def context_groups(
    layers: Sequence[int], basis_layers: Sequence[int], fixed: Fixed, held: int, positions: Sequence[int]
) -> list[Group]:
    """Return the groups to compare: in each layer, the Jacobians from or to one position, in a layer's bases."""
    pairs = [(held, pos) if fixed == "src" else (pos, held) for pos in positions]
    return groups_of_layers(layers, basis_layers, pairs)


def _reached(trace: Trace, fixed: Fixed, held: int, tokens: Indices) -> tuple[int, ...]:
    """Return the requested positions at the other end.

    Raises:
        ArgumentError: one is out of reach of the fixed position, or there are fewer than two.
    """
    reach = range(trace.n_tokens)
    if trace.causal:
        reach = reach[held:] if fixed == "src" else reach[: held + 1]
    if len(reach) < 2:
        allowed = f"a {fixed} with two or more tokens in reach; this one of {trace.n_tokens} reaches only itself"
        raise ArgumentError("position", held, allowed)
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
            f"positions from {reach[0]} to {reach[-1]}, the causal reach of {fixed}={held}",
        )
    if len(positions) < 2:
        raise ArgumentError(
            "tokens", tokens, "two or more positions: a single pair (src, dest) has nothing to compare with"
        )
    return positions
