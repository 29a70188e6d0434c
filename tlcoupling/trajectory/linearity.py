r"""Linearity: does a token's residual stream run along a line?

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

from tlcoupling.results import Provenance, Result
from tlcoupling.trace import Stream, Trace, stream_of


@dataclass(frozen=True, repr=False, eq=False)
class Linearity(Result):
    """How straight the token trajectories are.

    Attributes:
        lss: line-shape score, at least 1 (a straight line); n independent random directions give about sqrt(n).
            ``[path, pos]``.
        straightness: distance over length, ||x^L - x^0|| / sum ||d_i||, from 0 to 1. ``[path, pos]``.
        paths: ``block`` (x^{l+1} - x^l), ``sublayer`` (a^l and m^l in turn; sequential blocks only), ``attn`` (a^l
            only), ``mlp`` (m^l only).
        steps: number of steps n of each path.
        tokens: the tokens as text; positions where the source knows no text.
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
        return f"Linearity({len(self.tokens)} tokens, paths {', '.join(self.paths)}: mean LSS of blocks {mean:.3f})"

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {"path": self.paths, "pos": range(len(self.tokens))}

    def path(self, name: str) -> Float[Tensor, " pos"]:
        """The line-shape scores of one path."""
        return self.lss[self.paths.index(name)]


def line_shape_score(steps: Float[Tensor, "... n d"]) -> Float[Tensor, "..."]:
    r"""LSS = n / || sum_i d_i / ||d_i|| || of steps d_1 .. d_n; NaN where a step has length zero."""
    lengths = steps.norm(dim=-1, keepdim=True)
    directions = steps / lengths.where(lengths > 0, torch.nan)
    return steps.shape[-2] / directions.sum(-2).norm(dim=-1)


def linearity(source: Any) -> Linearity:
    """Measure how straight the token trajectories are.

    Args:
        source: a ``Trace``, or an ``ActivationCache`` (or a dictionary of hook names to activations) of one prompt.

    Raises:
        MissingHookError, ArgumentError, NonFiniteActivationError, ResidualIdentityError: the cache cannot be used; see
            ``Trace.from_cache``.

    Warns:
        A step of length zero has no direction: its token's score is NaN, and the warning names token and layer.

    Example:
        >>> tlc.linearity(trace).path("block").mean()  # doctest: +SKIP
    """
    started = time.perf_counter()
    stream = stream_of(source)
    paths = _paths(stream)
    lss, straightness = [], []
    for name, steps in paths.items():
        steps = steps.transpose(0, 1)  # [pos, n, d]
        lengths = steps.norm(dim=-1)
        _warn_of_zero_steps(name, lengths)
        lss.append(line_shape_score(steps))
        straightness.append(steps.sum(1).norm(dim=-1) / lengths.sum(1))
    return Linearity(
        provenance=provenance_of(source, started),
        lss=torch.stack(lss).cpu(),
        straightness=torch.stack(straightness).cpu(),
        paths=tuple(paths),
        steps=tuple(steps.shape[0] for steps in paths.values()),
        tokens=tokens_of(stream),
    )


def _paths(stream: Stream) -> dict[str, Float[Tensor, "n pos d"]]:
    """The steps of each path that the topology has."""
    paths = {"block": stream.resid.diff(dim=0)}
    if stream.mlp_out is not None and stream.topology == "sequential":
        paths["sublayer"] = torch.stack([stream.attn_out, stream.mlp_out], dim=1).flatten(0, 1)
    paths["attn"] = stream.attn_out
    if stream.mlp_out is not None:
        paths["mlp"] = stream.mlp_out
    return paths


def _warn_of_zero_steps(path: str, lengths: Float[Tensor, "pos n"]) -> None:
    for pos, step in (lengths == 0).nonzero().tolist():
        layer = step // 2 if path == "sublayer" else step
        warnings.warn(
            f"the {path} step of layer {layer} has length zero at position {pos}, so it has no direction: the "
            f"line-shape score of the {path} path is NaN there",
            stacklevel=3,
        )


def tokens_of(stream: Stream) -> tuple[str, ...]:
    """The tokens' text where the stream knows it, else their positions."""
    if isinstance(stream, Trace):
        return stream.str_tokens
    return tuple(str(pos) for pos in range(stream.n_tokens))


def provenance_of(source: Any, started: float) -> Provenance:
    """The provenance of a measurement that needs no Jacobian."""
    seconds = time.perf_counter() - started
    if isinstance(source, Trace):
        return source.provenance(settings={}, seconds=seconds)
    cfg = getattr(getattr(source, "model", None), "cfg", None)
    return Provenance(model_name=str(getattr(cfg, "model_name", "unknown")), seconds=seconds)
