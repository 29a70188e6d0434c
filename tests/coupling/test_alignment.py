"""Alignment of heads: whose directions they serve."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case
from oracle import NORMED, REPRESENTATIVE, head_jacobians

import tlcoupling as tlc
from tlcoupling.coupling.alignment import _aligned

each_case = pytest.mark.parametrize("case", [*REPRESENTATIVE, *NORMED], ids=str)


@each_case
@pytest.mark.parametrize("of", ["block", "attn"])
def test_head_alignment_is_the_formula(case: Case, case_trace: tlc.Trace, of: str):
    found = tlc.head_alignment(case_trace, [1, 5], of=of, token=5, layers=[0, 2])
    for i, layer in enumerate(found.layers):
        whole = tlc.residual_jacobian(case_trace, layer, of, 5, 5, engine="autograd").dense()
        u, _, vh = torch.linalg.svd(whole)
        for h, jacobian in enumerate(head_jacobians(case_trace, layer, 5)):
            total = float((jacobian**2).sum())
            for j, k in enumerate(found.ks):
                close = {"rtol": 0, "atol": 1e3 * case.tolerance}
                writes = float(((u[:, :k].mT @ jacobian) ** 2).sum()) / total
                reads = float(((jacobian @ vh[:k].mT) ** 2).sum()) / total
                torch.testing.assert_close(found.writes[i, j, h].item(), writes, **close)
                torch.testing.assert_close(found.reads[i, j, h].item(), reads, **close)
            torch.testing.assert_close(found.frobenius[i, h], jacobian.norm(), rtol=10 * case.tolerance, atol=0)
    assert found.null.tolist() == [1 / 32, 5 / 32]
    assert torch.equal(found.z_writes, (found.writes - found.null[:, None]) / found.null_std)


@pytest.mark.parametrize("d_head", [4, 16])
def test_the_chance_of_alignment_is_what_random_directions_give(d_head: int):
    """Mean and standard deviation of 600 draws, within four standard errors: both are exact."""
    d, ks, draws = 48, (1, 7, 48), 600
    generator = torch.Generator().manual_seed(0)
    out, inner = torch.randn(2, d, d_head, generator=generator, dtype=torch.float64)
    jacobian = out @ inner.mT
    shares = []
    for _ in range(draws):
        u, v = torch.linalg.qr(torch.randn(2, d, d, generator=generator, dtype=torch.float64)).Q
        found = _aligned(jacobian, u, v, ks, d_head)
        shares += [found["writes"], found["reads"]]
    values = torch.stack(shares)
    null = torch.tensor(ks, dtype=torch.float64) / d
    error = values.std(0) / math.sqrt(2 * draws)
    assert ((values.mean(0) - null).abs() <= 4 * error + 1e-12).all()
    spread = values.std(0)[:2] / found["null_std"][:2]
    assert ((spread - 1).abs() < 4 * math.sqrt(3 / (8 * draws))).all()  # a share of few directions is near chi-square
    assert found["null_std"][2] < 1e-6  # all directions hold all of it
