"""What all couplings say of their certainty: which singular vectors and subspaces the Jacobians determine."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TOKENS, fresh

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.triplets import DETERMINED

K = (2, 4)


def jacobians_with(monkeypatch: pytest.MonkeyPatch, spectra: dict[int, torch.Tensor]) -> None:
    """Give each layer's Jacobian at each token random bases and the layer's spectrum, by default a falling one."""
    drawn: dict[Any, torch.Tensor] = {}

    def operator(self: JacobianEngine, layer: int, sublayer: str, src: int, dest: int, head: int | None = None):
        key = (layer, sublayer, src, dest, head)
        if key not in drawn:
            u, v = torch.linalg.qr(torch.randn(2, 96, 96, dtype=torch.float64)).Q
            s = spectra.get(layer, 0.8 ** torch.arange(96))
            drawn[key] = (u * s @ v.mT).float()
        return Projection(drawn[key])

    monkeypatch.setattr(JacobianEngine, "operator", operator)


def test_equal_singular_values_are_flagged_and_solvers_differ_there():
    """Orthogonal initialisation: the first token's attention is W_V W_O, whose singular values are all equal."""
    model = fresh(0)
    for block in model.blocks:
        for name, shape, order in (("W_V", (96, 4, 24), (1, 0, 2)), ("W_O", (4, 24, 96), (0, 1, 2))):
            weight = torch.linalg.qr(torch.randn(96, 96)).Q.reshape(shape).permute(order)
            with torch.no_grad():
                getattr(block.attn, name).copy_(weight)
    trace = tlc.trace(model, TOKENS)
    found = {}
    for solver in ("dense", "krylov"):
        with pytest.warns(UserWarning, match="singular values nearly coincide: attn of layers 0, 1, 2 at token 0"):
            found[solver] = tlc.depth_coupling(trace, K, sublayers="attn", tokens=0, solver=solver)
        assert not found[solver].determined.any()
        assert not found[solver].values_determined.any() and not found[solver].overlap_determined.any()
    assert (found["dense"].values - found["krylov"].values).abs().max() > 0.01


def test_a_close_pair_is_flagged_where_it_is_used(monkeypatch: pytest.MonkeyPatch):
    """Layer 1's third and fourth singular values lie 1e-5 apart: K = 2 does not use them, K = 4 does."""
    s = 0.8 ** torch.arange(96, dtype=torch.float64)
    s[3] = s[2] * (1 - 1e-5)
    jacobians_with(monkeypatch, {1: s})
    trace = tlc.trace(fresh(0), TOKENS)
    with pytest.warns(UserWarning, match=r"4 of 24 pairs .*block of layer 1 at tokens 3, 5.*overlaps are determined"):
        found = tlc.depth_coupling(trace, K, sublayers="block", tokens=[3, 5])
    determined = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    determined[:, :, 1, 2:] = False
    # the bases are undetermined, and so is each row's coupling in them; the other columns stand
    cells = torch.ones(1, 2, 2, 3, 3, dtype=torch.bool)
    cells[:, :, 1, :, 1] = False
    assert torch.equal(found.determined, determined) and torch.equal(found.values_determined, cells)
    assert found.overlap_determined.all()
    torch.testing.assert_close(found.gaps[0, 0, 1, 2:], torch.full((2,), 1e-5), rtol=0.05, atol=0)
    torch.testing.assert_close(found.gaps[0, 0, 0], torch.full((4,), 0.2), rtol=0.26, atol=0)


def test_a_gap_at_k_counts_for_overlaps(monkeypatch: pytest.MonkeyPatch):
    s = 0.8 ** torch.arange(96, dtype=torch.float64)
    s[4] = s[3] * (1 - 1e-6)
    jacobians_with(monkeypatch, {2: s})
    trace = tlc.trace(fresh(0), TOKENS)
    with pytest.warns(UserWarning, match=r"block of layer 2 at token 6\..* so do subspace overlaps"):
        found = tlc.depth_coupling(trace, K, sublayers="block")
    expected = torch.ones(1, 1, 2, 3, 3, dtype=torch.bool)
    expected[:, :, 1, 2], expected[:, :, 1, :, 2] = False, False
    assert torch.equal(found.overlap_determined, expected)
    assert found.determined[0, 0, 2].tolist() == [True, True, True, False]


def test_bases_of_another_layer_bring_their_own_certainty(monkeypatch: pytest.MonkeyPatch):
    jacobians_with(monkeypatch, {2: torch.ones(96)})
    trace = tlc.trace(fresh(0), TOKENS)
    with pytest.warns(UserWarning, match=r"block of layer 2\."):
        found = tlc.token_coupling(trace, 3, sublayers="block", layers=[0, 2], basis_layers=[2, 0])
    assert found.values_determined.reshape(2, -1).all(1).tolist() == [False, True]
    # an overlap compares two subspaces, and one of them is undetermined in both
    assert not found.overlap_determined.any()
    with pytest.warns(UserWarning, match=r"^the solver and rounding move subspace overlaps .*block of layer 2$"):
        found = tlc.token_coupling(trace, 3, sublayers="block", layers=[2], basis_layers=[0])
    assert found.values_determined.all() and not found.overlap_determined.any()


def test_wide_gaps_are_not_flagged(monkeypatch: pytest.MonkeyPatch):
    jacobians_with(monkeypatch, {})
    trace = tlc.trace(fresh(0), TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [
            tlc.depth_coupling(trace, 10, solver="dense"),
            tlc.depth_coupling(trace, 10, solver="krylov"),
            tlc.context_coupling(trace, k=5),
            tlc.head_coupling(trace, k=5),
        ]
    for one in found:
        assert one.determined.all() and one.values_determined.all() and one.overlap_determined.all()
        assert one.uncertainty.max() <= DETERMINED


def test_certainty_is_in_tables_and_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    jacobians_with(monkeypatch, {1: torch.ones(96)})
    with pytest.warns(UserWarning, match="block of layer 1 "):
        found = tlc.depth_coupling(tlc.trace(fresh(0), TOKENS), K, sublayers="block")
    table = found.to_dataframe().set_index("quantity")
    marked = table.loc["values_determined"].set_index(["layer", "basis_layer", "k"])["value"]
    assert {basis for (_, basis, _), value in marked.items() if value == 0} == {1}
    assert table.loc["gaps", "rank"].nunique() == 4 and table.loc["gaps", "basis_layer"].notna().all()
    again = tlc.load(found.save(tmp_path / "coupling.safetensors"))
    for name in ("gaps", "uncertainty", "subspace_uncertainty", "determined", "overlap_determined"):
        assert torch.equal(getattr(again, name), getattr(found, name))


def test_a_mean_of_what_is_determined(monkeypatch: pytest.MonkeyPatch):
    """Layer 1's vectors are undetermined: what remains are the columns of layers 0 and 2, and no pair of all three."""
    jacobians_with(monkeypatch, {1: torch.ones(96)})
    with pytest.warns(UserWarning, match="block of layer 1 "):
        found = tlc.depth_coupling(tlc.trace(fresh(0), TOKENS), 4, sublayers="block")
    values, overlaps = found.values[0, 0, 0], found.overlap_u[0, 0, 0]
    expected = torch.stack([values[1, 0], values[2, 0], values[0, 2], values[1, 2]]).mean()
    torch.testing.assert_close(found.mean(determined=True)[0, 0, 0], expected)
    torch.testing.assert_close(found.mean("overlap_u", determined=True)[0, 0, 0], (overlaps[0, 2] + overlaps[2, 0]) / 2)
    assert found.mean()[0, 0, 0] != expected
    with pytest.raises(ArgumentError, match="determined=True .*version 0.1"):
        dataclasses.replace(found, uncertainty=None).mean(determined=True)
