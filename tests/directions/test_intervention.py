"""Interventions: projections as hooks, and a control with the same share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FEW, TOKENS, Case, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError

few = pytest.mark.parametrize("case", FEW, ids=str)
WIDTH = FEW[0].model().cfg.d_model


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@pytest.mark.parametrize(("site", "positions"), [("attn_out", None), ("mlp_out", (1, 4)), ("resid_pre", -1)])
def test_the_hooks_project(case: Case, site: str, positions: Any):
    """Against the projector D (D^T D)^-1 D^T, at the positions named and nowhere else."""
    model, directions = case.model(), random(WIDTH, 3)
    name = f"blocks.1.hook_{site}"
    if case.topology == "single" and site == "mlp_out":
        pytest.skip("no MLP")
    projector = directions @ torch.linalg.inv(directions.mT @ directions) @ directions.mT
    before = model.run_with_cache(TOKENS[None])[1][name][0]
    rows = list(range(7)) if positions is None else [6] if positions == -1 else [1, 4]
    for make, matrix in ((tlc.project_out, torch.eye(WIDTH) - projector), (tlc.keep_only, projector)):
        pair = make(directions, 1, site, positions)
        assert pair[0] == name
        seen: list[torch.Tensor] = []
        model.run_with_hooks(
            TOKENS[None], fwd_hooks=[pair, (name, lambda tensor, hook, seen=seen: seen.append(tensor))]
        )
        expected = before.clone()
        expected[rows] = before[rows] @ matrix.mT
        torch.testing.assert_close(seen[0][0], expected)
        trace = tlc.trace(model, TOKENS, fwd_hooks=[pair])
        if site != "resid_pre":
            # the write's Jacobian is projected with it, where its position is one of those
            sublayer = site.removesuffix("_out")
            truth = tlc.residual_jacobian(tlc.trace(model, TOKENS), 1, sublayer).dense()
            found = tlc.residual_jacobian(trace, 1, sublayer, engine="autograd").dense()
            assert relative_error(found, matrix @ truth if 6 in rows else truth) < case.tolerance


def test_one_subspace_for_each_position_and_batches():
    directions, activation = random(2, WIDTH, 3), random(4, 7, WIDTH, seed=1)
    _, act = tlc.project_out(directions, 0, "mlp_out", (0, -1))
    found = act(activation, hook=None)
    assert torch.equal(found[:, 1:-1], activation[:, 1:-1])
    for row, pos in enumerate((0, -1)):
        assert (found[:, pos] @ directions[row]).abs().max() < 1e-12
        taken = (activation - found)[:, pos].mT
        span = torch.linalg.qr(directions[row]).Q
        torch.testing.assert_close(span @ (span.mT @ taken), taken)
    assert torch.equal(activation, random(4, 7, WIDTH, seed=1))  # not edited in place


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), d=st.integers(3, 40), data=st.data())
def test_the_control_takes_the_same_share(seed: int, d: int, data: st.DataObject):
    k = data.draw(st.integers(1, d - 1))
    directions, activation = random(d, k, seed=seed), random(d, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    basis = tlc.random_directions(directions, activation, generator)
    assert basis.shape == (d, k)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(k, dtype=torch.float64))
    own = torch.linalg.qr(directions).Q
    torch.testing.assert_close((basis.mT @ activation).norm(), (own.mT @ activation).norm())
    for make in (tlc.project_out, tlc.keep_only):
        left = [make(each, 0)[1](activation[None, None], hook=None).norm() for each in (basis, directions)]
        torch.testing.assert_close(*left)


def test_the_control_is_otherwise_uniformly_random():
    """Its mean projector: rho^2 along a, the rest of its trace spread evenly over what is orthogonal to a."""
    d, k = 6, 2
    directions, activation = random(d, k), random(d, seed=1)
    generator = torch.Generator().manual_seed(0)
    draws = [tlc.random_directions(directions, activation, generator) for _ in range(1000)]
    mean = torch.stack([basis @ basis.mT for basis in draws]).mean(0)
    along = activation / activation.norm()
    share = (torch.linalg.qr(directions).Q.mT @ along).norm() ** 2
    line = torch.outer(along, along)
    expected = share * line + (k - share) / (d - 1) * (torch.eye(d) - line)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.06)  # entries of a projector, over sqrt(1000)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tlc.project_out(torch.zeros(4), 0), "linearly independent"),
        (lambda: tlc.project_out(torch.ones(4, 2), 0), "linearly independent"),
        (lambda: tlc.project_out(torch.full((4,), torch.nan), 0), "finite"),
        (lambda: tlc.keep_only(torch.ones(2, 4), 0), r"directions=\(2, 4\)"),
        (lambda: tlc.keep_only(torch.ones(()), 0), r"directions=\(\)"),
        (lambda: tlc.project_out(torch.ones(4), 0, "z"), "site='z' .*attn_out, mlp_out, resid_pre"),
        (lambda: tlc.project_out(torch.ones(4), -1), "layer=-1"),
        (lambda: tlc.project_out(torch.ones(4), 0)[1](torch.ones(1, 2, 5), hook=None), "directions of width 5"),
        (lambda: tlc.project_out(torch.ones(4), 0, positions=2)[1](torch.ones(1, 2, 4), hook=None), "positions=2 "),
        (
            lambda: tlc.project_out(torch.eye(4)[None, :, :2], 0)[1](torch.ones(1, 2, 4), hook=None),
            "each of 2 positions",
        ),
        (lambda: tlc.random_directions(torch.eye(4)[:, :2], torch.zeros(4)), "activation='a vector of length 0.0'"),
        (lambda: tlc.random_directions(torch.eye(4), torch.ones(4)), "fewer than d_model = 4"),
        (lambda: tlc.random_directions(torch.eye(4)[:, :2], torch.ones(5)), "activation"),
        (lambda: tlc.causal_effect(FEW[0].model(), [TOKENS[:1]], 2), "at least two tokens"),
        (lambda: tlc.causal_effect(FEW[0].model(), [TOKENS], 2, draws=0), "draws=0"),
        (lambda: tlc.causal_effect(FEW[0].model(), [], 2), "one or more"),
        (lambda: tlc.causal_effect(FEW[0].model(), [TOKENS], 2, sublayer="block"), "sublayer='block'"),
        (lambda: tlc.causal_effect(FEW[0].model(), [TOKENS], 0), "directions=0 .*from 1 to d_model"),
        (lambda: tlc.causal_effect(FEW[0].model(), [TOKENS], [5, 10]), r"directions=\[5, 10\] .*one number"),
        (lambda: tlc.causal_effect(FEW[0].model(), [TOKENS], 2, layers=[3]), "layers=3"),
    ],
)
def test_bad_input(call: Any, message: str):
    with pytest.raises(ArgumentError, match=message):
        call()
