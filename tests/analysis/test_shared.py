"""What pairs of layers share: the matrices behind the coupling, and the tokens of the bases that they are in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import CASES

import tlcoupling as tlc
from tlcoupling.analysis import shared

EXACT = next(case for case in CASES if case.exact)
TOKENS = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture
def analysis() -> tlc.Analysis:
    return tlc.analyze(EXACT.model(), TOKENS, k=(3, 2), tokens=(1, -2), shared=True)


def test_the_matrices_are_those_that_the_coupling_was_computed_from(analysis: tlc.Analysis) -> None:
    projected = analysis.shared.projected
    assert (projected.position, projected.bases) == (3, "uv")
    torch.testing.assert_close(projected.coupling[0], analysis.coupling.values[0, 1, 0])
    torch.testing.assert_close(projected.null[0], analysis.coupling.null[0, 1, 0, :, 0])


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
