"""The choice between forming a Jacobian and multiplying by it."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, TOKENS

import tlcoupling as tlc
from tlcoupling.coupling.method import THIN_ON_DEVICE, cheapest, methods
from tlcoupling.jacobian.cost import Cost


def test_products_alone_give_the_same_coupling(monkeypatch: pytest.MonkeyPatch):
    """Where a Jacobian is too large to form, coupling is the same and the null is off by the error that is stated."""
    trace = tlc.trace(CASES[0].model(), TOKENS)
    formed = tlc.depth_coupling(trace, 4)
    assert formed.frobenius_error.max() == 0
    one = tlc.residual_jacobian(trace, 0)
    for index, name in ((1, "matrix dropped"), (2, "products")):
        chosen = lambda *arguments, index=index: methods(*arguments[:5])[index]  # noqa: E731
        assert chosen(one, 8, 2, 3, "auto", True).name == name
        monkeypatch.setattr("tlcoupling.coupling.schedule.cheapest", chosen)
        by_products = tlc.depth_coupling(trace, 4)
        torch.testing.assert_close(by_products.values, formed.values, rtol=0, atol=1e-9)
        assert bool(by_products.frobenius_error.max() > 0) is (name == "products")
    gap = (by_products.frobenius - formed.frobenius).abs() / formed.frobenius
    assert (by_products.frobenius_error > 0).all()
    assert (gap < 4 * by_products.frobenius_error).all()


@pytest.mark.usefixtures("unchecked")
def test_wide_jacobians_are_coupled_by_products():
    """At Llama-3-8B's sizes the products that 32 layers need cost less than the matrix; at SmolLM2's they do not."""
    wide, small = (
        Cost("analytic", 2.0 * weights, 2.0 * d * d * (mlp + 2 * d), *5 * (0.0,))
        for d, mlp, weights in ((4096, 14336, 218e6), (576, 1536, 3.54e6))
    )
    assert cheapest(wide, 4096, 10, 32, "auto", keep=True).name == "products"
    assert cheapest(small, 576, 10, 30, "auto", keep=True).name == "matrix kept"
    # SmolLM2's matrices are cheap enough to form that they are, even where they cannot be kept
    assert cheapest(small, 576, 10, 30, "auto", keep=False).name == "matrix dropped"
    assert cheapest(wide, 4096, 10, 32, "dense", keep=True).name == "matrix kept"
    # a device takes thin products far more slowly than products of matrices
    assert cheapest(wide, 4096, 10, 32, "auto", keep=True, thin=THIN_ON_DEVICE).name == "matrix kept"
