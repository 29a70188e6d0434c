r"""Growth: do residual norms grow exponentially with depth, evenly per layer?

Source: arXiv 2407.07810, section 3 ("layer-wise exponential growth"). The paper's own formula of the expodistance was
not available; here it is reconstructed as the squared coefficient of variation of the log-norm increments.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.stream import stream_of
from tlcoupling.precision import full_precision
from tlcoupling.results.base import Provenance, Result
from tlcoupling.trajectory.line import fit_line
from tlcoupling.trajectory.linearity import provenance_of, tokens_of


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
            reconstruction: the paper's own formula was not available. ``[pos]``.
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
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {"cv": ("pos",)}

    def __repr__(self) -> str:
        """One line."""
        return (
            f"Growth({len(self.tokens)} tokens, {len(self.alpha)} layers: median ED "
            f"{self.expodistance.nanquantile(0.5):.3f}, mean rate {self.rate.mean():.4f} per layer)"
        )

    @property
    def cv(self) -> Float[Tensor, " pos"]:
        """Return the coefficient of variation of alpha, CV = sqrt(ED)."""
        return self.expodistance.sqrt()

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "depth": range(len(self.norms)),
            "layer": range(len(self.alpha)),
            "pos": range(len(self.tokens)),
        }


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

    Example:
        >>> tlc.growth(trace).expodistance.nanquantile(0.5)  # doctest: +SKIP
    """
    started = time.perf_counter()
    stream = stream_of(source)
    between = None
    if stream.topology == "sequential":
        between = stream.resid_mid.norm(dim=-1), stream.after_writes.norm(dim=-1)
    return growth_of_norms(stream.resid.norm(dim=-1), between, provenance_of(source, started), tokens_of(stream))


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
    """
    log_norms = norms.log()
    alpha = log_norms.diff(dim=0)
    attn_share = mlp_share = None
    if between is not None:
        mid, after = (norm.log() for norm in between)
        attn_share, mlp_share = (mid - log_norms[:-1]).cpu(), (after - mid).cpu()
    line = fit_line(torch.arange(len(norms), dtype=norms.dtype, device=norms.device), log_norms)
    return Growth(
        provenance=provenance,
        norms=norms.cpu(),
        alpha=alpha.cpu(),
        attn_share=attn_share,
        mlp_share=mlp_share,
        expodistance=expodistance(alpha).cpu(),
        rate=alpha.mean(0).cpu(),
        slope=line.slope.cpu(),
        r_squared=line.r_squared.cpu(),
        tokens=tokens,
    )
