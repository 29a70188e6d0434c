"""Coupling of lens matrices with blocks against full SVDs of dense matrices, and chance against a fresh model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FEW, TOKENS, Case

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError

K = 4


@pytest.mark.parametrize("case", FEW, ids=str)
def test_it_is_its_definition(case: Case, tmp_path: Path):
    """The formula of the paper with NumPy's SVDs, of the lens's matrices and of the blocks' dense Jacobians."""
    model = case.model()
    trace = tlc.trace(model, TOKENS)
    lens = tlc.jacobian_lens(model, [TOKENS], skip_first_positions=0)
    found = tlc.lens_coupling(lens, trace, K, tokens=[2, -1])
    assert found.values.shape == (2, len(lens.layers), trace.n_layers)
    for at, pos in enumerate(found.positions):
        for row, matrix in enumerate(lens.matrices.double().numpy()):
            ours = matrix - np.eye(len(matrix))
            u1, s1, v1 = np.linalg.svd(ours)
            for block in range(trace.n_layers):
                dense = tlc.residual_jacobian(trace, block, "block", src=pos, dest=pos).dense().double().numpy()
                u2, _, v2 = np.linalg.svd(dense)
                inner = np.abs(u2[:, :K].T @ ours @ v2[:K].T)
                value = 1 - np.linalg.norm(inner - np.diag(s1[:K])) / np.linalg.norm(s1[:K])
                overlaps = [np.sum((u1[:, :K].T @ u2[:, :K]) ** 2) / K, np.sum((v1[:K] @ v2[:K].T) ** 2) / K]
                measured = [getattr(found, name)[at, row, block] for name in ("values", "overlap_u", "overlap_v")]
                # in float32 modules, vectors are as exact as their gaps allow
                np.testing.assert_allclose(measured, [value, *overlaps], atol=1e-9 if case.exact else 2e-3)
    again = tlc.load(found.save(tmp_path / "coupling"))
    assert torch.equal(again.excess, found.values - found.null) and "LensCoupling(2 layers x 3 blocks" in repr(again)


def test_unrelated_matrices_couple_by_chance():
    """Random matrices have the null's mean: of 40 each lies within four standard errors."""
    model = FEW[0].model()
    trace = tlc.trace(model, TOKENS)
    lens = tlc.jacobian_lens(model, [TOKENS], skip_first_positions=0)
    drawn = torch.randn(40, *lens.matrices.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layers = tuple(index % trace.n_layers for index in range(40))
    unrelated = replace(lens, matrices=drawn, squares=drawn.square().sum((1, 2)), layers=layers)
    found = tlc.lens_coupling(unrelated, trace, K)
    off = found.excess[0].mean(0) / (found.null_std[0].mean(0) / 40**0.5)
    assert off.abs().max() < 4
    for side in "uv":
        overlaps, null = (getattr(found, f"overlap_{name}{side}")[0] for name in ("", "null_"))
        spread = overlaps.std(0) / 40**0.5
        assert ((overlaps - null).mean(0).abs() < 4 * spread).all()


def test_a_lens_of_the_last_block_alone_is_that_block():
    """The transport over one block, from the last position that counts to itself, is that block and the identity."""
    model = FEW[0].model()
    tokens = TOKENS[:2]
    lens = tlc.jacobian_lens(model, [tokens], skip_first_positions=0)
    found = tlc.lens_coupling(lens, tlc.trace(model, tokens), K, tokens=0)
    for value in (found.values, found.overlap_u, found.overlap_v):
        torch.testing.assert_close(value[0, -1, -1], torch.ones_like(value[0, -1, -1]))


def test_bad_input():
    model = FEW[0].model()
    trace = tlc.trace(model, TOKENS)
    lens = tlc.jacobian_lens(model, [TOKENS], skip_first_positions=0)
    with pytest.raises(ArgumentError, match="k=33 "):
        tlc.lens_coupling(lens, trace, 33)
    with pytest.raises(ArgumentError, match="lens=.*a lens of other.*a lens of"):
        tlc.lens_coupling(replace(lens, provenance=replace(lens.provenance, model_name="other")), trace, K)
    with pytest.raises(ArgumentError, match="lens=.*of width 32"):
        tlc.lens_coupling(replace(lens, matrices=lens.matrices[:, :16, :16]), trace, K)
