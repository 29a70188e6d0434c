"""What slices and the atlas would cost, against the operations that are counted while they run."""

from __future__ import annotations

from typing import Any

import pytest
from cases import FEW, TOKENS, Case, fresh
from torch.utils.flop_counter import FlopCounterMode

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError

ENDS = ("resid_post", 0), ("resid_post", 2)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_slices_product_is_counted(case: Case):
    """To the share of the small steps, norms and slopes, which are large in a small model."""
    trace = tlc.trace(case.model(), TOKENS)
    said = tlc.estimate_slice(trace, *ENDS, k=2)
    product = tlc.slice_jacobian(trace, *ENDS).product_flops
    twice = tlc.estimate_slice(trace, *ENDS, k=2, src="all")
    d = trace.d_model
    # dense: one product for each of d unit vectors, then a full SVD
    decomposition = next(stage for stage in said.stages if stage.name == "decomposition").flops - 20.0 * d**3
    assert 0.7 < (decomposition - 8.0 * d**2 * 2) / (d * product) < 1.2
    assert twice.memory_bytes > said.memory_bytes and said.n_tokens == 7 and "GFLOP" in repr(said)


@pytest.mark.parametrize("where", [{}, {"src": "all"}], ids=["last", "same"])
def test_an_atlas_is_counted_within_a_factor_of_two(where: dict[str, Any]):
    trace = tlc.trace(fresh(0, n_layers=6), TOKENS)
    said = tlc.estimate_atlas(trace, 2, **where)
    with FlopCounterMode(display=False) as counter:
        tlc.sensitivity_atlas(trace, 2, **where)
    counted = sum(stage.flops for stage in said.stages if stage.name != "decomposition")
    decomposed = next(stage.flops for stage in said.stages if stage.name == "decomposition")
    # a decomposition is not counted as it runs, but for the products in it
    assert counted / 2 < counter.get_total_flops() < 2 * (counted + decomposed)


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
