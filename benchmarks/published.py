"""The published procedure for depth-wise coupling, as the paper's authors run it.

One forward pass keeps the graph of the whole model. For each block, vector-Jacobian products of the last token's output
with the rows of the identity give the Jacobian over the whole sequence. ``torch.func.vmap`` takes the rows in
2 * (T // 20) + 5 chunks, T being the number of tokens. The identity is subtracted, and a full SVD is computed. Then the
misalignment of each pair of blocks is computed. It uses the plain HuggingFace model without hooks, and
``hidden_states``, of which the last includes the final norm. Source: arXiv 2407.07810, section 3, and its published
code. This implementation is our own.

``batched=False`` takes one product at a time instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def chunks(n_tokens: int) -> int:
    """Return the number of chunks that the authors' code takes for a prompt."""
    return 2 * (n_tokens // 20) + 5


def jacobian_rows(output: Tensor, stream: Tensor, rows: Tensor, chunk: int | None) -> Tensor:
    """Return the last token's part of products with some rows, ``chunk`` at a time; None takes one after the other."""

    def pull(row: Tensor) -> Tensor:
        return torch.autograd.grad(output, stream, row, retain_graph=True)[0][0, -1]

    return torch.stack([pull(row) for row in rows]) if chunk is None else torch.func.vmap(pull, chunk_size=chunk)(rows)


def block_jacobians(model: Any, token_ids: Tensor, batched: bool = True, n_rows: int | None = None) -> Iterator[Tensor]:
    """Yield the last token's residual Jacobian of each block, or only some of its first rows, for extrapolation."""
    hidden = model(token_ids, output_hidden_states=True, use_cache=False).hidden_states
    eye = torch.eye(hidden[0].shape[-1], dtype=hidden[0].dtype, device=hidden[0].device)
    chunk = -(-len(eye) // chunks(token_ids.shape[-1])) if batched else None
    for before, after in pairwise(hidden):
        yield jacobian_rows(after[0, -1], before, eye[:n_rows], chunk) - eye[:n_rows]


def misalignment(jacobians: list[Tensor], k: int) -> Tensor:
    """Return || abs(U2^T J1 V2) - S1 ||_F / ||S1||_F of each ordered pair, from full SVDs."""
    decompositions = [torch.linalg.svd(jacobian) for jacobian in jacobians]
    matrix = jacobians[0].new_zeros(len(jacobians), len(jacobians))
    for row, (jacobian, (_, s1, _)) in enumerate(zip(jacobians, decompositions, strict=True)):
        for column, (u2, _, vh2) in enumerate(decompositions):
            aligned = (u2[:, :k].T @ jacobian @ vh2[:k].T).abs()
            matrix[row, column] = (aligned - s1[:k].diag()).norm() / s1[:k].norm()
    return matrix


def depth_misalignment(model: Any, token_ids: Tensor, k: int) -> Tensor:
    """Run the whole published procedure for one prompt ``[1, pos]``; return the misalignment ``[layer, layer]``."""
    return misalignment(list(block_jacobians(model, token_ids)), k)
