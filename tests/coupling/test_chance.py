"""The rotation test: its draws are those of whole random rotations, and its p-values hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import TOKENS, fresh
from oracle import haar_of

import tlcoupling as tlc
from tlcoupling.coupling.chance import Drawn, draw_excess, p_value, random_blocks
from tlcoupling.coupling.metric import coupling
from tlcoupling.coupling.null import null_coupling
from tlcoupling.errors import ArgumentError

D, N, K = 40, 5, 6
OFF = ~torch.eye(N, dtype=torch.bool)
SPECTRA = torch.arange(1, D + 1, dtype=torch.float64) ** -torch.linspace(0.3, 1.5, N, dtype=torch.float64)[:, None]


def rotated(worlds: int, bases: str, shared: bool) -> torch.Tensor:
    """Excess of Jacobians with whole rotations of their own, one for all pairs of a layer: ``[world, row, column]``.

    The columns are the rows, or have rotations of their own.
    """
    generator = torch.Generator().manual_seed(3)
    u, v = haar_of(torch.randn(2, worlds, N, D, D, generator=generator, dtype=torch.float64))
    jacobians = u * SPECTRA[:, None] @ v.mT
    if not shared:
        u, v = haar_of(torch.randn(2, worlds, N, D, D, generator=generator, dtype=torch.float64))
    left, right = (u, v) if bases == "uv" else (v, u)
    projected = left[:, None, ..., :K].mT @ jacobians[:, :, None] @ right[:, None, ..., :K]
    s = SPECTRA[:, :K]
    null = null_coupling(s, SPECTRA.norm(dim=-1), D)
    return coupling(projected, s[:, None].expand(worlds, N, N, K)) - null[:, None]


@pytest.mark.parametrize(("bases", "shared"), [("uv", True), ("vu", True), ("uv", False)])
def test_the_draws_are_those_of_whole_rotations(bases: str, shared: bool):
    """Standard deviation and size of the mean over all pairs, of 1500 worlds of whole rotations.

    Drawn pair by pair, the same. Worlds tell a standard deviation to 2 % and a share of 5 % to 0.6 %; limits are four
    standard errors, of both sides.
    """
    worlds = rotated(1500, bases, shared)[:, OFF].mean(-1)
    s, frobenius = SPECTRA[None, :, :K], SPECTRA.norm(dim=-1)[None]
    null = null_coupling(s, frobenius, D)[:, None, :, None].expand(1, 1, N, N)
    width = torch.full((1, N, N), float(D))
    drawn = Drawn(s, frobenius, null, width, torch.tensor([shared]), D, (K,), "frobenius", bases, True)
    draws = torch.cat(list(draw_excess(drawn, 4000, 0)))[:, 0, 0, OFF].double().mean(-1)
    assert abs(draws.std() / worlds.std() - 1) < 4 * 0.022
    assert abs(draws.mean() - worlds.mean()) < 4 * worlds.std() / 1500**0.5
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert abs(((worlds < low) | (worlds > high)).double().mean() - 0.05) < 4 * 0.007


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_a_block_of_a_rotation(k: int):
    """Second and fourth moments of an entry of U1^T U2, 1 / d and 3 / (d (d + 2)), and U1 = U2 at k = d."""
    blocks = random_blocks((20_000,), k, 7, np.random.default_rng(k)).double()
    assert float(blocks.square().mean()) == pytest.approx(1 / 7, rel=0.03)  # 0.8 % at k = 1
    assert float(blocks.pow(4).mean()) == pytest.approx(3 / 63, rel=0.08)
    assert (torch.linalg.svdvals(blocks) < 1 + 1e-5).all()
    if k == 7:
        torch.testing.assert_close(blocks.mT @ blocks, torch.eye(7).double().expand_as(blocks), atol=1e-4, rtol=0)


def test_each_kind_of_coupling_has_a_test(tmp_path):
    trace = tlc.trace(fresh(0), TOKENS)
    found = tlc.depth_coupling(trace, [2, 4], tokens=[3, 4])
    test = found.test(draws=99)
    assert test.axes == ("sublayer", "pos", "k", "pairs") and test.labels[-1][0] == "all"
    torch.testing.assert_close(test.excess[..., 0], found.mean("excess").double())
    torch.testing.assert_close(test.excess[..., 1:], found.profile("excess").double())
    assert test.count.tolist() == [6, 4, 2]
    assert ((test.low < test.excess) & (test.excess < test.high)).all()
    assert torch.equal(found.test(draws=99).p, test.p)
    assert not torch.equal(found.test(draws=99, seed=1).p, test.p)
    back = tlc.load(test.save(tmp_path / "test.safetensors"))
    assert repr(back) == repr(test) and "\n" not in repr(test)
    row = test.to_dataframe().query("quantity == 'p' and sublayer == 'mlp' and pos == 4 and k == 2 and pairs == 'all'")
    assert row["value"].item() == test.p[2, 1, 0, 0]
    across = tlc.token_coupling(trace, 4, tokens=[3, 4, 5], layers=[0, 1], basis_layers=[0, 2]).test(draws=99)
    assert across.p[0, 0, 0, 0] == 0.02  # tokens of one layer share its weights
    assert tlc.context_coupling(trace, k=4, layers=[0]).test(draws=99).axes == ("sublayer", "layer", "k", "pairs")
    assert tlc.head_coupling(trace, 4).test(draws=99).labels[-1] == ("all",)


def test_blocks_of_layers():
    found = tlc.depth_coupling(tlc.trace(fresh(0), TOKENS), 4, sublayers="mlp")
    test = found.test(draws=99, blocks={"early": [0, 1], "late": [2, 1]})
    assert test.labels[-1][-3:] == ("early", "late", "early with late") and test.count.tolist()[-3:] == [2, 2, 6]
    excess = found.excess[0, 0, 0].double()
    torch.testing.assert_close(test.excess[0, 0, 0, -3], (excess[0, 1] + excess[1, 0]) / 2)
    for blocks, message in (({"a": [0, 7]}, "blocks=7 .*layers measured, in block 'a'"), ({"b": [1]}, "blocks='b'")):
        with pytest.raises(ArgumentError, match=message):
            found.test(blocks=blocks)


def test_without_a_pair_there_is_no_p_value():
    test = tlc.depth_coupling(tlc.trace(fresh(0), TOKENS), 4, layers=[1]).test(draws=99)
    assert test.p.isnan().all() and test.excess.isnan().all() and test.low.isnan().all()


def test_bad_arguments():
    found = tlc.depth_coupling(tlc.trace(fresh(0), TOKENS), 4, sublayers="mlp")
    with pytest.raises(ArgumentError, match="draws=19 .*at least 39"):
        found.test(draws=19)
    with pytest.raises(ArgumentError, match=r"confidence=1\.0"):
        found.test(confidence=1.0)


def test_a_p_value_names_the_least_that_its_draws_can_show():
    assert p_value(0.002, 999) == "p ≤ 0.002" and p_value(0.0123, 999) == "p = 0.012"
    assert p_value(2 / 1501, 1500) == "p ≤ 0.0013"
