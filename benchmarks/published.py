"""The published procedure for depth-wise coupling, as the paper's authors describe and release it.

For each block, it takes one vector-Jacobian product over the whole sequence for each of the d output coordinates of the
last token, subtracts the identity, and computes a full SVD. Then it computes the misalignment of each pair of blocks.
It uses the plain HuggingFace model without hooks. Source: arXiv 2407.07810, section 3, and its published code. This
implementation is our own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def block_calls(model: Any, token_ids: Tensor) -> list[tuple[Any, tuple, dict]]:
    """Return each decoder block of a HuggingFace model, with the arguments of its call."""
    calls: list[tuple[Any, tuple, dict]] = []
    layers = model.get_decoder().layers

    def capture(module: Any, args: tuple, kwargs: dict) -> None:
        calls.append((module, args, kwargs))

    handles = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            model(token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def block_jacobian(block: Any, args: tuple, kwargs: dict, n_rows: int | None = None) -> Tensor:
    """Return the last token's residual Jacobian of one block, row by row; ``n_rows`` limits them, for extrapolation."""
    stream = (args[0] if args else kwargs["hidden_states"]).detach().clone().requires_grad_()
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    out = block(stream, *args[1:], **rest)
    out = (out[0] if isinstance(out, tuple) else out)[0, -1]
    rows = [torch.autograd.grad(out[index], stream, retain_graph=True)[0][0, -1] for index in range(n_rows or len(out))]
    jacobian = torch.stack(rows)
    return jacobian - torch.eye(*jacobian.shape) if n_rows is None else jacobian


def misalignment(jacobians: list[Tensor], k: int) -> Tensor:
    """Return || abs(U2^T J1 V2) - S1 ||_F / ||S1||_F of each ordered pair, from full SVDs."""
    decompositions = [torch.linalg.svd(jacobian) for jacobian in jacobians]
    matrix = torch.zeros(len(jacobians), len(jacobians))
    for row, (jacobian, (_, s1, _)) in enumerate(zip(jacobians, decompositions, strict=True)):
        for column, (u2, _, vh2) in enumerate(decompositions):
            aligned = (u2[:, :k].T @ jacobian @ vh2[:k].T).abs()
            matrix[row, column] = (aligned - s1[:k].diag()).norm() / s1[:k].norm()
    return matrix


def depth_misalignment(model: Any, token_ids: Tensor, k: int) -> Tensor:
    """Run the whole published procedure for one prompt; return the misalignment ``[layer, layer]``."""
    return misalignment([block_jacobian(*call) for call in block_calls(model, token_ids)], k)
