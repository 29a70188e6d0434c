r"""Singular values of residual Jacobians against depth, and the 1/sigma fit.

Source: Li and Papyan, "Residual Alignment", NeurIPS 2023, arXiv 2401.09018, property RA4: top singular values scale
inversely with depth.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.errors import ArgumentError
from tlcoupling.precision import full_precision
from tlcoupling.results.base import Result
from tlcoupling.trajectory.line import fit_line

_FITS = ("sublayer", "pos", "rank")


@dataclass(frozen=True, repr=False, eq=False)
class SingularValueProfile(Result):
    r"""How top singular values change with depth, and the law s_k(l) = 1 / (intercept + slope l).

    For each sublayer, token and rank k, a least-squares line is fitted to 1 / s_k(l) over the measured layer indices l.
    Equivalently s_k(l) = a / (l + b) with a = 1 / slope and b = intercept / slope. Residual Alignment predicts slope 1:
    if a representation moves along a line in equal steps (RA1) and all Jacobians share its direction (RA2), block l
    multiplies the distance from the line's origin by 1 + s(l) = (l + 1 + b) / (l + b). A negative slope means that
    singular values grow with depth.

    Attributes:
        singular_values: s_k(l), ``[sublayer, pos, layer, rank]``.
        slope: slope of 1 / s over l, ``[sublayer, pos, rank]``.
        intercept: the line's 1 / s at l = 0, ``[sublayer, pos, rank]``.
        r_squared: share of the variance of 1 / s over layers that the line explains, from 0 to 1,
            ``[sublayer, pos, rank]``.
        sublayers: as in ``DepthCoupling``.
        positions: as in ``DepthCoupling``.
        tokens: as in ``DepthCoupling``.
        layers: as in ``DepthCoupling``.
    """

    singular_values: Float[Tensor, "sublayer token layer rank"]
    slope: Float[Tensor, "sublayer token rank"]
    intercept: Float[Tensor, "sublayer token rank"]
    r_squared: Float[Tensor, "sublayer token rank"]
    sublayers: tuple[str, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "singular_values": ("sublayer", "pos", "layer", "rank"),
        "slope": _FITS,
        "intercept": _FITS,
        "r_squared": _FITS,
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {"fitted": ("sublayer", "pos", "layer", "rank")}

    def __repr__(self) -> str:
        """One line."""
        shown = ", ".join(
            f"{name} slope {slope:.3g} (R^2 {fit:.2f})"
            for name, slope, fit in zip(self.sublayers, self.slope[:, 0, 0], self.r_squared[:, 0, 0], strict=True)
        )
        return f"SingularValueProfile({len(self.layers)} layers, 1/s_1 on depth: {shown})"

    @property
    def fitted(self) -> Float[Tensor, "sublayer token layer rank"]:
        """Return the fitted s, 1 / (intercept + slope l); NaN if the line is not above 0."""
        depth = torch.tensor(self.layers, dtype=self.slope.dtype, device=self.slope.device)[:, None]
        inverse = self.intercept[:, :, None] + self.slope[:, :, None] * depth
        return 1 / inverse.where(inverse > 0, torch.nan)

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "sublayer": self.sublayers,
            "pos": self.positions,
            "layer": self.layers,
            "rank": range(self.singular_values.shape[-1]),
        }


@full_precision()
def singular_value_profile(coupling: DepthCoupling) -> SingularValueProfile:
    """Fit the law s(l) = 1 / (intercept + slope l) to the singular values of a ``DepthCoupling``.

    Args:
        coupling: the source of singular values and layers.

    Raises:
        ArgumentError: something else.

    Warns:
        UserWarning: fewer than three layers. Any line fits two points, so slope, intercept and R^2 are NaN.

    Example:
        >>> tlc.singular_value_profile(tlc.depth_coupling(trace, k=10)).r_squared[0, 0]  # doctest: +SKIP
    """
    if not isinstance(coupling, DepthCoupling):
        raise ArgumentError(
            "coupling", type(coupling).__name__, "a DepthCoupling: tlc.depth_coupling(trace), or an analysis's coupling"
        )
    started = time.perf_counter()
    values = coupling.singular_values
    depth = torch.tensor(coupling.layers, dtype=values.dtype)
    line = fit_line(depth, 1 / values.movedim(2, 0))
    fields = {"slope": line.slope, "intercept": line.intercept, "r_squared": line.r_squared}
    if len(depth) < 3:
        warnings.warn(
            f"a line through {len(depth)} layers is not a fit: slope, intercept and R^2 are NaN", stacklevel=3
        )
        fields = {name: torch.full_like(value, torch.nan) for name, value in fields.items()}
    return SingularValueProfile(
        provenance=replace(coupling.provenance, seconds=time.perf_counter() - started),
        singular_values=values,
        **fields,
        sublayers=coupling.sublayers,
        positions=coupling.positions,
        tokens=coupling.tokens,
        layers=coupling.layers,
    )
