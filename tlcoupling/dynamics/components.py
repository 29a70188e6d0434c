"""Principal components of token trajectories."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import Indices, check_int, resolve_indices
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.stream import stream_of
from tlcoupling.precision import full_precision
from tlcoupling.results.base import Result
from tlcoupling.text import counted
from tlcoupling.trajectory.growth import find_sinks
from tlcoupling.trajectory.linearity import length, provenance_of, tokens_of


@dataclass(frozen=True, repr=False, eq=False)
class TrajectoryComponents(Result):
    """Token trajectories in their principal components.

    The residual streams x^l_t of all chosen tokens form one point cloud, centred on its mean.

    Attributes:
        coordinates: each point along each component, ``[depth, pos, component]``, depth 0 .. L.
        components: orthonormal directions in the residual stream, ``[d_model, component]``; the sign makes the largest
            entry positive.
        explained: each component's share of the cloud's variance, descending, ``[component]``.
        center: the mean of all points, ``[d_model]``.
        positions: the tokens' positions.
        tokens: their text; positions if the source has no text.
        left_out: positions of the sinks that were left out.
    """

    coordinates: Float[Tensor, "depth token component"]
    components: Float[Tensor, "d_model component"]
    explained: Float[Tensor, " component"]
    center: Float[Tensor, " d_model"]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    left_out: tuple[int, ...] = ()

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "coordinates": ("depth", "pos", "component"),
        "components": ("d_model", "component"),
        "explained": ("component",),
        "center": ("d_model",),
    }

    def __repr__(self) -> str:
        """One line."""
        shares = ", ".join(f"{share:.3f}" for share in self.explained)
        return f"TrajectoryComponents({counted(len(self.positions), 'token')}, shares of the variance: {shares})"

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "depth": range(len(self.coordinates)),
            "pos": self.positions,
            "component": range(len(self.explained)),
            "d_model": range(len(self.center)),
        }


@full_precision()
def trajectory_components(source: Any, n: int = 2, *, tokens: Indices | None = None) -> TrajectoryComponents:
    """Compute the principal components of token trajectories, by an exact singular value decomposition.

    Sinks (``Growth.sinks``), mostly the first token, have a far longer residual stream than all others and would take
    nearly all of the variance. They are left out unless tokens are named.

    Args:
        source: a ``Trace``, or an ``ActivationCache`` (or a dictionary of hook names to activations) of one prompt.
        n: number of components.
        tokens: a position, several, or ``"all"``; by default all but the sinks.

    Raises:
        ArgumentError: ``n`` out of range, an unknown token, or points that all coincide.
        MissingHookError, NonFiniteActivationError, ResidualIdentityError: the cache cannot be used; see
            ``Trace.from_cache``.

    Example:
        >>> tlc.trajectory_components(trace, n=3, tokens="all").explained  # doctest: +SKIP
    """
    started = time.perf_counter()
    stream = stream_of(source)
    sinks = () if tokens is not None else tuple(find_sinks(length(stream.resid)).nonzero().flatten().tolist())
    positions = tuple(pos for pos in resolve_indices("tokens", tokens, stream.n_tokens) if pos not in sinks)
    points = stream.resid[:, list(positions)]
    cloud = points.flatten(0, 1)
    most = min(cloud.shape)
    n = check_int("n", n, 1, most, "the smaller of the number of points and d_model")
    center = cloud.mean(0)
    _, s, vh = torch.linalg.svd(cloud - center, full_matrices=False)
    if not s[0] > 10 * torch.finfo(s.dtype).eps * cloud.norm():  # rounding of the mean alone
        raise ArgumentError("source", repr(source), "a trajectory that moves: all its points coincide")
    components = vh[:n].mT
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    components = components * largest.sign()
    texts = tokens_of(stream)
    return TrajectoryComponents(
        provenance=provenance_of(source, started),
        coordinates=((points - center) @ components).cpu(),
        components=components.cpu(),
        explained=(s.square() / s.square().sum())[:n].cpu(),
        center=center.cpu(),
        positions=positions,
        tokens=tuple(texts[pos] for pos in positions),
        left_out=sinks,
    )
