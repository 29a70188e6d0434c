"""Results: tables, xarray and provenance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import CASES, TOKENS

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.results.base import check_writable


@pytest.fixture(scope="module")
def analysis() -> tlc.Analysis:
    return tlc.analyze(CASES[0].model(), TOKENS, k=[2, 4], tokens=[0, -1])


def parts(analysis: tlc.Analysis) -> list:
    return [analysis, analysis.coupling, analysis.linearity, analysis.growth]


def test_results_are_frozen_and_one_line(analysis: tlc.Analysis):
    for result in parts(analysis):
        assert "\n" not in repr(result)
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.provenance = None


def test_the_long_table_has_each_number_once(analysis: tlc.Analysis):
    for result in parts(analysis)[1:]:
        table = result.to_dataframe()
        assert len(table) == sum(array.numel() for _, array in result._arrays().values())
        assert table.columns[0] == "quantity"
        assert table.columns[-1] == "value"
    coupling = analysis.coupling
    table = coupling.to_dataframe().query("quantity == 'excess'")
    row = table.query("sublayer == 'mlp' and pos == 6 and k == 4 and layer == 2 and basis_layer == 1")
    assert row["value"].item() == pytest.approx(float(coupling.excess[2, 1, 1, 2, 1]))
    assert set(table["token"]) == {analysis.tokens[0], analysis.tokens[-1]}
    straight = analysis.linearity.to_dataframe().query("quantity == 'lss' and path == 'block'")
    assert tuple(straight["token"]) == analysis.tokens
    assert set(analysis.to_dataframe()["measurement"]) == {"coupling", "linearity", "growth"}


def test_xarray_has_the_same_numbers(analysis: tlc.Analysis):
    pytest.importorskip("xarray")
    for result in parts(analysis)[1:]:
        data = result.to_xarray()
        for name, (axes, array) in result._arrays().items():
            assert data[name].dims == axes
            assert torch.equal(torch.from_numpy(data[name].values), array)
    tree = analysis.to_xarray()
    assert set(tree.children) == {"attention", *analysis.parts}
    assert torch.equal(torch.from_numpy(tree["growth/norms"].values), analysis.growth.norms)
    assert tuple(tree["growth"]["token"].values) == analysis.tokens
    chosen = analysis.coupling.to_xarray()["values"].sel(sublayer="attn", pos=6, k=2, layer=0, basis_layer=2)
    assert float(chosen) == pytest.approx(float(analysis.coupling.values[1, 1, 0, 0, 2]))


def test_provenance_says_what_was_done(analysis: tlc.Analysis):
    provenance = analysis.coupling.provenance
    assert provenance.engine == {"block": "analytic", "attn": "analytic", "mlp": "analytic"}
    assert provenance.settings["k"] == [2, 4]
    assert provenance.weight_processing["normalization_type"] == "LN"
    assert provenance.weight_processing["layer_norm_folded"] is False
    assert provenance.seconds > 0
    assert provenance.tokens == tuple(TOKENS.tolist())


def test_a_folder_that_cannot_be_written_is_found_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"output='.*file/inner' .*can be written"):
        check_writable(tmp_path / "file" / "inner", "output")
    assert check_writable(tmp_path / "new" / "folder", "output").is_dir()
