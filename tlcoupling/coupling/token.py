"""Token-wise coupling: one layer, Jacobians of different tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tlcoupling.arguments import Indices, KSpec, resolve_basis_layers, resolve_indices, resolve_sublayers
from tlcoupling.coupling.groups import Group, groups_of_layers
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.result import Wanted, WithinLayers, measure
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName
from tlcoupling.text import counted


@dataclass(frozen=True, repr=False, eq=False)
class TokenCoupling(WithinLayers, group=("sublayer", "layer"), member="pos"):
    """Coupling of the Jacobians of all pairs of tokens, in each layer.

    ``values``, ``null``, ``null_std``, ``excess``, ``z`` and the overlaps are
    ``[sublayer, layer, k, pos, basis_pos]``. ``Coupling`` explains them. ``mean`` and ``profile`` leave out pairs of
    equal positions, also if the bases come from another layer.
    """

    def _described(self) -> str:
        return f"{counted(len(self.layers), 'layer')}, {counted(len(self.positions), 'token')}{self._across()}"


def token_coupling(
    trace: Trace,
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
) -> TokenCoupling:
    r"""Measure how far the top singular vectors of a layer's Jacobians agree across tokens.

    c_K(J[l, t->t], J[l', t'->t']) for all ordered pairs of tokens t, t', by default with l' = l. Source:
    arXiv 2407.07810, section 3 ("token-wise").

    The tokens of a layer share its weights, so their Jacobians agree even in an untrained model (excess about 0.6 at
    initialisation and width 96). ``null`` is for unrelated bases: to see the effect of training, compare with a random
    model. Across layers (``basis_layers``) a random model has no excess.

    Args:
        trace: a trace of the model.
        k: as in ``depth_coupling``.
        sublayers: ``"block"``, ``"attn"``, ``"mlp"``, or several; by default all that the model has.
        tokens: ``"all"``, a position or several.
        layers: block indices; by default all.
        basis_layers: the layer l' that gives the bases, one for each layer or one for all; by default l itself.
        normalizer: as in ``depth_coupling``.
        bases: as in ``depth_coupling``.
        absolute: as in ``depth_coupling``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.
        progress: show a progress bar; by default on a terminal or in a notebook, after two seconds.

    Returns:
        ``TokenCoupling``, all its tensors on the CPU.

    Raises:
        ArgumentError: an argument out of range (K above the rank of a Jacobian, an unknown token or layer, another
            number of ``basis_layers`` than of layers).
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> coupling = tlc.token_coupling(trace, k=10)  # doctest: +SKIP
        >>> coupling.z[0, 3, 0]  # all pairs of tokens, block of layer 3 # doctest: +SKIP
    """
    require_trace(trace)
    options = Options.resolve(trace.d_model, k, normalizer, bases, absolute, engine, solver)
    return measure(trace, [wanted_of_tokens(trace, sublayers, tokens, layers, basis_layers)], options, progress)[0]


def wanted_of_tokens(
    trace: Trace,
    sublayers: str | Sequence[str] | None = None,
    tokens: Indices = "all",
    layers: Indices | None = None,
    basis_layers: Indices | None = None,
) -> Wanted[TokenCoupling]:
    """Return what ``token_coupling`` measures, for arguments as it takes them.

    Raises:
        ArgumentError: one is out of range.
    """
    names = resolve_sublayers(sublayers, trace.sublayers, trace.refusal)
    positions = resolve_indices("tokens", tokens, trace.n_tokens)
    chosen = resolve_indices("layers", layers, trace.n_layers)
    others = resolve_basis_layers(basis_layers, chosen, trace.n_layers)
    return Wanted(
        TokenCoupling,
        names,
        token_groups(chosen, others, positions),
        {"tokens": list(positions), "layers": list(chosen), "basis_layers": list(others)},
        {
            "positions": positions,
            "tokens": tuple(trace.str_tokens[pos] for pos in positions),
            "layers": chosen,
            "basis_layers": others,
        },
    )


def token_groups(layers: Sequence[int], basis_layers: Sequence[int], positions: Sequence[int]) -> list[Group]:
    """Return the groups to compare: in each layer, all positions, with the bases of the same or another layer."""
    return groups_of_layers(layers, basis_layers, [(pos, pos) for pos in positions])
