"""The result of a truncated SVD, and how far it determines single singular vectors and their subspaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Rounding moves the entries of U^T J V by this many eps s_1, at most, in float32 and float64 SVDs of 30 to 576 columns.
NOISE = 8.0
# Singular vectors count as determined if their uncertainty, the sine of an angle, is at most this.
DETERMINED = 1e-2


@dataclass(frozen=True, repr=False, eq=False)
class Triplets:
    r"""The top K singular triplets of an operator J of shape [m, n].

    Attributes:
        u: left singular vectors, ``[m, K]``.
        s: singular values, descending, ``[K]``.
        v: right singular vectors, ``[n, K]``.
        next_s: the next singular value s_{K+1}, 0 if there is none; Krylov's is an upper estimate.
        residual: for each triplet the larger of ||J v - s u|| and ||J^T u - s v||, relative to its own s, ``[K]``.
        converged: whether the residual is as small as was asked, or as rounding allows, ``[K]``. Always True of the
            dense solver.
        solver: ``"dense"`` or ``"krylov"``.
    """

    u: Float[Tensor, "m K"]
    s: Float[Tensor, " K"]
    v: Float[Tensor, "n K"]
    next_s: Float[Tensor, ""]
    residual: Float[Tensor, " K"]
    converged: Bool[Tensor, " K"]
    solver: str

    def __repr__(self) -> str:
        """One line."""
        return f"Triplets(K={len(self.s)}, s_1={self.s[0]:.4g}, residual={self.residual.max():.1e}, {self.solver})"

    @property
    def gaps(self) -> Float[Tensor, " K"]:
        """Return the distance of each singular value to the nearest other one, relative to itself."""
        return distances(self.s, self.next_s) / self.s

    @property
    def uncertainty(self) -> Float[Tensor, " K"]:
        r"""Return how far u_k and v_k may be from the exact singular vectors: the sine of an angle, from 0 to 1.

        It is max(r_k, 8 eps s_1) / (distance of s_k to the nearest other singular value): Wedin's theorem (1972), with
        r_k the absolute residual and the second term for rounding. Equal singular values give 1, because any rotation
        of their vectors is as good.
        """
        return self._angle(self.residual * self.s, distances(self.s, self.next_s))

    @property
    def subspace_uncertainty(self) -> Float[Tensor, " K"]:
        """Return the same bound for the spans of the first 1, 2, ... K vectors; only the gap at the end matters."""
        residual = (self.residual * self.s).square().cumsum(0).sqrt()
        return self._angle(residual, self.s - torch.cat([self.s[1:], self.next_s[None]]))

    def _angle(self, residual: Float[Tensor, " K"], distance: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """Return the bound on the sine; it is 1 where there is no distance."""
        moved = residual.maximum(NOISE * torch.finfo(self.s.dtype).eps * self.s[0])
        return (moved / distance.clamp(min=0)).nan_to_num(nan=1.0).clamp(max=1)


def distances(s: Float[Tensor, "*stack K"], next_s: Float[Tensor, "*stack"]) -> Float[Tensor, "*stack K"]:
    """Return the distance of each singular value to the nearest other one, at least 0."""
    below = s - torch.cat([s[..., 1:], next_s[..., None]], dim=-1)
    above = torch.cat([torch.full_like(below[..., :1], torch.inf), below[..., :-1]], dim=-1)
    return below.minimum(above).clamp(min=0)


def residuals(
    jv: Float[Tensor, "*stack m K"],
    jtu: Float[Tensor, "*stack n K"],
    u: Float[Tensor, "*stack m K"],
    s: Float[Tensor, "*stack K"],
    v: Float[Tensor, "*stack n K"],
) -> Float[Tensor, "*stack K"]:
    """Return max(||J v - s u||, ||J^T u - s v||) of each triplet, absolute."""
    across = s[..., None, :]
    return (jv - u * across).norm(dim=-2).maximum((jtu - v * across).norm(dim=-2))
