"""The result of a truncated SVD."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Triplets:
    """The top K singular triplets of an operator J of shape [m, n].

    Attributes:
        u: left singular vectors, ``[m, K]``.
        s: singular values, descending, ``[K]``.
        v: right singular vectors, ``[n, K]``.
        residual: for each triplet the larger of ||J v - s u|| and ||J^T u - s v||, relative to s_1, ``[K]``.
        solver: ``"dense"`` or ``"krylov"``.
    """

    u: Float[Tensor, "m K"]
    s: Float[Tensor, " K"]
    v: Float[Tensor, "n K"]
    residual: Float[Tensor, " K"]
    solver: str

    def __repr__(self) -> str:
        """One line."""
        return f"Triplets(K={len(self.s)}, s_1={self.s[0]:.4g}, residual={self.residual.max():.1e}, {self.solver})"


def residuals(
    jv: Float[Tensor, "*stack m K"],
    jtu: Float[Tensor, "*stack n K"],
    u: Float[Tensor, "*stack m K"],
    s: Float[Tensor, "*stack K"],
    v: Float[Tensor, "*stack n K"],
) -> Float[Tensor, "*stack K"]:
    """Return max(||J v - s u||, ||J^T u - s v||) / s_1 of each triplet."""
    across = s[..., None, :]
    right, left = (jv - u * across).norm(dim=-2), (jtu - v * across).norm(dim=-2)
    return right.maximum(left) / s[..., :1]
