"""A Jacobian that is held: its products are those of the weights that it was made with, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, TOKENS
from torch import Tensor

import tlcoupling as tlc
from tlcoupling.errors import StaleTraceError

CASE = CASES[0]


def swap_rows(weight: Tensor) -> None:
    weight.data[:2] = weight.data[:2].flip(0)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "scaled": lambda weight: weight.data.mul_(1.01),
    "one entry": lambda weight: weight.data[0, :1].neg_(),
    "rows swapped": swap_rows,
    "another tensor": lambda weight: setattr(weight, "data", weight.data + 1.0),
}


@pytest.mark.parametrize("engine", ["analytic", "autograd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_products_after_the_weights_changed_are_refused(change: str, dtype: torch.dtype, engine: str):
    model = CASE.build(dtype).eval()
    trace = tlc.trace(model, TOKENS)
    held = {layer: tlc.residual_jacobian(trace, layer, engine=engine) for layer in (0, 1)}
    vectors = torch.ones(trace.d_model, 2)
    before = held[0].mm(vectors)
    name, weight = next((n, p) for n, p in model.blocks[1].named_parameters() if p.ndim > 1)
    CHANGES[change](weight)
    composed = held[1].T @ held[1]
    for product in (held[1].mm, held[1].rmm, composed.mm):
        with pytest.raises(StaleTraceError, match=f"blocks.1.{name} has changed"):
            product(vectors)
    with pytest.raises(StaleTraceError):
        held[1].dense()
    assert torch.equal(held[0].mm(vectors), before)  # the block before it is as it was


def test_a_step_of_an_optimiser_is_noticed():
    model = CASE.build(torch.float32).eval()
    operator = tlc.residual_jacobian(tlc.trace(model, TOKENS), 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(TOKENS, return_type="loss").backward()
    optimiser.step()
    with pytest.raises(StaleTraceError, match="take its products, or its matrix by dense"):
        operator.mv(torch.ones(operator.shape[1]))


def test_the_matrix_and_its_costs_are_those_of_the_jacobian():
    operator = tlc.residual_jacobian(tlc.trace(CASE.model(), TOKENS), 1, "mlp")
    eye = torch.eye(operator.shape[0], dtype=operator.dtype)
    torch.testing.assert_close(operator.dense(), operator.mm(eye))
    torch.testing.assert_close(operator.dense().mT, operator.rmm(eye))
    assert operator.product_flops == operator.inner.product_flops
