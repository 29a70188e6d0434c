"""Results: tables, files and provenance."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from cases import CASES, TOKENS
from safetensors.torch import save_file

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, ResultFileError
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


def test_a_saved_result_comes_back_whole(analysis: tlc.Analysis, tmp_path):
    for result in parts(analysis):
        path = result.save(tmp_path / "result.safetensors")
        back = tlc.load(path)
        assert type(back) is type(result)
        assert repr(back) == repr(result)
        for name, (axes, array) in result._arrays().items():
            assert back._arrays()[name][0] == axes
            assert torch.equal(back._arrays()[name][1], array)
        assert back.provenance == tlc.load(path).provenance
        assert tuple(back.provenance.tokens) == tuple(TOKENS.tolist())
        assert back.provenance.versions["torch"] == result.provenance.versions["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.safetensors"]


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
    assert set(analysis.to_dataframe()["measurement"]) == {"coupling", "linearity", "growth"}


def test_xarray_has_the_same_numbers(analysis: tlc.Analysis):
    pytest.importorskip("xarray")
    for result in parts(analysis):
        data = result.to_xarray()
        for name, (axes, array) in result._arrays().items():
            assert data[name].dims == axes
            assert torch.equal(torch.from_numpy(data[name].values), array)
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


def test_foreign_and_damaged_files_are_refused(analysis: tlc.Analysis, tmp_path):
    path = tmp_path / "result.safetensors"
    with pytest.raises(ResultFileError, match="no result file"):
        tlc.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ResultFileError, match="damaged"):
        tlc.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ResultFileError, match="not a result of this version"):
        tlc.load(path)
    analysis.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ResultFileError, match="damaged"):
        tlc.load(path)
    for header in ("{", json.dumps({"kind": "Nonsense"}), json.dumps({"kind": "Growth", "plain": {}, "nested": {}})):
        save_file({"x": torch.zeros(2)}, path, metadata={"tlcoupling-3": header})
        with pytest.raises(ResultFileError, match="header .* is damaged"):
            tlc.load(path)


def test_a_failed_save_leaves_the_old_file(analysis: tlc.Analysis, tmp_path, monkeypatch: pytest.MonkeyPatch):
    path = analysis.growth.save(tmp_path / "result.safetensors")
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tlcoupling.results.files.save", full_disk)
    with pytest.raises(ResultFileError, match="No space left"):
        analysis.coupling.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ResultFileError, match="cannot write"):
        analysis.coupling.save(tmp_path / "missing" / "result.safetensors")


def test_a_folder_that_cannot_be_written_is_found_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"output='.*file/inner' .*can be written"):
        check_writable(tmp_path / "file" / "inner", "output")
    assert check_writable(tmp_path / "new" / "folder", "output").is_dir()
