"""Truncated SVDs: both solvers against torch's own, on matrices of known spectrum."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.linalg import krylov
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.svd import TOLERANCE, truncated_svds


def with_spectrum(s: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    u = torch.linalg.qr(torch.randn(rows, len(s), dtype=s.dtype)).Q
    v = torch.linalg.qr(torch.randn(columns, len(s), dtype=s.dtype)).Q
    return u * s @ v.mT


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(40, 90),
    columns=st.integers(40, 90),
    k=st.integers(1, 8),
    decay=st.floats(0.1, 2.0),
)
def test_krylov_gives_torchs_triplets(seed: int, rows: int, columns: int, k: int, decay: float):
    torch.manual_seed(seed)
    s = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -decay
    matrix = with_spectrum(s, rows, columns)
    found = tlc.truncated_svd(Projection(matrix), k, solver="krylov")
    assert found.residual.max() <= TOLERANCE[torch.float64]
    torch.testing.assert_close(found.s, s[:k], rtol=1e-9, atol=0)
    low_rank = (found.u * found.s) @ found.v.mT
    u, _, vh = torch.linalg.svd(matrix)
    # a residual of 1e-10 moves a vector by that over its gap, which is above 1e-3 here
    torch.testing.assert_close(low_rank, u[:, :k] * s[:k] @ vh[:k], rtol=0, atol=1e-6)
    for basis in (found.u, found.v):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["auto", "dense", "krylov"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_residuals_are_those_of_the_operator(solver: str, dtype: torch.dtype):
    matrix = torch.randn(120, 120, dtype=dtype)
    found = tlc.truncated_svd(Projection(matrix), 5, solver=solver)
    right = (matrix @ found.v - found.u * found.s).norm(dim=0)
    left = (matrix.mT @ found.u - found.v * found.s).norm(dim=0)
    truth = right.maximum(left) / found.s
    # both are rounding errors or Krylov remainders near the tolerance
    torch.testing.assert_close(found.residual, truth, rtol=0.1, atol=20 * torch.finfo(dtype).eps)


def test_a_stack_gives_what_each_gives_alone():
    """Ranks, scales and convergence differ within a stack; 1e-9: residuals are at most 1e-10, gaps above 0.1 of s_1."""
    torch.manual_seed(0)
    decays = [torch.arange(1, 101, dtype=torch.float64) ** -p for p in (0.5, 1.0, 2.0)]
    spectra = [*decays, 1e6 * decays[1], torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)]
    operators = [Projection(with_spectrum(s, 120, 100)) for s in spectra]
    together = truncated_svds(operators, 3, "krylov")
    for operator, found in zip(operators, together, strict=True):
        alone = tlc.truncated_svd(operator, 3, "krylov")
        torch.testing.assert_close(found.s, alone.s, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            (found.u * found.s) @ found.v.mT, (alone.u * alone.s) @ alone.v.mT, rtol=0, atol=1e-9 * float(alone.s[0])
        )
        assert found.residual.max() <= TOLERANCE[torch.float64]
    with pytest.raises(ArgumentError, match=r"k=4 .*at most 3"):
        truncated_svds(operators, 4, "krylov")


def test_equal_input_gives_equal_output():
    operator = Projection(torch.randn(200, 200))
    first, second = (tlc.truncated_svd(operator, 4, solver="krylov") for _ in range(2))
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.s, second.s)


def test_a_spectrum_without_a_gap_is_said_or_solved_exactly():
    """Equal singular values give Krylov nothing to hold on to: it says so, and auto takes the dense solver."""
    matrix = with_spectrum(torch.linspace(1, 0.9999, 400, dtype=torch.float64), 400, 400)
    with pytest.warns(UserWarning, match="gap between singular values"):
        tlc.truncated_svd(Projection(matrix), 3, solver="krylov", tolerance=1e-15)
    found = tlc.truncated_svd(Projection(matrix), 3, tolerance=1e-15)
    assert found.solver == "dense"


def test_inexact_products_come_to_an_end_and_are_not_trusted(monkeypatch: pytest.MonkeyPatch):
    """Products of ten bits (TF32) leave vectors less orthogonal than asked: no number of projections mends that."""
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x: SimpleNamespace(Q=qr(x).Q.bfloat16().float()))
    operator = Projection(with_spectrum(torch.arange(1, 301) ** -1.0, 300, 300))
    assert tlc.truncated_svd(operator, 3).solver == "dense"


def test_what_is_decomposed_together_ends_each_at_its_own_step(monkeypatch: pytest.MonkeyPatch):
    """A stack of easy and hard matrices gives what each gives alone, and the easy ones take no further steps."""
    decays = (0.3, 1.0, 0.5)  # of s_i = i^-decay: the smaller, the more steps
    operators = [Projection(with_spectrum(torch.arange(1, 401).double() ** -decay, 400, 400)) for decay in decays]
    alone = [tlc.truncated_svd(one, 4, solver="krylov", tolerance=1e-8) for one in operators]
    sizes: list[int] = []
    orthogonalise = krylov._orthogonalise

    def noted(block: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        sizes.append(len(block))
        return orthogonalise(block, basis)

    monkeypatch.setattr(krylov, "_orthogonalise", noted)
    together = truncated_svds(operators, 4, "krylov", 1e-8)
    assert sizes[0] == 3 and sizes[-1] < 3 and sizes == sorted(sizes, reverse=True)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other.s, one.s, rtol=1e-12, atol=0)
        assert bool(other.converged.all()) and bool((other.residual < 1e-8).all())


@pytest.mark.parametrize("solver", ["auto", "dense", "krylov"])
def test_triplets_beyond_the_rank_are_refused(solver: str):
    matrix = with_spectrum(torch.tensor([3.0, 2.0, 1.0]), 100, 100)
    assert len(tlc.truncated_svd(Projection(matrix), 3, solver=solver).s) == 3
    with pytest.raises(ArgumentError, match=r"k=4 .*at most 3, the numerical rank"):
        tlc.truncated_svd(Projection(matrix), 4, solver=solver)


@pytest.mark.parametrize("solver", ["auto", "dense", "krylov"])
def test_a_zero_matrix_has_no_triplets(solver: str):
    """What attention outside of a local window gives; Krylov must come to an end on it."""
    with pytest.raises(ArgumentError, match=r"k=2 .*at most 0, the numerical rank"):
        tlc.truncated_svd(Projection(torch.zeros(300, 300)), 2, solver=solver)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 11}, r"k=11 .*from 1 to 10"),
        ({"k": True}, "k=True"),
        ({"k": 2, "solver": "lanczos"}, r"solver='lanczos' .*auto, dense, krylov"),
        ({"k": 2, "tolerance": 0.0}, "tolerance=0.0"),
        ({"k": 2, "tolerance": float("nan")}, "tolerance=nan"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.truncated_svd(Projection(torch.randn(10, 10)), **arguments)
