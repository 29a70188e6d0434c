"""Eigenvalues, normality, symmetry and rank: against plain definitions in float64, and against random bases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from cases import TOKENS, Case, fresh
from oracle import REPRESENTATIVE, full_model_jacobian, haar

import tlcoupling as tlc
from tlcoupling.dynamics.geometry import _BY_MAP, WITH_NULL, _geometry
from tlcoupling.errors import ArgumentError


def geometry(matrix: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """What is measured of one Jacobian in float64."""
    return _geometry(matrix, torch.finfo(torch.float64).eps, torch.Generator().manual_seed(seed))


def plain(matrix: np.ndarray) -> dict[str, float]:
    """Each quantity from its definition: Henrici's from the Schur form, ranks entry by entry."""
    schur = scipy.linalg.schur(matrix, output="complex")[0]
    eigenvalues = schur.diagonal()
    s = np.linalg.svd(matrix, compute_uv=False)
    share = s / s.sum()
    total = float((matrix**2).sum())
    return {
        "frobenius": math.sqrt(total),
        "spectral_norm": float(np.linalg.norm(matrix, 2)),
        "spectral_radius": max(abs(value) for value in eigenvalues),
        "departure": float(np.linalg.norm(np.triu(schur, 1))) / math.sqrt(total),
        "symmetric": sum(
            ((matrix[i, j] + matrix[j, i]) / 2) ** 2 for i in range(len(matrix)) for j in range(len(matrix))
        )
        / total,
        "rotation": sum(value.imag**2 for value in eigenvalues) / sum(abs(value) ** 2 for value in eigenvalues),
        "effective_rank": math.exp(-sum(p * math.log(p) for p in share if p > 0)),
        "stable_rank": total / s[0] ** 2,
    }


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_each_quantity_is_its_definition(case: Case, case_trace: tlc.Trace):
    found = tlc.eigen_geometry(case_trace, layers=[0, 2], tokens=[3, -1])
    assert found.positions == (3, 6) and found.sublayers == case_trace.sublayers
    for s, sublayer in enumerate(found.sublayers):
        jacobian = full_model_jacobian(case, 2, sublayer, 6, 6).numpy()
        for at, matrix in enumerate((jacobian, np.eye(len(jacobian)) + jacobian)):
            for name, value in plain(matrix).items():
                # eigenvalues of a non-normal matrix move by more than it does, and Henrici's number is a root
                tolerance = max(1e-6, 1e3 * case.tolerance)
                assert float(getattr(found, name)[s, 1, 1, at]) == pytest.approx(value, rel=tolerance), (sublayer, name)
        eigenvalues = found.eigenvalues[s, 1, 1]
        traces = [eigenvalues.pow(power).sum().real for power in (1, 2, 3)]
        truth = [np.trace(np.linalg.matrix_power(jacobian, power)) for power in (1, 2, 3)]
        np.testing.assert_allclose(traces, truth, rtol=1e-6 + 1e3 * case.tolerance, atol=1e-6)
        assert (eigenvalues.abs().diff() <= 0).all()
        plain_share = np.mean(np.abs(np.linalg.eigvals(jacobian).imag) > 0)
        assert float(found.complex_share[s, 1, 1]) == pytest.approx(plain_share, abs=0.1)  # null directions aside
    # the identity shifts eigenvalues and leaves the strict upper triangle of the Schur form as it is
    absolute = found.departure * found.frobenius
    torch.testing.assert_close(absolute[..., 0], absolute[..., 1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.antisymmetric, 1 - found.symmetric)


def test_matrices_whose_geometry_is_known():
    generator = torch.Generator().manual_seed(0)
    q, normal = haar(12, 12, generator), torch.randn(12, 12, generator=generator, dtype=torch.float64)
    known: dict[str, tuple[torch.Tensor, dict[str, float]]] = {
        "symmetric": (normal + normal.T, {"symmetric": 1, "rotation": 0, "departure": 0}),
        "antisymmetric": (normal - normal.T, {"symmetric": 0, "rotation": 1, "departure": 0}),
        "orthogonal": (q, {"departure": 0, "effective_rank": 12, "stable_rank": 12, "spectral_radius": 1}),
        "rank one": (
            torch.outer(q[0], q[1]),
            {"effective_rank": 1, "stable_rank": 1, "departure": 1, "symmetric": 0.5},
        ),
    }
    for name, (matrix, expected) in known.items():
        found = geometry(matrix)
        for quantity, value in expected.items():
            # a root of the rounding of ||A||^2 - sum |lambda|^2
            assert float(found[quantity][0]) == pytest.approx(value, abs=1e-7), (name, quantity)
    assert float(geometry(known["symmetric"][0])["complex_share"]) == 0
    assert float(geometry(known["antisymmetric"][0])["complex_share"]) == 1


def test_the_chance_level_is_that_of_random_bases():
    """Means over 12 draws of both bases, of a spectrum that falls, against 12 draws as the library makes them."""
    d, generator = 60, torch.Generator().manual_seed(1)
    s = 3 / (1 + torch.arange(d, dtype=torch.float64))
    bases = [(haar(d, d, generator), haar(d, d, generator)) for _ in range(12)]
    drawn = [geometry(u @ torch.diag(s) @ v.T, seed) for seed, (u, v) in enumerate(bases)]
    for name in WITH_NULL:
        found, chance = (torch.stack([each[key] for each in drawn]) for key in (name, f"{name}_null"))
        error = ((found.var(0) + chance.var(0)) / len(drawn)).sqrt()
        assert ((found.mean(0) - chance.mean(0)).abs() < 3 * error).all(), name


def test_the_chance_level_of_a_normal_random_matrix_is_known():
    """Ginibre: half of ||A||_F^2 in the eigenvalues, half of that in imaginary parts; Edelman's number of real ones."""
    d, generator = 150, torch.Generator().manual_seed(2)
    drawn = [geometry(torch.randn(d, d, generator=generator, dtype=torch.float64), seed) for seed in range(8)]
    expected = {"departure": math.sqrt(0.5), "symmetric": 0.5 + 0.5 / d, "rotation": 0.5}
    expected["complex_share"] = 1 - (0.5 + math.sqrt(2 * d / math.pi)) / d
    for name, value in expected.items():
        for key in (name, f"{name}_null"):
            of_j = torch.stack([each[key].reshape(-1)[0] for each in drawn])
            assert float(of_j.mean()) == pytest.approx(value, abs=0.02), key  # real eigenvalues, 7 %, do not rotate


def test_fresh_weights_have_the_null_of_random_bases_in_the_mlp():
    """Weights in and out are unrelated there, so symmetry and rotation are those of chance: within 3 % at width 96."""
    found = tlc.eigen_geometry(tlc.trace(fresh(0), TOKENS), sublayers="mlp")
    for name in ("symmetric", "rotation", "departure"):
        value, null = (getattr(found, each).mean((0, 1, 2)) for each in (name, f"{name}_null"))
        torch.testing.assert_close(value, null, rtol=0.03, atol=0.02)


def test_a_baseline_stands_beside(tmp_path: Any):
    model, other = fresh(0), fresh(1)
    found = tlc.eigen_geometry(tlc.trace(model, TOKENS), layers=[1], sublayers="attn", baseline=other)
    alone = tlc.eigen_geometry(tlc.trace(other, TOKENS), layers=[1], sublayers="attn")
    back: Any = tlc.load(found.save(tmp_path / "geometry.safetensors"))
    for one in (found, back):
        for name in (*_BY_MAP, "complex_share", "eigenvalues_real"):
            assert torch.equal(getattr(one.baseline, name), getattr(alone, name))
    table = back.to_dataframe().query("quantity == 'symmetric' and map == 'I + J'")
    assert table["value"].tolist() == [float(found.symmetric[0, 0, 0, 1])] and table["layer"].tolist() == [1]
    assert repr(back) == repr(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tokens": 9}, "tokens=9"), ({"layers": [0, 0]}, "layers="), ({"sublayers": "heads"}, "sublayers='heads'")],
)
def test_bad_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.eigen_geometry(tlc.trace(fresh(0), TOKENS), **arguments)
