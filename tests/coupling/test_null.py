"""The closed-form null against draws of random bases: its mean and its spread, for any K up to the width."""

from __future__ import annotations

import math
from itertools import product
from typing import Literal

import pytest
import torch
from oracle import haar, haar_of

from tlcoupling.coupling.metric import coupling
from tlcoupling.coupling.null import effective_width, null_coupling, null_std, unreached

DRAWS, WIDTH = 4000, 32


@pytest.mark.parametrize("k", [1, 4, 16, 31])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_mean_and_spread_are_those_of_random_bases(decay: float, k: int):
    """Of flat, slowly and fast falling spectra. 20 000 draws at width 48 show at most 0.02 standard deviations, 5 %.

    4000 draws tell the mean to 0.016 standard deviations and the spread to 1.1 to 1.6 %; limits are three times that
    beyond what the formulas miss.
    """
    generator = torch.Generator().manual_seed(k)
    spectrum = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -decay
    u, v = haar_of(torch.randn(2, DRAWS, WIDTH, k, generator=generator, dtype=torch.float64))
    s1, frobenius = spectrum[:k], spectrum.norm()
    norms: tuple[Literal["frobenius", "trace"], ...] = ("frobenius", "trace")
    for normalizer, absolute in product(norms, (True, False)):
        values = coupling(u.mT * spectrum @ v, s1.expand(DRAWS, k), normalizer, absolute)
        spread = null_std(s1, frobenius, WIDTH, normalizer, absolute)
        assert abs(values.mean() - null_coupling(s1, frobenius, WIDTH, normalizer, absolute)) < 0.07 * values.std()
        assert abs(values.std() / spread - 1) < 0.1
        tiny = null_std(7e-12 * s1, 7e-12 * frobenius, WIDTH, normalizer, absolute)
        torch.testing.assert_close(tiny, spread)


def test_the_null_of_a_peaked_spectrum():
    """1 / i^2 at width 576: one singular value has nearly all the norm, so that an entry of M is far from normal.

    The first-order formula, of normal entries, gives 0.00192. 1e5 draws, each with its first singular value's product
    alone (the others move it by less than a tenth of the limit): a standard error of 7e-6.
    """
    d, draws = 576, 100_000
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -2.0
    null = float(null_coupling(spectrum[:10], spectrum.norm(), d))
    # entries of U and V in J's own bases; of 20 of its directions, which hold all but 1e-5 of its norm
    u, v = torch.randn(2, draws, 20, 10, generator=generator, dtype=torch.float64) / math.sqrt(d)
    values = coupling(u.mT * spectrum[:20] @ v, spectrum[:10].expand(draws, 10))
    assert abs(null - values.mean()) < 0.05 * values.std()
    assert null == pytest.approx(0.0016, abs=3e-5)


def test_the_null_has_a_derivative():
    """``coupling_loss`` minimises the excess: the null moves with the spectrum."""
    s = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: null_coupling(s, s.norm() + 1, 12), (s,))


def test_the_null_is_as_precise_as_float64():
    """A difference over 1e-6 divides rounding by it: 1e-15 leaves 1e-9, of a slope of 0.05."""
    s = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def null(t: torch.Tensor | float) -> torch.Tensor:
        top = s * (1 + t * torch.tensor([1.0, -1.0, 2.0], dtype=s.dtype))
        return null_coupling(top, top.norm() + 1, 32)

    (slope,) = torch.autograd.grad(null(t), t)
    torch.testing.assert_close((null(1e-6) - null(-1e-6)) / 2e-6, slope, rtol=1e-6, atol=0)


def test_a_direction_that_vectors_do_not_reach_is_found():
    generator = torch.Generator().manual_seed(0)
    d, k = 40, 6
    constant, stream, other = torch.randn(3, d, generator=generator, dtype=torch.float64)
    frames = torch.randn(d, k, generator=generator, dtype=torch.float64)
    missed = torch.linalg.qr(torch.stack([constant, stream], dim=1)).Q
    vectors = haar_of(frames - missed @ (missed.mT @ frames))
    found = unreached(vectors, torch.stack([stream, constant], dim=1))
    torch.testing.assert_close(found @ found.mT, missed @ missed.mT)  # both, as a norm that centres misses both
    assert unreached(vectors, torch.stack([stream, other], dim=1)).shape == (d, 1)
    assert unreached(haar(d, k, generator), torch.stack([constant, stream], dim=1)).shape == (d, 0)


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2])
def test_the_overlap_of_subspaces_that_miss_a_direction(angle: float):
    """Directions at an angle: over 4000 draws, within four standard errors; the same direction gives K / (d - 1)."""
    generator, d, k = torch.Generator().manual_seed(1), 8, 3
    first, second = torch.eye(d, dtype=torch.float64)[:, :2].mT
    missed = [first[:, None], (math.cos(angle) * first + math.sin(angle) * second)[:, None]]
    bases = []
    for direction in missed:
        frames = torch.randn(4000, d, k, generator=generator, dtype=torch.float64)
        bases.append(haar_of(frames - direction @ (direction.mT @ frames)))
    overlaps = (bases[0].mT @ bases[1]).square().sum((-2, -1)) / k
    null = k / float(effective_width(missed[:1], missed[1:]))
    assert abs(float(overlaps.mean()) - null) < 4 * float(overlaps.std()) / 4000**0.5
    if angle == 0:
        assert null == pytest.approx(k / (d - 1))
    none = torch.zeros(d, 0, dtype=torch.float64)
    assert float(effective_width([none], [none])) == pytest.approx(d)
