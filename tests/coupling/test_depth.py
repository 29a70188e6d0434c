"""Depth-wise coupling of small models, against a plain computation."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import CASES, FEW, TOKENS, Case
from oracle import plain_coupling

import tlcoupling as tlc
from tlcoupling.coupling.null import null_coupling, null_std
from tlcoupling.errors import ArgumentError


@pytest.mark.parametrize(
    ("case", "normalizer", "bases", "absolute"),
    [(case, "frobenius", "uv", True) for case in CASES]
    + [(case, *rest) for case in FEW[:4] for rest in product(("frobenius", "trace"), ("uv", "vu"), (True, False))],
    ids=str,
)
def test_depth_coupling_is_the_formula(case: Case, normalizer: str, bases: str, absolute: bool):
    trace = tlc.trace(case.model(), TOKENS)
    found = tlc.depth_coupling(trace, [2, 5], tokens=[3, -1], normalizer=normalizer, bases=bases, absolute=absolute)
    assert found.values.shape == (len(trace.sublayers), 2, 2, trace.n_layers, trace.n_layers)
    for s, sublayer in enumerate(trace.sublayers):
        pos = 6
        jacobians = [
            tlc.residual_jacobian(trace, layer, sublayer, pos, pos, engine="autograd").dense()
            for layer in range(trace.n_layers)
        ]
        for i, k in enumerate(found.ks):
            for row, j1 in enumerate(jacobians):
                for column, j2 in enumerate(jacobians):
                    truth = plain_coupling(j1, j2, k, normalizer, bases, absolute)
                    # singular vectors move by the engines' gap over that of the singular values
                    assert abs(float(found.values[s, 1, i, row, column]) - truth) < 1e3 * case.tolerance


@pytest.mark.parametrize("stacked", [1, 2**22], ids=["one at a time", "stacks"])
@pytest.mark.parametrize("case", FEW[:4], ids=str)
def test_workers_change_no_number(case: Case, stacked: int, monkeypatch: pytest.MonkeyPatch):
    """1e-7: a residual of 1e-10 moves a vector by that over its gap, which is above 1e-3."""
    trace = tlc.trace(case.model(), TOKENS)

    def measured() -> list[torch.Tensor]:
        depth = tlc.depth_coupling(trace, 2, tokens="all", solver="krylov")
        return [depth.values, depth.overlap_u, tlc.token_coupling(trace, 2).values]

    alone = measured()
    threads = torch.get_num_threads()
    monkeypatch.setattr("tlcoupling.coupling.schedule._most_workers", lambda *_: 3)
    monkeypatch.setattr("tlcoupling.coupling.schedule.STACKED", stacked)
    for found, expected in zip(measured(), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert torch.get_num_threads() == threads
    with pytest.raises(ArgumentError, match=r"k=33 "):
        tlc.depth_coupling(trace, 33)
    assert torch.get_num_threads() == threads


def test_overlap_and_null_of_a_model():
    case = CASES[0]
    trace = tlc.trace(case.model(), TOKENS)
    found = tlc.depth_coupling(trace, 4)
    for s, sublayer in enumerate(found.sublayers):
        jacobians = [
            tlc.residual_jacobian(trace, layer, sublayer, engine="autograd").dense() for layer in range(trace.n_layers)
        ]
        parts = [torch.linalg.svd(jacobian) for jacobian in jacobians]
        for row, (u1, s1, vh1) in enumerate(parts):
            for column, (u2, _, vh2) in enumerate(parts):
                width = found.null_width[s, 0, row, column]
                null = null_coupling(s1[:4], jacobians[row].norm(), trace.d_model, width=width)
                spread = null_std(s1[:4], jacobians[row].norm(), trace.d_model, width=width)
                assert abs(found.null[s, 0, 0, row, column] - null) < 1e-6
                assert abs(found.null_std[s, 0, 0, row, column] - spread) < 1e-6
                truth = (u1[:, :4].mT @ u2[:, :4]).square().sum() / 4
                assert abs(found.overlap_u[s, 0, 0, row, column] - truth) < 1e-6
                truth = (vh1[:4] @ vh2[:4].mT).square().sum() / 4
                assert abs(found.overlap_v[s, 0, 0, row, column] - truth) < 1e-6
            # HuggingFace's modules cast to float32 inside, and the last position is run without the others
            torch.testing.assert_close(found.frobenius[s, 0, row], jacobians[row].norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.overlap_null, torch.tensor([4 / 32], dtype=torch.float64))
    # a module reads through a norm, which projects out the stream of its token: widths of 30 or 31 where tokens agree
    for null in (found.overlap_null_u, found.overlap_null_v):
        assert ((null > 4 / 32 - 1e-3) & (null < 4 / 30 + 1e-6)).all()
        torch.testing.assert_close(null, null.mT)
    sides = 4 / found.overlap_null_u, 4 / found.overlap_null_v
    torch.testing.assert_close(found.null_width, (sides[0] * sides[1]).sqrt()[:, :, 0])
    assert torch.equal(found.excess, found.values - found.null)
    assert torch.equal(found.z, found.excess / found.null_std)
    diagonal = found.values.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal))


@pytest.mark.usefixtures("unchecked")
def test_summaries_leave_the_diagonal_out():
    found = tlc.depth_coupling(tlc.trace(CASES[0].model(), TOKENS), 4, sublayers="block")
    matrix = found.values[0, 0, 0]
    pairs = [matrix[i, j] for i in range(3) for j in range(3) if i != j]
    torch.testing.assert_close(found.mean()[0, 0, 0], torch.stack(pairs).mean())
    near = torch.stack([matrix[0, 1], matrix[1, 0], matrix[1, 2], matrix[2, 1]]).mean()
    far = torch.stack([matrix[0, 2], matrix[2, 0]]).mean()
    torch.testing.assert_close(found.profile()[0, 0, 0], torch.stack([near, far]))
    with pytest.raises(ArgumentError, match="quantity='coupling'"):
        found.mean("coupling")


def test_one_layer_has_no_pairs():
    found = tlc.depth_coupling(tlc.trace(CASES[0].model(), TOKENS), 4, layers=[1])
    assert found.mean().isnan().all()
    assert found.profile().shape[-1] == 0


def test_layers_tokens_and_fractions():
    trace = tlc.trace(CASES[0].model(), TOKENS)
    every = tlc.depth_coupling(trace, [0.1, 4], tokens="all", sublayers=("mlp", "block"))
    assert every.ks == (3, 4)
    assert every.positions == tuple(range(7))
    some = tlc.depth_coupling(trace, 4, tokens=[2], layers=[2, 0], sublayers="block")
    assert some.layers == (2, 0)
    torch.testing.assert_close(some.values[0, 0, 0, 0, 1], every.values[1, 2, 1, 2, 0], rtol=1e-6, atol=1e-8)
    autograd = tlc.depth_coupling(trace, 4, tokens=[2], sublayers="block", engine="autograd")
    assert autograd.provenance.engine == {"block": "autograd"}
    torch.testing.assert_close(autograd.values, every.values[1:, 2:3, 1:], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k=0 .*from 1 to d_model = 32"),
        ({"k": 33}, r"k=33 .*from 1 to d_model = 32"),
        ({"k": 1.5}, r"k=1.5 "),
        ({"k": []}, r"k=\[\] "),
        ({"k": 32}, r"k=32 .*numerical rank of this Jacobian \(.* of layer 0, token 6\)"),
        ({"tokens": 7}, r"tokens=7 .*from -7 to 6"),
        ({"tokens": []}, r"tokens=\[\] .*one or more"),
        ({"tokens": [0, -7]}, r"tokens=\[0, -7\] .*different"),
        ({"tokens": "last"}, r"tokens='last' .*'all'"),
        ({"layers": [3]}, r"layers=3 .*from -3 to 2"),
        ({"layers": [True]}, r"layers=True"),
        ({"sublayers": "head"}, r"sublayers='head' .*block, attn, mlp"),
        ({"sublayers": ()}, r"sublayers=\(\)"),
        ({"normalizer": "nuclear"}, r"normalizer='nuclear' .*frobenius, trace"),
        ({"bases": "uu"}, r"bases='uu' .*uv, vu"),
        ({"engine": "jax"}, r"engine='jax' .*auto, analytic, autograd"),
        ({"solver": "magic"}, r"solver='magic' .*auto, dense, krylov"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    trace = tlc.trace(CASES[0].model(), TOKENS)
    with pytest.raises(ArgumentError, match=message):
        tlc.depth_coupling(trace, **{"k": 4, **arguments})
