"""Truncated singular value decompositions of linear operators.

Solvers know operators only by their products: ``dense`` decomposes the matrix, ``krylov`` needs only products with J
and J^T. ``truncated_svd`` chooses between them by cost and checks what it returns.
"""

from tlcoupling.svd.auto import truncated_svd, truncated_svds
from tlcoupling.svd.triplets import Triplets

__all__ = ["Triplets", "truncated_svd", "truncated_svds"]
