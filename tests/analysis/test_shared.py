"""What pairs of layers share: the matrices behind the coupling, and the tokens of the bases that they are in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES

import tlcoupling as tlc
from tlcoupling.analysis import shared
from tlcoupling.coupling.groups import Place
from tlcoupling.coupling.options import Options

EXACT = next(case for case in CASES if case.exact)
TOKENS = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture
def analysis() -> tlc.Analysis:
    return tlc.analyze(EXACT.model(), TOKENS, k=(3, 2), tokens=(1, -2), shared=True)


def test_the_matrices_are_those_that_the_coupling_was_computed_from(analysis: tlc.Analysis) -> None:
    projected = analysis.shared.projected
    assert (projected.position, projected.bases) == (3, "uv")
    torch.testing.assert_close(projected.coupling[0], analysis.coupling.values[0, 1, 0])
    # the coupling's null knows the effective width, that of projected Jacobians takes d_model: 1/16 more at most
    torch.testing.assert_close(projected.null[0], analysis.coupling.null[0, 1, 0, :, 0], rtol=1 / 16, atol=0)


def test_the_tokens_are_those_of_read_directions(analysis: tlc.Analysis) -> None:
    found = tlc.read_directions(analysis.trace, 1, pos=3, k=3, top=shared.TOKENS)
    torch.testing.assert_close(analysis.shared.scores[1], found.scores)
    torch.testing.assert_close(analysis.shared.null, found.null)
    assert analysis.shared.texts[1] == found.texts
    table = analysis.shared.to_dataframe()
    row = table[(table.layer == 1) & (table.side == "reads") & (table["rank"] == 2) & (table.end == "-")].iloc[0]
    assert (row.token, row.score) == (found.texts[1][2][1][0], pytest.approx(float(found.scores[1, 2, 1, 0])))
    assert row.null == pytest.approx(float(found.null[1, 0]))


def test_many_layers_and_vectors_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LAYERS", 2)
    monkeypatch.setattr(shared, "VECTORS", 1)
    found = tlc.analyze(EXACT.model(), TOKENS, k=3, shared=True).shared
    assert found.projected.layers == tuple(range(0, EXACT.model().cfg.n_layers, 2))
    assert found.projected.values.shape[-1] == found.scores.shape[2] == 1


def test_it_is_saved_with_the_analysis(analysis: tlc.Analysis, tmp_path: Path) -> None:
    back = tlc.load(analysis.save(tmp_path / "result.safetensors")).shared
    assert repr(back) == repr(analysis.shared) and back.texts == analysis.shared.texts
    assert torch.equal(back.projected.values, analysis.shared.projected.values)
    assert tlc.analyze(EXACT.model(), TOKENS, k=2).shared is None


def options(bases: Any = "uv", k: int = 2) -> Options:
    return Options.resolve(EXACT.model().cfg.d_model, k, "frobenius", bases, True, "auto", "auto")


@pytest.mark.parametrize("bases", ["uv", "vu"])
def test_a_pair_of_any_kind_has_the_coupling_and_the_null_of_its_kind(bases: Any) -> None:
    trace = tlc.trace(EXACT.model(), TOKENS)
    how: dict[str, Any] = {"k": 2, "bases": bases}
    layers = tlc.depth_coupling(trace, tokens=3, sublayers="mlp", **how)
    tokens = tlc.token_coupling(trace, layers=1, sublayers="attn", **how)
    across = tlc.token_coupling(trace, layers=1, basis_layers=0, sublayers="block", **how)
    src, dest = (
        tlc.context_coupling(trace, fixed, layers=1, position=position, sublayers="block", **how)
        for fixed, position in (("src", 0), ("dest", 4))
    )
    heads = tlc.head_coupling(trace, token=3, layers=1, **how)
    for sublayer, row, column, result, at in (
        ("mlp", Place(2, 3, 3), Place(0, 3, 3), layers, (0, 0, 0, 2, 0)),
        ("attn", Place(1, 4, 4), Place(1, 2, 2), tokens, (0, 0, 0, 4, 2)),
        ("block", Place(1, 4, 4), Place(0, 2, 2), across, (0, 0, 0, 4, 2)),
        ("block", Place(1, 4, 0), Place(1, 2, 0), src, (0, 0, 0, 4, 2)),
        ("block", Place(1, 4, 3), Place(1, 4, 1), dest, (0, 0, 0, 3, 1)),
        ("attn", Place(1, 3, 3, 1), Place(1, 3, 3, 0), heads, (0, 0, 1, 0)),
    ):
        found = shared.shared_pair(trace, sublayer, row, column, options(bases))
        # float64, by the same engine and solver
        assert found.coupling == pytest.approx(float(result.values[at]), rel=1e-6, abs=1e-9)
        assert found.null == pytest.approx(float(result.null[at]), rel=1e-6, abs=1e-9)
        singular_values = result.singular_values[(*at[:-3], at[-2])][:2]
        entries = ((found.values.abs() - torch.diag(singular_values)).norm() / singular_values.norm()).item()
        assert 1 - entries == pytest.approx(found.coupling, rel=1e-6, abs=1e-9)


def test_the_matrix_of_a_pair_is_u2_j1_v2_and_its_tokens_are_those_of_the_column() -> None:
    trace = tlc.trace(EXACT.model(), TOKENS)
    found = shared.shared_pair(trace, "block", Place(2, 4, 4), Place(1, 2, 2), options(k=3))
    first = tlc.residual_jacobian(trace, 2, src=4, dest=4).dense()
    u, _, vh = torch.linalg.svd(tlc.residual_jacobian(trace, 1, src=2, dest=2).dense())
    torch.testing.assert_close(found.values.abs(), (u[:, :3].mT @ first @ vh[:3].mT).abs())
    read = tlc.read_directions(trace, 1, pos=2, k=3, top=shared.TOKENS)
    ends = found.scores.sort(2).values, read.scores.sort(2).values  # which end is + is the solver's choice
    torch.testing.assert_close(*ends)
    torch.testing.assert_close(found.random, read.null)
    assert {one for rank in found.texts[0] for one in rank} == {one for rank in read.texts[0] for one in rank}


def test_the_chance_of_an_entry_is_its_mean_for_random_bases() -> None:
    trace = tlc.trace(EXACT.model(), TOKENS)
    found = shared.shared_pair(trace, "block", Place(2, 4, 4), Place(1, 2, 2), options())
    first = tlc.residual_jacobian(trace, 2, src=4, dest=4).dense()
    generator = torch.Generator().manual_seed(0)
    size = len(first)

    def unit() -> torch.Tensor:
        directions = torch.randn(20_000, size, generator=generator, dtype=first.dtype)
        return directions / directions.norm(dim=1, keepdim=True)

    drawn = (unit() @ first * unit()).sum(1).abs().mean().item()
    # a few per cent each: the entries are not quite normal, and the two norms project a direction out of the width
    assert found.null_entry == pytest.approx(drawn, rel=0.15)
