"""Modules in the place of hook points, as SAELens attaches its autoencoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases import D_MODEL
from torch import Tensor, nn

import tlcoupling as tlc
from tlcoupling.errors import HookError
from tlcoupling.forward.trace import Trace


class Autoencoder(nn.Module):
    """A random autoencoder of the stream; its error term, if it has one, carries no derivative."""

    def __init__(self, error_term: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = 0.2 * torch.randn(2, D_MODEL, D_MODEL, generator=generator, dtype=torch.float64)
        self.encoder, self.decoder = nn.Parameter(weight[0]), nn.Parameter(weight[1])
        self.error_term = error_term

    def forward(self, activation: Tensor) -> Tensor:
        out = torch.nn.functional.softplus(activation @ self.encoder) @ self.decoder
        return out + (activation - out).detach() if self.error_term else out


@contextmanager
def put_in_place(model: Any, name: str, module: nn.Module) -> Iterator[None]:
    """Run a model with a module in the place of a hook point, which TransformerLens then no longer knows."""
    *path, last = name.split(".")
    parent = model
    for part in path:
        parent = getattr(parent, part)
    before = getattr(parent, last)
    setattr(parent, last, module)
    try:
        yield
    finally:
        setattr(parent, last, before)


def differences(trace: Trace, layer: int) -> Tensor:
    """The Jacobian of a block at the last token by central differences of the block itself, without its skip."""
    step, stream = 1e-5, trace.block_input(layer)
    columns = []
    with torch.no_grad():
        for column in range(trace.d_model):
            moved = torch.zeros_like(stream)
            moved[0, -1, column] = step
            ahead, back = (trace.run_block(layer, stream + sign * moved, {})[0, -1] for sign in (1, -1))
            columns.append((ahead - back) / (2 * step))
    return torch.stack(columns, dim=1) - torch.eye(trace.d_model, dtype=stream.dtype)


def right_or_hook_error(trace: Trace, layer: int, error_term: bool) -> None:
    """Without an error term the Jacobian is that of the block; with one, autograd cannot see it, and says so."""
    if error_term:
        try:
            tlc.residual_jacobian(trace, layer, "block").dense()
        except HookError as error:
            assert "autograd does not see all" in str(error)
            return
        raise AssertionError("a Jacobian without the derivative of the error term")
    found = tlc.residual_jacobian(trace, layer, "block").dense()
    # differences of step h are right to h^2 = 1e-10 and to rounding over h, 1e-11, times the curvature of a softplus
    assert (found - differences(trace, layer)).norm() <= 1e-6 * found.norm()
