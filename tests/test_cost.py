"""The cost of Jacobians, known from shapes before anything is run."""

from __future__ import annotations

import pytest
from cases import CASES, TOKENS, Case

import tlcoupling as tlc
from tlcoupling.jacobian.cost import layer_costs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_tell_the_work_of_the_operators(case: Case):
    trace = tlc.trace(case.model(), TOKENS)
    for layer, costs in layer_costs(trace.model, range(trace.n_layers), trace.topology, trace.n_tokens).items():
        assert set(costs) == set(trace.sublayers)
        for sublayer, cost in costs.items():
            operator = tlc.residual_jacobian(trace, layer, sublayer)
            analytic = sublayer in case.analytic and (sublayer != "block" or set(trace.sublayers) <= {*case.analytic})
            if (cost.engine == "analytic") is not analytic:
                continue  # shapes alone do not tell that a norm of queries is none that is known
            # a norm behind one of the small maps is counted or not: a few per cent here, less in wide models
            assert cost.product_flops == pytest.approx(operator.product_flops, rel=0.05)
            assert cost.dense_flops == pytest.approx(operator.dense_flops, rel=0.05)
