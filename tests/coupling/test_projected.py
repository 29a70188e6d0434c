"""Projected Jacobians: their numbers, their null, their tables and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from analyses import projected_by_hand
from cases import FEW, TOKENS, Case, fresh

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError


@pytest.mark.parametrize("bases", ["uv", "vu"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_projected_jacobians_are_those_of_dense_decompositions(case: Case, bases: str):
    """Absolute values, the diagonal with its sign, and the coupling and null that ``depth_coupling`` gives."""
    trace = tlc.trace(case.model(), TOKENS)
    layers, k, pos = [2, 0], 4, 3
    found = tlc.projected_jacobians(trace, layers, k, token=pos, bases=bases)
    coupling = tlc.depth_coupling(trace, k, layers=layers, tokens=pos, bases=bases)
    assert found.values.shape == (len(trace.sublayers), 2, 2, k, k)
    torch.testing.assert_close(found.coupling, coupling.values[:, 0, 0])
    # of the whole width, of which a norm may project out two directions on one side
    torch.testing.assert_close(found.null, coupling.null[:, 0, 0, :, 0], rtol=2 / trace.d_model, atol=0)
    for s, sublayer in enumerate(trace.sublayers):
        dense = [tlc.residual_jacobian(trace, n, sublayer, pos, pos, engine="autograd").dense() for n in layers]
        decomposed = [torch.linalg.svd(jacobian) for jacobian in dense]
        for row, j1 in enumerate(dense):
            for column, (u, _, vh) in enumerate(decomposed):
                left, right = (u[:, :k], vh[:k].mT) if bases == "uv" else (vh[:k].mT, u[:, :k])
                truth, tolerance = left.mT @ j1 @ right, 1e3 * case.tolerance * float(j1.norm())
                torch.testing.assert_close(found.values[s, row, column].abs(), truth.abs(), atol=tolerance, rtol=0)
                torch.testing.assert_close(
                    found.values[s, row, column].diagonal(), truth.diagonal(), atol=tolerance, rtol=0
                )
            torch.testing.assert_close(
                found.singular_values[s, row], decomposed[row].S[:k], atol=1e3 * case.tolerance, rtol=1e-5
            )
            torch.testing.assert_close(found.frobenius[s, row], j1.norm(), rtol=1e-5, atol=0)


def test_the_null_of_an_entry_is_what_random_bases_give():
    """Mean |u' J v| over 2000 Haar pairs, within four standard errors and the normal approximation's 1/d."""
    d, draws = 64, 2000
    jacobian = torch.diag(torch.arange(1, d + 1, dtype=torch.float64) ** -0.5)
    u, v = (torch.nn.functional.normalize(each, dim=-1) for each in torch.randn(2, draws, d, dtype=torch.float64))
    entries = ((u @ jacobian) * v).sum(-1).abs()
    by_hand = replace(projected_by_hand(2), d_model=d, frobenius=jacobian.norm().expand(1, 2))
    assert abs(entries.mean() / by_hand.null_entry[0, 0] - 1) < 4 * entries.std() / entries.mean() / draws**0.5 + 1 / d


def test_projected_jacobians_are_saved_and_tabled(tmp_path: Path):
    result = projected_by_hand(3)
    again = tlc.load(result.save(tmp_path / "projected.safetensors"))
    torch.testing.assert_close(again.values, result.values)
    assert (again.layers, again.token, again.d_model) == (result.layers, result.token, 32)
    frame = result.to_dataframe()
    assert len(frame[frame.quantity == "values"]) == result.values.numel()
    assert "layers 0, 2, 4" in repr(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [0, 3]}, "layers=3 is not allowed; allowed: an int from -3 to 2"),
        ({"layers": [1, 1]}, "one or more different indices"),
        ({"layers": [0], "k": [2, 3]}, r"k=\[2, 3\] is not allowed; allowed: one number"),
        ({"layers": [0], "token": 9}, "token=9 is not allowed"),
        ({"layers": [0], "sublayers": "head"}, "sublayers='head'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_projected_is_an_error(arguments: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.projected_jacobians(tlc.trace(fresh(0), TOKENS), **arguments)
