r"""Growth: do residual norms grow exponentially with depth, evenly per layer?

Source: arXiv 2407.07810, section 3 ("layer-wise exponential growth"). The paper's own formula of the expodistance was
not available; here it is reconstructed as the squared coefficient of variation of the log-norm increments.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlcoupling.forward.stream import stream_of
from tlcoupling.precision import full_precision
from tlcoupling.results.base import Provenance, Result
from tlcoupling.text import counted
from tlcoupling.trajectory.line import fit_line
from tlcoupling.trajectory.linearity import length, provenance_of, tokens_of

SINK = 10.0  # times the median norm
NOISE = 4.0  # a norm and its logarithm are off by up to two eps each


@dataclass(frozen=True, repr=False, eq=False)
class Growth(Result):
    r"""How residual norms grow with depth.

    Attributes:
        norms: ||x^l||, ``[depth, pos]``, depth 0 .. L.
        alpha: ln ||x^{l+1}|| - ln ||x^l||, ``[layer, pos]``.
        attn_share: attention's share of alpha, ln (||x_mid|| / ||x_pre||); None unless blocks are sequential.
            ``[layer, pos]``.
        mlp_share: the MLP's share of alpha, ln (||x_post|| / ||x_mid||). The two shares sum to alpha exactly, unless
            hooks edit the stream between blocks. ``[layer, pos]``.
        expodistance: ED = Var_l(alpha) / mean_l(alpha)^2 (population variance), 0 for exactly exponential growth. A
            reconstruction: the paper's own formula was not available. NaN where a norm is zero, or where the log-norm
            changes by no more than rounding from x^0 to x^L. ``[pos]``.
        rate: mean_l(alpha), per layer. ``[pos]``.
        slope: least-squares slope of ln ||x^l|| over l, per layer. ``[pos]``.
        r_squared: R^2 of that line, NaN if the norm does not change. ``[pos]``.
        tokens: the tokens as text; positions if the source has no text.
    """

    norms: Float[Tensor, "depth pos"]
    alpha: Float[Tensor, "layer pos"]
    attn_share: Float[Tensor, "layer pos"] | None
    mlp_share: Float[Tensor, "layer pos"] | None
    expodistance: Float[Tensor, " pos"]
    rate: Float[Tensor, " pos"]
    slope: Float[Tensor, " pos"]
    r_squared: Float[Tensor, " pos"]
    tokens: tuple[str, ...]

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "norms": ("depth", "pos"),
        "alpha": ("layer", "pos"),
        "attn_share": ("layer", "pos"),
        "mlp_share": ("layer", "pos"),
        "expodistance": ("pos",),
        "rate": ("pos",),
        "slope": ("pos",),
        "r_squared": ("pos",),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {"cv": ("pos",), "sinks": ("pos",)}

    def __repr__(self) -> str:
        """One line."""
        return (
            f"Growth({counted(len(self.tokens), 'token')}, {counted(len(self.alpha), 'layer')}: median ED "
            f"{self.expodistance.nanquantile(0.5):.3f}, mean rate {self.rate.mean():.4f} per layer)"
        )

    @property
    def cv(self) -> Float[Tensor, " pos"]:
        """Return the coefficient of variation of alpha, CV = sqrt(ED)."""
        return self.expodistance.sqrt()

    @property
    def sinks(self) -> Bool[Tensor, " pos"]:
        """Return which tokens are sinks, as ``find_sinks``."""
        return find_sinks(self.norms)

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "depth": range(len(self.norms)),
            "layer": range(len(self.alpha)),
            "pos": range(len(self.tokens)),
        }


def find_sinks(norms: Float[Tensor, "depth pos"]) -> Bool[Tensor, " pos"]:
    """Return which tokens are sinks: at some depth the norm is more than ten times the median over tokens.

    A few tokens of a prompt, mostly the first, carry massive activations (Sun et al. 2024, arXiv 2402.17762): in
    SmolLM2-135M up to 158 times the median, while no other token of the prompt ``landmarks`` exceeds 9 times. The lower
    of two medians counts, so that one of two tokens can be a sink.
    """
    return (norms > SINK * norms.median(1, keepdim=True).values).any(0)


def expodistance(alpha: Float[Tensor, "layer *rest"]) -> Float[Tensor, "*rest"]:
    """Return ED = Var_l(alpha) / mean_l(alpha)^2 with the population variance; 0 for exactly exponential growth."""
    return alpha.var(0, correction=0) / alpha.mean(0).square()


@full_precision()
def growth(source: Any) -> Growth:
    """Measure how residual norms grow with depth.

    Args:
        source: a ``Trace``, or an ``ActivationCache`` (or a dictionary of hook names to activations) of one prompt.

    Raises:
        MissingHookError, ArgumentError, NonFiniteActivationError, ResidualIdentityError: the cache cannot be used; see
            ``Trace.from_cache``.

    Warns:
        UserWarning: the expodistance of some tokens is NaN, because their norm hardly changes or is zero.

    Example:
        >>> tlc.growth(trace).expodistance.nanquantile(0.5)  # doctest: +SKIP
    """
    started = time.perf_counter()
    stream = stream_of(source)
    between = None
    if stream.topology == "sequential":
        between = length(stream.resid_mid), length(stream.after_writes)
    return growth_of_norms(length(stream.resid), between, provenance_of(source, started), tokens_of(stream))


def growth_of_norms(
    norms: Float[Tensor, "depth pos"],
    between: tuple[Float[Tensor, "layer pos"], Float[Tensor, "layer pos"]] | None,
    provenance: Provenance,
    tokens: tuple[str, ...],
) -> Growth:
    """Compute growth from norms alone.

    Args:
        norms: ||x^l||, depth 0 .. L.
        between: ||x^l + a^l|| and ||x^l + a^l + m^l|| for sequential blocks, otherwise None.
        provenance: provenance of the result.
        tokens: the tokens as text.

    Warns:
        UserWarning: as in ``growth``.
    """
    log_norms = norms.log()
    alpha = log_norms.diff(dim=0)
    attn_share = mlp_share = None
    if between is not None:
        mid, after = (norm.log() for norm in between)
        attn_share, mlp_share = (mid - log_norms[:-1]).cpu(), (after - mid).cpu()
    undefined = _without_growth(log_norms)
    if undefined.any():
        named = ", ".join(f"{pos} ({tokens[pos]!r})" for pos in undefined.nonzero()[:, 0].tolist())
        warnings.warn(
            f"the expodistance is NaN at position {named}: it divides by the mean growth, and from x^0 to x^L the "
            "log-norm changes by no more than rounding, or a norm is zero",
            stacklevel=4,
        )
    line = fit_line(torch.arange(len(norms), dtype=norms.dtype, device=norms.device), log_norms)
    return Growth(
        provenance=provenance,
        norms=norms.cpu(),
        alpha=alpha.cpu(),
        attn_share=attn_share,
        mlp_share=mlp_share,
        expodistance=expodistance(alpha).where(~undefined, torch.nan).cpu(),
        rate=alpha.mean(0).cpu(),
        slope=line.slope.cpu(),
        r_squared=line.r_squared.cpu(),
        tokens=tokens,
    )


def _without_growth(log_norms: Float[Tensor, "depth pos"]) -> Bool[Tensor, " pos"]:
    """Return whose mean growth is zero to rounding, or has a norm of zero. The mean is (last - first) / L."""
    rounding = NOISE * torch.finfo(log_norms.dtype).eps * (1 + log_norms.abs().amax(0))
    return ~((log_norms[-1] - log_norms[0]).abs() > rounding) | ~log_norms.isfinite().all(0)
