"""Linear algebra without transformers.

``operator`` is a linear map known by its products, with ``@``, ``+`` and ``.T``; ``maps`` are elementary ones. ``svd``
computes the top singular triplets (``triplets``) of any operator: it chooses between ``dense``, which decomposes the
matrix, and ``krylov``, which needs only products, by cost, and checks the result; ``stack`` decomposes several at once.
"""
