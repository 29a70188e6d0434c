"""The dense solver: a full SVD of the matrix, cut to K."""

from __future__ import annotations

import torch

from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.linalg.triplets import Triplets, residuals


def dense_svd(operator: JacobianOperator, k: int) -> Triplets:
    """Return the top k triplets from ``torch.linalg.svd`` of the matrix."""
    matrix = operator.dense()
    u, spectrum, vh = torch.linalg.svd(matrix, full_matrices=False)
    u, s, v = u[:, :k], spectrum[:k], vh[:k].mT
    next_s = spectrum[k] if k < len(spectrum) else s.new_zeros(())
    residual = residuals(matrix @ v, matrix.mT @ u, u, s, v) / s
    return Triplets(u, s, v, next_s, residual, torch.ones_like(s, dtype=torch.bool), "dense")
