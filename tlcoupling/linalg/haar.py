"""Random orthonormal frames."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def haar_of(normal: Float[Tensor, "*batch d k"]) -> Float[Tensor, "*batch d k"]:
    """Return orthonormal columns that are Haar-random where the entries are independent and normal.

    Q of a QR decomposition is, once R's diagonal is positive: Mezzadri, "How to generate random matrices from the
    classical compact groups", 2007.
    """
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
