"""Result files and a store that version 0.1.0 wrote load, with the numbers that it measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tlcoupling as tlc
from tlcoupling.analysis.summary import coupling_rows

OLD = Path(__file__).parent / "data" / "written_by_0_1_0"
NUMBERS = json.loads((OLD / "numbers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"store"}))
def test_a_result_file_of_0_1_0_loads(name: str):
    with pytest.warns(UserWarning, match="without a checksum"):
        result, then = tlc.load(OLD / f"{name}.safetensors"), NUMBERS[name]
    assert result.provenance.verified is False
    assert type(result).__name__ == then["kind"]
    assert result.provenance.versions["tlcoupling"] == "0.1.0"
    for quantity, total in then["sums"].items():
        if (name, quantity) == ("projected", "null"):
            continue  # computed on reading, and to second order since 0.2
        # the same numbers, which a sum may add up in another order
        assert float(result._arrays()[quantity][1].double().nansum()) == pytest.approx(total, rel=1e-12), quantity


@pytest.mark.parametrize("name", ["depth", "token", "context", "heads"])
def test_how_certain_a_coupling_of_0_1_0_is_is_unknown(name: str):
    coupling = tlc.load(OLD / f"{name}.safetensors")
    for field in ("gaps", "uncertainty", "determined", "values_determined", "overlap_determined"):
        assert getattr(coupling, field) is None
        assert field not in set(coupling.to_dataframe()["quantity"])


def test_a_store_of_0_1_0_loads(tmp_path: Path):
    shutil.copytree(OLD / "store", tmp_path / "store")
    store = tlc.SweepStore(tmp_path / "store")
    with pytest.warns(UserWarning, match="2 results of the store .* have no checksum") as said:
        table = store.table()
    assert len(said) == 1
    assert sorted(set(table["key"])) == NUMBERS["store"]["keys"]
    # the null is of second order and of the effective width since 0.2: numbers of both do not stand in one table
    assert set(table["status"]) == {"outdated"} and table["excess"].isna().all()
    couplings = [row for key in NUMBERS["store"]["keys"] for row in coupling_rows(store.load(key).coupling)]
    assert sorted(row.coupling for row in couplings) == pytest.approx(NUMBERS["store"]["coupling"], rel=1e-12)
    assert all(row.undetermined is row.excess_determined is None for row in couplings)
    assert all(row.overlap_null_u == row.overlap_null_v > 0 for row in couplings)
