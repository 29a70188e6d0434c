r"""The coupling metric and the subspace overlap; ``null`` says what chance gives.

Source: Aubry, Meng, Sugolov, Papyan, "Transformer Block Coupling and its Correlation with Generalization in LLMs",
ICLR 2025, arXiv 2407.07810, section 3. The overlap is not in the paper.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalizer = Literal["frobenius", "trace"]
Bases = Literal["uv", "vu"]


def normalizer_of(s1: Float[Tensor, "... K"], normalizer: Normalizer) -> Float[Tensor, "..."]:
    """Return the divisor of the misalignment: ||S1||_F or tr S1."""
    return s1.norm(dim=-1) if normalizer == "frobenius" else s1.sum(-1)


def coupling(
    projected: Float[Tensor, "... K K"],
    s1: Float[Tensor, "... K"],
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
) -> Float[Tensor, "..."]:
    r"""Return c_K(J1, J2) = 1 - || abs(U2^T J1 V2) - S1 ||_F / norm(S1).

    Args:
        projected: U2^T J1 V2 (or V2^T J1 U2 for the "vu" bases).
        s1: the top K singular values of J1.
        normalizer: ``"frobenius"`` divides by ||S1||_F, ``"trace"`` by the sum of S1.
        absolute: True as in the authors' code, False as in the paper's formula. Diagonal signs do not depend on the
            sign of a pair (u, v), so a negative diagonal means anti-alignment.

    Returns:
        At most 1. It is 1 if J1 and J2 share their bases.
    """
    aligned = projected.abs() if absolute else projected
    misalignment = (aligned - torch.diag_embed(s1)).flatten(-2).norm(dim=-1)
    return 1 - misalignment / normalizer_of(s1, normalizer)


def subspace_overlap(inner: Float[Tensor, "... K K"]) -> Float[Tensor, "..."]:
    """Return ||B1^T B2||_F^2 / K of two orthonormal bases, from 0 to 1; K / d for independent Haar-random subspaces.

    Args:
        inner: B1^T B2.
    """
    return inner.square().sum((-2, -1)) / inner.shape[-1]


def off_diagonal_mean(matrix: Tensor) -> Tensor:
    """Return the mean over ordered pairs of different indices of the last two axes; NaN for a single index."""
    size = matrix.shape[-1]
    mask = ~torch.eye(size, dtype=torch.bool, device=matrix.device)
    return matrix[..., mask].mean(-1)
