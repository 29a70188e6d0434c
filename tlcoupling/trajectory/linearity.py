r"""Linearity: does a token's residual stream move along a line?

Source of the line-shape score: Gai and Zhang, "A Mathematical Principle of Deep Learning: Learn the Geodesic Curve in
the Wasserstein Space", 2021, arXiv 2102.09235; used as in arXiv 2407.07810, section 3.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import ArgumentError
from tlcoupling.forward.split import Split, sublayers_of, topology_of
from tlcoupling.forward.stream import Stream, stream_of
from tlcoupling.forward.trace import Trace
from tlcoupling.precision import full_precision
from tlcoupling.results.base import Provenance, Result
from tlcoupling.text import counted


@dataclass(frozen=True, repr=False, eq=False)
class Linearity(Result):
    """How straight the token trajectories are.

    Attributes:
        lss: line-shape score, at least 1 (a straight line); n independent random directions give about sqrt(n).
            ``[path, pos]``.
        straightness: distance over length, || sum_i d_i || / sum_i ||d_i|| of the path's steps, from 0 to 1. The
            distance of ``block`` and ``sublayer`` is ||x^L - x^0||, that of ``attn`` and ``mlp`` is over their own
            writes alone. ``[path, pos]``.
        paths: ``block`` (x^{l+1} - x^l), ``sublayer`` (a^l and m^l in turn; sequential blocks only), ``attn`` (a^l
            only), ``mlp`` (m^l only).
        steps: number of steps n of each path.
        tokens: the tokens as text; positions if the source has no text.
    """

    lss: Float[Tensor, "path pos"]
    straightness: Float[Tensor, "path pos"]
    paths: tuple[str, ...]
    steps: tuple[int, ...]
    tokens: tuple[str, ...]

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "lss": ("path", "pos"),
        "straightness": ("path", "pos"),
    }

    def __repr__(self) -> str:
        """One line."""
        mean = self.lss[0].nanmean()
        paths = ", ".join(self.paths)
        return f"Linearity({counted(len(self.tokens), 'token')}, paths {paths}: mean LSS of blocks {mean:.3f})"

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {"path": self.paths, "pos": range(len(self.tokens))}

    def path(self, name: str) -> Float[Tensor, " pos"]:
        """Return the line-shape scores of one path.

        Raises:
            ArgumentError: no such path.
        """
        if name not in self.paths:
            raise ArgumentError("name", name, f"one of {', '.join(self.paths)}")
        return self.lss[self.paths.index(name)]


def length(steps: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest"]:
    """Return ||d|| at any scale: squares of numbers below 1e-19 or above 1e19 leave the range of float32."""
    plain, info = steps.norm(dim=-1), torch.finfo(steps.dtype)
    inside = (plain > info.tiny**0.5 / info.eps) & plain.isfinite()
    if inside.all():
        return plain
    largest = steps.abs().amax(-1)
    scaled = (steps / largest.where(largest > 0, 1.0)[..., None]).norm(dim=-1) * largest
    return plain.where(inside, scaled)


def unit(steps: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest d"]:
    """Return directions d / ||d||; NaN for a step of length zero."""
    lengths = length(steps)[..., None]
    return steps / lengths.where(lengths > 0, torch.nan)


def line_shape_score(steps: Float[Tensor, "... n d"]) -> Float[Tensor, "..."]:
    r"""Return LSS = n / || sum_i d_i / ||d_i|| || of steps d_1 .. d_n; NaN if a step has length zero."""
    return _score(steps.shape[-2], unit(steps).sum(-2))


def _score(n: int, directions: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest"]:
    """Return n / || sum_i d_i / ||d_i|| ||, from the number of steps and the sum of their directions."""
    return n / directions.norm(dim=-1)


class Path:
    """One path of all tokens, stored as running sums, so memory does not grow with the number of steps.

    A step has no direction if its length is zero. A difference x^{l+1} - x^l has none either if it is as short as the
    rounding of the stream, eps ||x^{l+1}||. A sublayer's write may be as short as that: it is not a difference.

    Args:
        name: the path's name.
        steps_per_layer: number of sublayers for the path through all of them.
    """

    def __init__(self, name: str, steps_per_layer: int = 1) -> None:
        self.name, self.n, self._per_layer = name, 0, steps_per_layer
        self._directions: Tensor | float = 0.0
        self._displacement: Tensor | float = 0.0
        self._length: Tensor | float = 0.0
        self._undirected: list[tuple[int, int]] = []  # (layer, position)

    def add(self, step: Float[Tensor, "pos d"], rounding: Float[Tensor, " pos"] | float = 0.0) -> None:
        """Add one step; ``rounding`` is the length that rounding alone would give it."""
        lengths = length(step)
        directed = lengths > rounding
        if not directed.all():
            self._undirected += [(self.n // self._per_layer, pos) for pos in (~directed).nonzero()[:, 0].tolist()]
        self.n += 1
        self._directions = self._directions + step / lengths.where(directed, torch.nan)[:, None]
        self._displacement = self._displacement + step
        self._length = self._length + lengths

    @property
    def lss(self) -> Float[Tensor, " pos"]:
        """Return the line-shape score of the steps, as ``line_shape_score``."""
        return _score(self.n, torch.as_tensor(self._directions))

    @property
    def straightness(self) -> Float[Tensor, " pos"]:
        """Return || sum_i d_i || / sum_i ||d_i||."""
        return length(torch.as_tensor(self._displacement)) / self._length

    def warn_of_undirected_steps(self) -> None:
        """Warn of each step without a direction."""
        for layer, pos in self._undirected:
            warnings.warn(
                f"the {self.name} step of layer {layer} has no direction at position {pos}, because its length is zero "
                f"or no more than the stream's rounding: the line-shape score of the {self.name} path is NaN there",
                stacklevel=5,
            )


@full_precision()
def linearity(source: Any) -> Linearity:
    """Measure how straight the token trajectories are.

    Args:
        source: a ``Trace``, or an ``ActivationCache`` (or a dictionary of hook names to activations) of one prompt.

    Raises:
        MissingHookError, ArgumentError, NonFiniteActivationError, ResidualIdentityError: the cache cannot be used; see
            ``Trace.from_cache``.

    Warns:
        UserWarning: a step of length zero, or no longer than the stream's rounding, has no direction, so its token's
            score is NaN; the warning names token and layer.

    Example:
        >>> tlc.linearity(trace).path("block").mean()  # doctest: +SKIP
    """
    started = time.perf_counter()
    stream = stream_of(source)
    paths = make_paths(stream.splits)
    for layer in range(stream.n_layers):
        writes = {name: write[layer] for name, write in stream.writes.items()}
        walk(paths, stream.resid[layer], stream.resid[layer + 1], writes)
    return linearity_of_paths(paths, provenance_of(source, started), tokens_of(stream))


def make_paths(splits: Sequence[Split]) -> dict[str, Path]:
    """Return the paths of a model, without steps."""
    block, *sublayers = sublayers_of(splits)
    paths = {block: Path(block)}
    if topology_of(splits) in ("sequential", "cross"):
        paths["sublayer"] = Path("sublayer", len(sublayers))
    return paths | {name: Path(name) for name in sublayers}


def walk(
    paths: Mapping[str, Path],
    before: Float[Tensor, "pos d"],
    after: Float[Tensor, "pos d"],
    writes: Mapping[str, Float[Tensor, "pos d"]],
) -> None:
    """Add one layer's steps to each path: x^{l+1} - x^l, and the sublayers' writes by name."""
    paths["block"].add(after - before, torch.finfo(after.dtype).eps * length(after))
    for name, path in paths.items():
        for step in writes.values() if name == "sublayer" else [writes[name]] if name in writes else []:
            path.add(step)


def linearity_of_paths(paths: Mapping[str, Path], provenance: Provenance, tokens: tuple[str, ...]) -> Linearity:
    """Collect the scores of paths into a result; warn of steps without a direction."""
    for path in paths.values():
        path.warn_of_undirected_steps()
    return Linearity(
        provenance=provenance,
        lss=torch.stack([path.lss for path in paths.values()]).cpu(),
        straightness=torch.stack([path.straightness for path in paths.values()]).cpu(),
        paths=tuple(paths),
        steps=tuple(path.n for path in paths.values()),
        tokens=tokens,
    )


def tokens_of(stream: Stream) -> tuple[str, ...]:
    """Return the tokens' text if the stream has it, else their positions."""
    if isinstance(stream, Trace):
        return stream.str_tokens
    return tuple(str(pos) for pos in range(stream.n_tokens))


def provenance_of(source: Any, started: float) -> Provenance:
    """Return the provenance of a measurement without Jacobians."""
    seconds = time.perf_counter() - started
    if isinstance(source, Trace):
        return source.provenance(settings={}, seconds=seconds)
    cfg = getattr(getattr(source, "model", None), "cfg", None)
    return Provenance(model_name=str(getattr(cfg, "model_name", "unknown")), seconds=seconds)
