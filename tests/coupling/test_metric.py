"""The metric's formulas on matrices: coupling, its null, the null's spread, and subspace overlap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import haar, haar_of

from tlcoupling.coupling.metric import coupling, null_coupling, null_std, off_diagonal_mean, subspace_overlap


@settings(max_examples=40, deadline=None)
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


def test_the_spread_of_the_null_of_a_wide_uneven_spectrum():
    """Its terms of higher order in 1 / d are small at this width, so that each term of the first order shows."""
    d, k, draws = 256, 20, 4000
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -1.0
    u, v = haar_of(torch.randn(2, draws, d, k, generator=generator, dtype=torch.float64))
    values = coupling(u.mT * spectrum @ v, spectrum[:k].expand(draws, k))
    # 4000 draws tell a standard deviation to 1.1 %
    assert abs(values.std() / null_std(spectrum[:k], spectrum.norm(), d) - 1) < 0.04


def test_the_null_of_the_overlap_is_k_over_d():
    generator = torch.Generator().manual_seed(1)
    overlaps = torch.stack([subspace_overlap(haar(100, 7, generator).mT @ haar(100, 7, generator)) for _ in range(300)])
    assert abs(overlaps.mean() - 0.07) < 3 * overlaps.std() / math.sqrt(300)
