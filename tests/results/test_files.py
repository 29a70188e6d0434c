"""Result files: what is saved comes back whole, and what is not a result file is refused."""

from __future__ import annotations

import json

import pytest
import torch
from cases import CASES, TOKENS
from safetensors.torch import save_file

import tlcoupling as tlc
from tlcoupling.errors import ResultFileError


@pytest.fixture(scope="module")
def analysis() -> tlc.Analysis:
    return tlc.analyze(CASES[0].model(), TOKENS, k=[2, 4], tokens=[0, -1])


def parts(analysis: tlc.Analysis) -> list:
    return [analysis, analysis.coupling, analysis.linearity, analysis.growth]


def test_a_saved_result_comes_back_whole(analysis: tlc.Analysis, tmp_path):
    for result in parts(analysis):
        path = result.save(tmp_path / "result.safetensors")
        back = tlc.load(path)
        assert type(back) is type(result)
        assert repr(back) == repr(result)
        for name, (axes, array) in result._arrays().items():
            assert back._arrays()[name][0] == axes
            assert torch.equal(back._arrays()[name][1], array)
        assert back.provenance == result.provenance
        assert tuple(back.provenance.tokens) == tuple(TOKENS.tolist())
        assert back.provenance.versions["torch"] == result.provenance.versions["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.safetensors"]


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
