"""What slices and the atlas would cost, against the operations that are counted while they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FEW, TOKENS, Case, fresh

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.slices.routes import Routes

ENDS = ("resid_post", 0), ("resid_post", 2)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_slices_product_is_counted_within_a_factor_of_two(case: Case):
    """Norms and slopes are left out, and biases counted: in a small model neither is small."""
    trace = tlc.trace(case.model(), TOKENS)
    said = tlc.estimate_slice(trace, *ENDS, k=2)
    product, d = tlc.slice_jacobian(trace, *ENDS).product_flops, trace.d_model
    svd = 20.0 * d**3 + 16.0 * d**2  # of the matrix, which one product for each of d unit vectors gives
    decomposition = next(stage for stage in said.stages if stage.name == "decomposition")
    assert 0.5 < (decomposition.flops - svd) / (d * product) < 2
    stacked = tlc.estimate_slice(trace, *ENDS, k=2, src="all")
    assert stacked.memory_bytes > said.memory_bytes and said.n_tokens == 7 and "GFLOP" in repr(said)


@pytest.mark.parametrize("where", [{}, {"src": "all"}], ids=["last", "same"])
def test_a_sweep_is_counted_within_a_factor_of_two(where: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    trace = tlc.trace(fresh(0, n_layers=5), TOKENS)
    through, counted = Routes.through, 0.0

    def counting(self: Routes, operator: JacobianOperator, vectors: torch.Tensor) -> torch.Tensor:
        nonlocal counted
        counted += operator.product_flops * vectors.shape[1]
        return through(self, operator, vectors)

    monkeypatch.setattr(Routes, "through", counting)
    tlc.sensitivity_atlas(trace, 2, **where)
    sweep = next(stage for stage in tlc.estimate_atlas(trace, 2, **where).stages if stage.name == "sweep")
    assert counted / 2 < sweep.flops < 2 * counted


def test_bad_input(unchecked: None):
    trace = tlc.trace(fresh(0), TOKENS)
    for call, message in (
        (lambda: tlc.estimate_slice(trace, *reversed(ENDS)), "comes after source"),
        (lambda: tlc.estimate_slice(trace, *ENDS, k=97), "k=97 "),
        (lambda: tlc.estimate_slice(trace, *ENDS, src_mode="sum"), "src_mode='sum' "),
        (lambda: tlc.estimate_atlas(trace, src=9), "src=9 "),
        (lambda: tlc.estimate_atlas(trace, 0), "k=0 "),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
