"""The metric's formulas on matrices: coupling, its mean over pairs, and subspace overlap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import haar

from tlcoupling.coupling.metric import coupling, off_diagonal_mean, subspace_overlap


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), d=st.integers(8, 40), fraction=st.floats(0.05, 1.0))
def test_properties_of_the_metric(seed: int, d: int, fraction: float):
    torch.manual_seed(seed)
    k = max(1, int(fraction * d))
    j1, j2 = torch.randn(2, d, d, dtype=torch.float64)
    (u1, s1, vh1), (u2, _, vh2) = torch.linalg.svd(j1), torch.linalg.svd(j2)
    u1, v1, u2, v2, s1 = u1[:, :k], vh1[:k].mT, u2[:, :k], vh2[:k].mT, s1[:k]
    for normalizer in ("frobenius", "trace"):
        values = {}
        for absolute in (True, False):
            with_itself = coupling(u1.mT @ j1 @ v1, s1, normalizer, absolute)
            assert abs(with_itself - 1) < 1e-9
            value = values[absolute] = coupling(u2.mT @ j1 @ v2, s1, normalizer, absolute)
            assert value <= 1
            flips = torch.randint(0, 2, (k,)).double() * 2 - 1
            flipped = coupling((u2 * flips).mT @ j1 @ (v2 * flips), s1, normalizer, absolute)
            if absolute:  # off-diagonal signs flip with the pairs, their absolute values do not
                torch.testing.assert_close(flipped, value)
            scaled = coupling(3 * (u2.mT @ j1 @ v2), 3 * s1, normalizer, absolute)
            torch.testing.assert_close(scaled, value)
        # Signs can only lose: on the diagonal |M| lies no further from S than M, off it M^2 = |M|^2.
        negative = (u2.mT @ j1 @ v2).diagonal().lt(0).any()
        assert values[True] > values[False] if negative else values[True] == values[False]
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


def test_the_normaliser_is_the_norm_or_the_sum_of_the_singular_values():
    """M is zero, so that the misalignment is || S || over the normaliser."""
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    assert float(coupling(nothing, s, "frobenius")) == 0
    assert float(coupling(nothing, s, "trace")) == pytest.approx(1 - math.sqrt(14) / 6)


def test_the_mean_leaves_the_diagonal_out():
    matrices = torch.tensor([[[9.0, 1.0], [3.0, 9.0]], [[0.0, 4.0], [5.0, 0.0]]])
    assert off_diagonal_mean(matrices).tolist() == [2.0, 4.5]
    assert off_diagonal_mean(matrices[:, :1, :1]).isnan().all()


def test_the_null_of_the_overlap_is_k_over_d():
    generator = torch.Generator().manual_seed(1)
    overlaps = torch.stack([subspace_overlap(haar(100, 7, generator).mT @ haar(100, 7, generator)) for _ in range(300)])
    assert abs(overlaps.mean() - 0.07) < 3 * overlaps.std() / math.sqrt(300)


def test_the_overlap_is_the_projection_kernel_of_transformer_lens():
    """Where the installed one has it: its kernel is K times the overlap, and its moments are those of ours."""
    theirs = pytest.importorskip("transformer_lens.tools.analysis.projection_kernel")
    d, k, draws, generator = 40, 5, 400, torch.Generator().manual_seed(2)
    scores = []
    for draw in range(draws):
        u1, u2 = haar(d, k, generator), haar(d, k, generator)
        scores.append(k * subspace_overlap(u1.mT @ u2))
        if draw < 5:
            bases = [theirs.SubspaceBasis(u, torch.ones(k), k, k, 0.0, 0.0, (d, k)) for u in (u1, u2)]
            torch.testing.assert_close(scores[-1], theirs.projection_kernel(*bases).score)
    found, moments = torch.stack(scores), theirs.random_projection_kernel_moments(d, k)
    assert moments.mean == pytest.approx(k * k / d)  # K times the null of the overlap
    assert moments.variance == pytest.approx(2 * k**2 * (d - k) ** 2 / (d**2 * (d - 1) * (d + 2)))
    assert abs(float(found.mean()) - moments.mean) < 3 * math.sqrt(moments.variance / draws)
    # the standard error of a variance over 400 draws is 7 % for normal numbers, and these are skewed
    assert float(found.var()) == pytest.approx(moments.variance, rel=0.3)
