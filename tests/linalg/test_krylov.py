"""Block Krylov: each triplet converges relative to its own singular value, or is said not to."""

from __future__ import annotations

import pytest
import torch

import tlcoupling as tlc
from tlcoupling.linalg import krylov, svd
from tlcoupling.linalg.krylov import ROUNDING
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.svd import TOLERANCE


def with_spectrum(s: torch.Tensor, size: int) -> torch.Tensor:
    u, v = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q[:, : len(s)] for _ in range(2))
    return u * s @ v.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cliff", [1e-1, 1e-3, 1e-4])
def test_small_singular_values_behind_a_large_one_are_as_exact(cliff: float, dtype: torch.dtype):
    """A residual of 3e-5 s_1 is 3 % of s_2 at a cliff of 1e-3: it passed, and the subspace was wrong."""
    tail = cliff * torch.linspace(1, 0.2, 399, dtype=torch.float64)
    tail[:5] = cliff * torch.tensor([1.6, 1.5, 1.4, 1.3, 1.2])
    s = torch.cat([torch.ones(1, dtype=torch.float64), tail])
    matrix = with_spectrum(s, 400)
    found = tlc.truncated_svd(Projection(matrix.to(dtype)), 6, "krylov")
    assert found.converged.all()
    rounding = ROUNDING * torch.finfo(dtype).eps * found.s[0] / found.s
    assert (found.residual <= rounding.clamp(min=TOLERANCE[dtype])).all()
    truth = torch.linalg.svd(matrix)
    for basis, exact in ((found.u, truth.U[:, :6]), (found.v, truth.Vh[:6].mT)):
        overlap = (basis.double().mT @ exact).square().sum() / 6
        # an angle moves the overlap by its square over 6; float32 products round it to 1e-6
        assert abs(1 - overlap) < max(float(found.subspace_uncertainty[-1]) ** 2, 2e-6)
        assert float(found.subspace_uncertainty[-1]) < 0.5


@pytest.mark.parametrize("kind", ["decaying", "of rank 8", "pairs of equal values", "behind a cliff"])
def test_small_problems_by_eigenvectors_are_as_exact(kind: str, monkeypatch: pytest.MonkeyPatch):
    """A GPU solves the small problems so, which is tried here on the CPU."""
    monkeypatch.setattr(krylov, "_small_svd", krylov._svd_by_eigenvectors)
    s = 0.8 ** torch.arange(96, dtype=torch.float64)
    if kind == "of rank 8":
        s *= torch.arange(96) < 8
    elif kind == "pairs of equal values":
        s = 0.8 ** (torch.arange(96) // 2)
    elif kind == "behind a cliff":
        s[1:] *= 1e-4
    found = tlc.truncated_svd(Projection(with_spectrum(s, 96).float()), 8, "krylov")
    assert found.converged.all()
    torch.testing.assert_close(found.s.double(), s[:8].double(), rtol=0, atol=1e-5)


def test_triplets_that_have_not_converged_are_named():
    """The first two stand apart and converge at once. The others lie 1e-7 apart, which 40 steps cannot resolve."""
    s = torch.cat([torch.tensor([3.0, 2.0]), torch.linspace(1, 0.9999, 998)]).double()
    operator = Projection(with_spectrum(s, 1000))
    with pytest.warns(UserWarning, match=r"not converged for triplets 3, 4: .*of its singular value, not 1e-10"):
        found = tlc.truncated_svd(operator, 4, "krylov")
    assert found.converged.tolist() == [True, True, False, False]
    assert found.residual[:2].max() < 1e-10 < found.residual[2:].min()


def test_auto_takes_the_dense_solver_where_its_matrix_fits(monkeypatch: pytest.MonkeyPatch):
    operator = Projection(with_spectrum(torch.linspace(1, 0.9999, 1000, dtype=torch.float64), 1000))
    assert tlc.truncated_svd(operator, 3).solver == "dense"
    monkeypatch.setattr(svd, "free_memory", lambda device: 1000 * 1000 * 8.0)
    with pytest.warns(UserWarning, match="has not converged"):
        assert tlc.truncated_svd(operator, 3).solver == "krylov"


def test_krylov_goes_on_until_close_neighbours_are_apart():
    """At a relative gap of 2e-4 the default residual of 3e-5 would leave an angle of 0.15."""
    s = torch.linspace(0.5, 0.1, 300, dtype=torch.float64)
    s[0], s[1], s[2] = 1.0, 1 - 2e-4, 0.7
    found = tlc.truncated_svd(Projection(with_spectrum(s, 300).float()), 3, "krylov")
    assert found.converged.all()
    assert found.uncertainty.max() < 0.02 < 3e-5 / 2e-4
