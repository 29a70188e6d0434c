"""What a truncated SVD says of its singular vectors: which are determined, and how far."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.triplets import DETERMINED, Triplets


def with_spectrum(s: torch.Tensor, size: int) -> torch.Tensor:
    u, v = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q[:, : len(s)] for _ in range(2))
    return u * s @ v.mT


def solutions(matrix: torch.Tensor, k: int) -> dict[str, Triplets]:
    single = Projection(matrix.float())
    return {
        "dense float32": tlc.truncated_svd(single, k, "dense"),
        "krylov float32": tlc.truncated_svd(single, k, "krylov"),
        "auto float32": tlc.truncated_svd(single, k, "auto"),
        "dense float64": tlc.truncated_svd(Projection(matrix), k, "dense"),
    }


def sines(one: Triplets, two: Triplets) -> torch.Tensor:
    """Sine of the larger angle between the i-th left and right vectors, ``[K]``."""
    vectors = [(getattr(one, side).double(), getattr(two, side).double()) for side in "uv"]
    return torch.stack([(a - b * (a * b).sum(0)).norm(dim=0) for a, b in vectors]).amax(0)


def sines_of_spans(one: Triplets, two: Triplets) -> torch.Tensor:
    """Sine of the largest angle between the spans of the first 1, 2, ... K left or right vectors, ``[K]``."""
    found = []
    for k in range(1, len(one.s) + 1):
        outside = [
            b - a @ (a.mT @ b)
            for a, b in ((getattr(one, side)[:, :k].double(), getattr(two, side)[:, :k].double()) for side in "uv")
        ]
        found.append(torch.stack([torch.linalg.matrix_norm(part, ord=2) for part in outside]).amax())
    return torch.stack(found)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(24, 160),
    k=st.integers(2, 7),
    ratio=st.floats(0.5, 0.95),
    close=st.lists(st.tuples(st.integers(0, 6), st.floats(1, 9)), max_size=3),
)
def test_where_solvers_differ_the_vectors_are_flagged(
    seed: int, size: int, k: int, ratio: float, close: list[tuple[int, float]]
):
    """Some neighbours of a geometric spectrum are moved to a relative gap of 0.1 to 1e-9, at and within K."""
    torch.manual_seed(seed)
    s = ratio ** torch.arange(size, dtype=torch.float64)
    for index, digits in close:
        s[index + 1] = s[index] * (1 - 10**-digits)
    s = s.sort(descending=True).values
    found = solutions(with_spectrum(s, size), k)
    truth = found["dense float64"]
    for one in found.values():
        # 1e-5: vectors are rounded to float32
        assert (sines(one, truth) <= one.uncertainty.double() + 1e-5).all()
        assert (sines_of_spans(one, truth) <= one.subspace_uncertainty.double() + 1e-5).all()
        for other in found.values():
            trusted = (one.uncertainty <= DETERMINED) & (other.uncertainty <= DETERMINED)
            assert (sines(one, other)[trusted] <= 2 * DETERMINED).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), size=st.integers(24, 160), k=st.integers(1, 8), ratio=st.floats(0.6, 0.98))
def test_vectors_behind_wide_gaps_are_not_flagged(seed: int, size: int, k: int, ratio: float):
    """Gaps of 2 % of a value that is at least 0.016 of s_1: 3e-4 s_1, while rounding moves entries by 1e-6 s_1."""
    torch.manual_seed(seed)
    s = ratio ** torch.arange(size, dtype=torch.float64)
    for one in solutions(with_spectrum(s, size), k).values():
        assert (one.uncertainty <= DETERMINED).all() and (one.subspace_uncertainty <= DETERMINED).all()
        assert one.converged.all()


def test_gaps_are_distances_to_the_nearest_value_at_and_within_k():
    s = torch.tensor([8.0, 4.0, 3.0, 2.0, 1.9, 0.5], dtype=torch.float64)
    matrix = Projection(with_spectrum(s, 30))
    expected = torch.tensor([4 / 8, 1 / 4, 1 / 3, 0.1 / 2], dtype=torch.float64)
    for solver in ("dense", "krylov"):
        torch.testing.assert_close(tlc.truncated_svd(matrix, 4, solver).gaps, expected)
        # behind the last singular value there is nothing: the distance to zero
        torch.testing.assert_close(tlc.truncated_svd(matrix, 6, solver).gaps[-1:], torch.ones(1, dtype=torch.float64))
    whole = tlc.truncated_svd(Projection(torch.diag(s)), 6, "dense")
    assert whole.next_s == 0 and whole.gaps[-1] == 1


def test_equal_singular_values_leave_vectors_and_spans_undetermined():
    s = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.3], dtype=torch.float64)
    for one in solutions(with_spectrum(s, 40), 4).values():
        assert (one.uncertainty > DETERMINED).tolist() == [False, True, True, True]
        # the span of all three equal values is determined, not that of one or two of them
        assert (one.subspace_uncertainty > DETERMINED).tolist() == [False, True, True, False]
