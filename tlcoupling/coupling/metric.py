r"""The coupling metric, its null and the subspace overlap.

Source: Aubry, Meng, Sugolov, Papyan, "Transformer Block Coupling and its Correlation with Generalization in LLMs",
ICLR 2025, arXiv 2407.07810, section 3. The null and the overlap are this library's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalizer = Literal["frobenius", "trace"]
Bases = Literal["uv", "vu"]


def normalizer_of(s1: Float[Tensor, "... K"], normalizer: Normalizer) -> Float[Tensor, "..."]:
    """What the misalignment is divided by: ||S1||_F or tr S1."""
    return s1.norm(dim=-1) if normalizer == "frobenius" else s1.sum(-1)


def coupling(
    projected: Float[Tensor, "... K K"],
    s1: Float[Tensor, "... K"],
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
) -> Float[Tensor, "..."]:
    r"""c_K(J1, J2) = 1 - || abs(U2^T J1 V2) - S1 ||_F / norm(S1).

    Args:
        projected: U2^T J1 V2 (or V2^T J1 U2 for the "vu" bases).
        s1: the top K singular values of J1.
        normalizer: ``"frobenius"`` divides by ||S1||_F, ``"trace"`` by the sum of S1.
        absolute: as in the authors' code; False is the formula in the paper. Flipping the sign of a pair (u, v) leaves
            the diagonal as it is, so that a negative diagonal is anti-alignment.

    Returns:
        At most 1; 1 where the bases of J2 are those of J1.
    """
    aligned = projected.abs() if absolute else projected
    misalignment = (aligned - torch.diag_embed(s1)).flatten(-2).norm(dim=-1)
    return 1 - misalignment / normalizer_of(s1, normalizer)


def null_coupling(
    s1: Float[Tensor, "... K"],
    frobenius: Float[Tensor, "..."],
    d_model: int,
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
) -> Float[Tensor, "..."]:
    r"""The coupling that independent Haar-random bases would give, c_null.

    With f = ||J1||_F an entry of U^T J1 V is nearly normal with standard deviation f / d, so
    E || abs(M) - S1 ||_F^2 = K^2 f^2 / d^2 + sum S1^2 - 2 sqrt(2 / pi) (f / d) sum S1,
    without the last term where the sign is kept; c_null = 1 - sqrt(that) / norm(S1).

    Args:
        s1: the top K singular values of J1.
        frobenius: ||J1||_F, of the whole matrix.
        d_model: its width, d.
        normalizer: as in ``coupling``.
        absolute: as in ``coupling``.
    """
    k = s1.shape[-1]
    spread = frobenius / d_model
    expected = (k * spread) ** 2 + s1.square().sum(-1)
    if absolute:
        expected = expected - 2 * math.sqrt(2 / math.pi) * spread * s1.sum(-1)
    return 1 - expected.sqrt() / normalizer_of(s1, normalizer)


def subspace_overlap(basis1: Float[Tensor, "... d K"], basis2: Float[Tensor, "... d K"]) -> Float[Tensor, "..."]:
    """||B1^T B2||_F^2 / K, from 0 to 1; K / d for independent Haar-random subspaces."""
    return (basis1.mT @ basis2).square().sum((-2, -1)) / basis1.shape[-1]
