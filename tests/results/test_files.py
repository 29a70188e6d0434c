"""Result files: what is saved comes back whole, and what is not a result file is refused."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from analyses import make_analysis
from cases import CASES, TOKENS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

import tlcoupling as tlc
from tlcoupling.errors import ResultFileError
from tlcoupling.results.base import parse_result
from tlcoupling.results.files import FORMAT

OLD = Path(__file__).parents[1] / "data" / "written_by_0_1_0"


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


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_any_flipped_bit_is_damage(tmp_path):
    """Every single bit of a file: length, header, checksum and numbers."""
    path = make_analysis(with_attention=False).linearity.save(tmp_path / "result.safetensors")
    content = path.read_bytes()
    assert parse_result(content, path)[0].provenance.verified is True
    for bit in range(8 * len(content)):
        with pytest.raises(ResultFileError, match="damaged"):
            parse_result(flipped(content, bit), path)


@given(st.data())
def test_no_flipped_bit_of_an_old_file_is_taken_for_verified(data: st.DataObject):
    path = data.draw(st.sampled_from(sorted(OLD.glob("*.safetensors"))))
    content = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    try:
        result, _ = parse_result(flipped(content, bit), path)
    except ResultFileError:
        return
    assert result.provenance.verified is False


def test_a_file_without_a_checksum_is_told_of_and_gets_one_when_it_is_saved(tmp_path):
    with pytest.warns(UserWarning, match="without a checksum"):
        old = tlc.load(OLD / "growth.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = tlc.load(old.save(tmp_path / "growth.safetensors"))
    assert (old.provenance.verified, new.provenance.verified) == (False, True)
    assert new.provenance == old.provenance


def test_equal_results_are_equal_files(tmp_path):
    one, two = (make_analysis().save(tmp_path / name).read_bytes() for name in ("one", "two"))
    assert one == two


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


CHANGES: dict[str, Any] = {
    "an unknown kind": lambda header: header.update(kind="Nonsense"),
    "a base class": lambda header: header.update(kind="Coupling"),
    "a list as kind": lambda header: header.update(kind=["Growth"]),
    "no fields": lambda header: header.update(plain=[]),
    "an unknown entry": lambda header: header.update(more=1),
    "an unknown field": lambda header: header["plain"].update(more=1),
    "fields of another type": lambda header: header["plain"].update(paths="block"),
    "items of another type": lambda header: header["plain"].update(steps=[1, 2, 3, None]),
    "a label less": lambda header: header["plain"].update(tokens=["a", "b", "c"]),
    "a huge integer": lambda header: header["plain"].update(steps=[1, 2, 3, 2**63]),
    "no provenance": lambda header: header.pop("provenance"),
    "another provenance": lambda header: header["provenance"].update(more=1),
    "a provenance of another type": lambda header: header["provenance"].update(model_name=7),
    "a result within": lambda header: header["nested"].update(growth={"kind": "Growth"}),
    "many levels": lambda header: header["provenance"].update(settings={"k": nested(60)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_header_that_fits_no_result_is_damage(tmp_path, change: Any):
    """Without a checksum, so that only the contents can tell."""
    path = make_analysis().linearity.save(tmp_path / "result.safetensors")
    content = path.read_bytes()
    header = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][FORMAT])
    del header["checksum"]
    path.write_bytes(save(load(content), {FORMAT: json.dumps(header)}))
    with pytest.warns(UserWarning):
        tlc.load(path)
    change(header)
    path.write_bytes(save(load(content), {FORMAT: json.dumps(header)}))
    with pytest.raises(ResultFileError, match="damaged"):
        tlc.load(path)


@pytest.mark.parametrize("levels", [2_000, 200_000])
def test_endless_nesting_is_damage(tmp_path, levels: int):
    path = tmp_path / "result.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata={FORMAT: "[" * levels + "]" * levels})
    with pytest.raises(ResultFileError, match="damaged"):
        tlc.load(path)


def test_only_regular_files_are_opened(tmp_path):
    """Opening a named pipe would block. A link that the user names is followed."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ResultFileError, match="not a regular file"):
            tlc.load(path)
    whole = make_analysis().growth.save(tmp_path / "result.safetensors")
    (tmp_path / "link").symlink_to(whole)
    assert isinstance(tlc.load(tmp_path / "link"), tlc.Growth)
