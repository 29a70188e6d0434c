"""Head coupling: how far the Jacobians of a layer's heads agree with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tlcoupling.arguments import Indices, KSpec, check_index, resolve_indices
from tlcoupling.coupling.groups import Group, Place
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.result import Coupling, Wanted, measure
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName
from tlcoupling.text import counted


@dataclass(frozen=True, repr=False, eq=False)
class HeadCoupling(Coupling, group=("layer",), member="head"):
    """Coupling of the Jacobians of all pairs of a layer's heads, at one token.

    ``values``, ``null``, ``null_std``, ``excess``, ``z`` and the overlaps are ``[layer, k, head, basis_head]``.
    ``Coupling`` explains them.

    Heads that share their keys and values couple even with fresh weights. ``mean`` and ``test`` leave their pairs out,
    so their excess is about 0 for fresh weights; with a single key-value head no pair is left, and they are NaN.

    Attributes:
        position: the token's position.
        token: its text.
        layers: the layers measured.
        key_value_heads: the key-value head of each head; None in results of version 0.1, where no pair is left out.
    """

    position: int
    token: str
    layers: tuple[int, ...]
    key_value_heads: tuple[int, ...] | None = None

    def _described(self) -> str:
        return (
            f"{counted(self.values.shape[-1], 'head')} of {counted(len(self.layers), 'layer')}, token {self.position}"
        )

    def _labels(self) -> dict[str, Sequence[Any]]:
        heads = range(self.values.shape[-1])
        return {"layer": self.layers, "head": heads, "basis_head": heads}

    def _compared(self) -> Bool[Tensor, "head basis_head"]:
        if self.key_value_heads is None:
            return super()._compared()
        of = torch.tensor(self.key_value_heads)
        return of[:, None] != of


def head_coupling(
    trace: Trace,
    k: KSpec = 10,
    *,
    token: int = -1,
    layers: Indices | None = None,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    absolute: bool = True,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
    progress: bool | None = None,
) -> HeadCoupling:
    """Measure how far the top singular vectors of a layer's heads agree, from the Jacobian of each head's share of a^l.

    A head's share is its write before a post-norm, as in ``residual_jacobian``. Without a post-norm the heads'
    Jacobians sum to the attention's.

    Args:
        trace: a trace of the model.
        k: as in ``depth_coupling``; at most the width of a head, which bounds the rank of its Jacobian.
        token: a position.
        layers: block indices; by default all.
        normalizer: as in ``depth_coupling``.
        bases: as in ``depth_coupling``.
        absolute: as in ``depth_coupling``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.
        progress: show a progress bar; by default on a terminal or in a notebook, after two seconds.

    Raises:
        ArgumentError: an argument out of range (K above the rank of a head's Jacobian, an unknown token).
        UnsupportedModelError: a layer has no attention, or one that cannot be split into heads.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> tlc.head_coupling(trace, k=10).mean("excess")  # doctest: +SKIP
    """
    require_trace(trace)
    options = Options.resolve(trace.d_model, k, normalizer, bases, absolute, engine, solver)
    pos = check_index("token", token, trace.n_tokens)
    chosen = resolve_indices("layers", layers, trace.n_layers)
    heads = range(trace.model.cfg.n_heads)
    groups = trace.block(chosen[0]).n_groups or len(heads)
    wanted = Wanted(
        HeadCoupling,
        (trace.attention(chosen),),
        [Group.of([Place(layer, pos, pos, head) for head in heads]) for layer in chosen],
        {"token": pos, "layers": list(chosen)},
        {
            "position": pos,
            "token": trace.str_tokens[pos],
            "layers": chosen,
            "key_value_heads": tuple(head * groups // len(heads) for head in heads),
        },
    )
    return measure(trace, [wanted], options, progress)[0]
