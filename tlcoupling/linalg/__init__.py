"""Linear algebra without transformers.

``operator`` is a linear map defined by its products, and ``maps`` are the small maps that compose into it. ``svd``
computes the top singular triplets (``triplets``) of any operator and checks them. It takes the cheaper of ``dense``,
which decomposes the matrix, and ``krylov``, which needs only products. ``stack`` multiplies several operators at once.
"""
