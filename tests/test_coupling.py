"""Coupling: the metric's formulas, its null, and depth-wise coupling of small models against a plain computation."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, FEW, TOKENS, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import plain_coupling

import tlcoupling as tlc
from tlcoupling.coupling.method import cheapest, methods
from tlcoupling.coupling.metric import coupling, null_coupling, null_std, subspace_overlap
from tlcoupling.errors import ArgumentError


def haar(d: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return haar_of(torch.randn(d, k, generator=generator, dtype=torch.float64))


def haar_of(normal: torch.Tensor) -> torch.Tensor:
    """Haar-random bases of normal columns; Q alone is not, since LAPACK leaves the signs of R's diagonal to itself."""
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


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


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(8, 40), fraction=st.floats(0.05, 1.0))
def test_properties_of_the_metric(seed: int, d: int, fraction: float):
    torch.manual_seed(seed)
    k = max(1, int(fraction * d))
    j1, j2 = torch.randn(2, d, d, dtype=torch.float64)
    (u1, s1, vh1), (u2, _, vh2) = torch.linalg.svd(j1), torch.linalg.svd(j2)
    u1, v1, u2, v2, s1 = u1[:, :k], vh1[:k].mT, u2[:, :k], vh2[:k].mT, s1[:k]
    for normalizer in ("frobenius", "trace"):
        for absolute in (True, False):
            with_itself = coupling(u1.mT @ j1 @ v1, s1, normalizer, absolute)
            assert abs(with_itself - 1) < 1e-9
            value = coupling(u2.mT @ j1 @ v2, s1, normalizer, absolute)
            assert value <= 1
            flips = torch.randint(0, 2, (k,)).double() * 2 - 1
            flipped = coupling((u2 * flips).mT @ j1 @ (v2 * flips), s1, normalizer, absolute)
            if absolute:  # off-diagonal signs flip with the pairs, their absolute values do not
                torch.testing.assert_close(flipped, value)
            scaled = coupling(3 * (u2.mT @ j1 @ v2), 3 * s1, normalizer, absolute)
            torch.testing.assert_close(scaled, value)
        # what is lost by keeping signs cannot be gained: |M| lies no further from a positive diagonal on the diagonal
        assert coupling(u1.mT @ j1 @ v1, s1, normalizer, True) >= value - 1e-9
    overlap = subspace_overlap(u1.mT @ u2)
    assert -1e-12 <= overlap <= 1 + 1e-12
    assert abs(subspace_overlap(u1.mT @ u1) - 1) < 1e-9


def test_a_flipped_pair_of_vectors_keeps_its_diagonal():
    """Anti-alignment is real: it survives any choice of signs within the pairs."""
    jacobian = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    bases = torch.eye(3)
    opposite = coupling(bases.mT @ -jacobian @ bases, torch.tensor([3.0, 2.0, 1.0]), absolute=False)
    assert abs(opposite - (1 - 2.0)) < 1e-6  # || -S - S || / || S || = 2
    assert abs(coupling(bases.mT @ -jacobian @ bases, torch.tensor([3.0, 2.0, 1.0])) - 1) < 1e-6


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("normalizer", ["frobenius", "trace"])
def test_the_null_is_what_random_bases_give(absolute: bool, normalizer: str):
    """Mean coupling over 400 draws of Haar bases, within three standard errors and the formula's own O(1/d) error."""
    d, k, draws = 200, 10, 400
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    jacobian = haar(d, d, generator) * spectrum @ haar(d, d, generator).mT
    values = torch.stack(
        [
            coupling(haar(d, k, generator).mT @ jacobian @ haar(d, k, generator), spectrum[:k], normalizer, absolute)
            for _ in range(draws)
        ]
    )
    null = null_coupling(spectrum[:k], spectrum.norm(), d, normalizer, absolute)
    error = values.std() / math.sqrt(draws)
    assert abs(values.mean() - null) < 3 * error + 1 / d**1.5


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    decay=st.sampled_from([0.0, 0.5, 2.0]),
    k=st.sampled_from([1, 5, 20]),
    normalizer=st.sampled_from(["frobenius", "trace"]),
    absolute=st.booleans(),
)
def test_the_spread_of_the_null_is_what_random_bases_give(
    seed: int, decay: float, k: int, normalizer: str, absolute: bool
):
    """Of flat, slowly and fast falling spectra, over 1000 draws of Haar bases."""
    d, draws = 64, 1000
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    bases = torch.randn(2, draws, d, k, generator=generator, dtype=torch.float64)
    u, v = haar_of(bases)
    values = coupling(u.mT * spectrum @ v, spectrum[:k].expand(draws, k), normalizer, absolute)
    predicted = null_std(spectrum[:k], spectrum.norm(), d, normalizer, absolute)
    kurtosis = ((values - values.mean()) / values.std()).pow(4).mean()
    sampling = math.sqrt((kurtosis - 1) / (4 * draws))  # relative standard error of a standard deviation
    # and one part in ten for the first-order formula at this width
    assert abs(values.std() / predicted - 1) < 4 * sampling + 0.1
    torch.testing.assert_close(
        null_std(7e-12 * spectrum[:k], 7e-12 * spectrum.norm(), d, normalizer, absolute), predicted
    )


def test_the_null_of_the_overlap_is_k_over_d():
    generator = torch.Generator().manual_seed(1)
    overlaps = torch.stack([subspace_overlap(haar(100, 7, generator).mT @ haar(100, 7, generator)) for _ in range(300)])
    assert abs(overlaps.mean() - 0.07) < 3 * overlaps.std() / math.sqrt(300)


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
            null = null_coupling(s1[:4], jacobians[row].norm(), trace.d_model)
            spread = null_std(s1[:4], jacobians[row].norm(), trace.d_model)
            for column, (u2, _, vh2) in enumerate(parts):
                assert abs(found.null[s, 0, 0, row, column] - null) < 1e-6
                assert abs(found.null_std[s, 0, 0, row, column] - spread) < 1e-6
                truth = (u1[:, :4].mT @ u2[:, :4]).square().sum() / 4
                assert abs(found.overlap_u[s, 0, 0, row, column] - truth) < 1e-6
                truth = (vh1[:4] @ vh2[:4].mT).square().sum() / 4
                assert abs(found.overlap_v[s, 0, 0, row, column] - truth) < 1e-6
            torch.testing.assert_close(found.frobenius[s, 0, row], jacobians[row].norm())
    torch.testing.assert_close(found.overlap_null, torch.tensor([4 / 32], dtype=torch.float64))
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


def test_products_alone_give_the_same_coupling(monkeypatch: pytest.MonkeyPatch):
    """Where a Jacobian is too large to form, coupling is the same and the null is off by the error that is stated."""
    trace = tlc.trace(CASES[0].model(), TOKENS)
    formed = tlc.depth_coupling(trace, 4)
    assert formed.frobenius_error.max() == 0
    for index, name in ((1, "matrix dropped"), (2, "products")):
        chosen = lambda *arguments, index=index: methods(*arguments[:-1])[index]  # noqa: E731
        assert chosen(SimpleNamespace(product_flops=1.0, dense_flops=1.0), 8, 2, 3, "auto", True).name == name
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
        SimpleNamespace(shape=(d, d), product_flops=2.0 * weights, dense_flops=2.0 * d * d * (mlp + 2 * d))
        for d, mlp, weights in ((4096, 14336, 218e6), (576, 1536, 3.54e6))
    )
    assert cheapest(wide, 4096, 10, 32, "auto", keep=True).name == "products"
    assert cheapest(small, 576, 10, 30, "auto", keep=True).name == "matrix kept"
    # SmolLM2's matrices are cheap enough to form that they are, even where they cannot be kept
    assert cheapest(small, 576, 10, 30, "auto", keep=False).name == "matrix dropped"
    assert cheapest(wide, 4096, 10, 32, "dense", keep=True).name == "matrix kept"
