"""Linear algebra that knows no transformer.

``operator`` is a linear map known by its products, and ``maps`` the small maps that compose under it. ``svd`` finds the
top singular triplets (``triplets``) of any operator: it chooses between ``dense``, which decomposes the matrix, and
``krylov``, which needs only products, by cost, and checks what it returns; ``stack`` decomposes several at once.
"""
