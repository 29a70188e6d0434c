"""What a slice follows from: exact where it must be, and at chance where nothing relates the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FEW, TOKENS, fresh, relative_error

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, UnsupportedModelError


def test_the_singular_values_are_those_of_the_slice():
    trace = tlc.trace(FEW[0].model(), TOKENS)
    found = tlc.slice_relations(trace, [(0, 1), (0, 3), (1, 3)], k=4, draws=2)
    for at, (a, b) in enumerate(found.pairs):
        whole = tlc.slice_jacobian(trace, ("resid_pre", a), ("resid_post", b - 1)).dense()
        assert relative_error(found.singular_values[at], torch.linalg.svdvals(whole)[:4]) < 1e-9
        product = torch.eye(trace.d_model, dtype=whole.dtype)
        for layer in range(a, b):
            top = tlc.truncated_svd(tlc.residual_jacobian(trace, layer), 4)
            product = product + top.u @ torch.diag(top.s) @ top.v.mT @ product
        (u1, _, v1), (u2, _, v2) = (torch.linalg.svd(each) for each in (whole, product))
        for side, (one, other) in enumerate([(u1[:, :4], u2[:, :4]), (v1[:4].mT, v2[:4].mT)]):
            torch.testing.assert_close(found.overlap[at, side], (one.mT @ other).square().sum() / 4)


def test_all_directions_rebuild_the_slice_and_uncoupled_blocks_keep_their_spectra(tmp_path: Path):
    """With K = d the top parts are the blocks. Uncoupled blocks are rotated each by itself: any two draws differ."""
    trace = tlc.trace(FEW[0].model(), TOKENS)
    found = tlc.slice_relations(trace, [(0, 2)], k=trace.d_model, draws=2)
    torch.testing.assert_close(found.overlap, torch.ones_like(found.overlap))
    assert found.null == 1 and not torch.equal(found.uncoupled[0, :, 0], found.uncoupled[0, :, 1])
    alone = tlc.slice_relations(
        trace, [(0, 1)], k=4, draws=2
    )  # a block that is rotated as a whole has its singular values
    torch.testing.assert_close(alone.uncoupled[0, 0], alone.singular_values.expand(2, -1))
    assert (alone.uncoupled[0, 1] - alone.singular_values).abs().max() > 1e-3
    again = tlc.load(found.save(tmp_path / "relations"))
    assert (
        torch.equal(again.uncoupled, found.uncoupled)
        and repr(again) == "SliceRelations(1 slice of up to 2 blocks, K = 32)"
    )
    table = found.to_dataframe()
    assert table.loc[0, "blocks"] == 2 and table.loc[0, "gain_blocks"] == pytest.approx(float(found.gain[0, 0].mean()))


def test_a_token_to_which_others_lead_back_is_refused():
    """Its own Jacobians do not multiply to the slice there: these would be other numbers, without a word."""
    model, pos = FEW[0].model(), 2
    mixing = [("blocks.1.hook_mlp_out", lambda tensor, hook: tensor + tensor.mean(1, keepdim=True))]
    trace = tlc.trace(model, TOKENS, fwd_hooks=mixing)
    with pytest.raises(UnsupportedModelError, match="position 2 comes back to it by way of others"):
        tlc.slice_relations(trace, [(0, 3)], k=3, pos=pos)
    with pytest.warns(UserWarning, match="hooks act"):
        whole = tlc.slice_jacobian(trace, ("resid_pre", 0), ("resid_post", 2), src=pos, dest=pos).dense()
        own = [tlc.residual_jacobian(trace, layer, src=pos, dest=pos).dense() for layer in range(3)]
    product = torch.eye(trace.d_model, dtype=whole.dtype)
    for block in own:
        product = product + block @ product
    assert relative_error(product, whole) > 1e-3


def test_fresh_weights_gain_nothing():
    """Blocks with fresh weights are uncoupled: their product has the singular values of rotated blocks."""
    trace = tlc.trace(fresh(0), TOKENS)
    found = tlc.slice_relations(trace, [(0, 3)], k=5, draws=8)
    # the largest singular values of products of random matrices of width 96 spread by a few percent
    assert (found.gain.mean(-1).abs() < 0.1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": []}, "pairs="),
        ({"pairs": [(2, 2)]}, "pairs=.*a < b"),
        ({"pairs": [(0, 4)]}, "pairs=4 "),
        ({"k": 33}, "k=33 "),
        ({"draws": 1}, "draws=1 "),
        ({"pos": 9}, "pos=9 "),
    ],
)
def test_bad_input(change: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.slice_relations(tlc.trace(FEW[0].model(), TOKENS), **{"pairs": [(0, 1)], **change})
