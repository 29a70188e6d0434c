"""The table of a store."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, TOKENS
from small_sweeps import plan_of, save_model, word_tokenizer  # with it, benchmarks/ is on the path
from sweep_cells import cell_of, measured

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, StoreError
from tlcoupling.models.load import _transformer_bridge
from tlcoupling.sweeps import cells
from tlcoupling.sweeps.cells import Cell, Settings
from tlcoupling.sweeps.table import COLUMNS, rows_of_cell, to_arrow


def test_the_table_has_each_sublayer_and_k_once(store: tlc.SweepStore, tmp_path: Path):
    import pyarrow.parquet as pq

    cell, lost = cell_of(revision="step7", step=7), cell_of((1, 2))
    analysis, facts = measured(cell)
    store.save(cell, analysis, facts)
    store.fail(lost, RuntimeError("lost"))
    path = store.write_table(tmp_path / "out" / "table.parquet")
    schema = pq.read_schema(path)
    assert schema.names == list(COLUMNS)
    assert all(schema.field(name).metadata[b"description"].decode() == text for name, (_, text) in COLUMNS.items())
    table = store.table()
    assert pq.read_table(path).to_pylist() == to_arrow(store.rows()).to_pylist()
    assert table.columns.tolist() == list(COLUMNS)
    assert len(table) == 6 + 1
    row = table.query("sublayer == 'mlp' and k_asked == '0.25'").iloc[0]
    coupling = analysis.coupling
    j, k = 1, coupling.ks[1]
    assert (row["k"], row["step"], row["n_tokens"], row["n_measured"]) == (k, 7, 7, 2)
    assert row["n_params"] == facts.n_params and row["d_model"] == coupling.overlap_null.reciprocal()[0] * 2
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    for column, name in (
        ("coupling", "values"),
        ("null", "null"),
        ("null_std", "null_std"),
        ("overlap_u", "overlap_u"),
        ("overlap_null_v", "overlap_null_v"),
    ):
        matrix = getattr(coupling, name)[2, :, j].double()
        expected = sum(matrix[:, a, b].sum() for a, b in pairs) / (2 * len(pairs))
        assert row[column] == pytest.approx(float(expected), rel=1e-6)
    close = coupling.uncertainty.clone()
    close[2, 1, 0, :3] = 1.0
    looser = dataclasses.replace(analysis, coupling=dataclasses.replace(coupling, uncertainty=close))
    assert (row["undetermined"], [one["undetermined"] for one in rows_of_cell(cell, looser, facts)][-1]) == (0, 3)
    assert row["excess"] == pytest.approx(row["coupling"] - row["null"])
    assert row["lss"] == pytest.approx(float(analysis.linearity.path("mlp")[[0, -1]].mean()))
    distances = analysis.growth.expodistance[[0, -1]].double().numpy()
    assert row["ed"] == pytest.approx(np.median(distances)) and row["cv"] == pytest.approx(np.median(distances**0.5))
    assert distances.min() < 0.99 * row["ed"]
    failed = table.query("status == 'failed'").iloc[0]
    assert failed["error"] == "RuntimeError: lost" and failed["key"] == lost.key
    assert json.loads(failed["prompt"]) == [1, 2]


def test_p_values_are_there_on_request(store: tlc.SweepStore, tmp_path: Path):
    """Of the first cell's one token; its two tokens are two tests, and have none."""
    import pandas as pd

    settings = Settings(k=(2, 0.25), tokens=(-1,))
    one, two = dataclasses.replace(cell_of(), settings=settings), cell_of()
    analysis, facts = measured(two)
    store.save(two, analysis, facts)
    alone = tlc.analyze(CASES[0].model(), TOKENS, k=[2, 0.25], tokens=-1, attention=False)
    store.save(one, alone, facts)
    assert store.table()["p"].isna().all()
    table = pd.read_parquet(store.write_table(tmp_path / "table.parquet", draws=39)).set_index("key")
    test = alone.coupling.test(draws=39)
    for column, name in (("p", "p"), ("excess_low", "low"), ("excess_high", "high")):
        assert table.loc[one.key, column].tolist() == getattr(test, name)[:, 0, :, 0].mT.flatten().tolist()
        assert table.loc[two.key, column].isna().all()
    with pytest.raises(ArgumentError, match="draws=5 .*at least 39"):
        store.table(draws=5)


def test_the_table_tells_weights_loads_and_measurements_apart(store: tlc.SweepStore, monkeypatch: pytest.MonkeyPatch):
    """Cells that differ in these alone are rows that differ, and no mean is taken over them."""
    analysis, facts = measured(cell_of())
    for weights, dtype in (("a", None), ("b", None), ("b", "bfloat16")):
        store.save(cell_of(weights=weights, load={"dtype": dtype}), analysis, facts)
    table = store.table()
    assert set(zip(table["weights"], table["load"], strict=True)) == {
        ("a", '{"dtype": null}'), ("b", '{"dtype": null}'), ("b", '{"dtype": "bfloat16"}')
    }  # fmt: skip
    with pytest.raises(ArgumentError, match="table='2 different weights of tiny'"):
        tlc.correlate(table, {"tiny": 1.0})
    with pytest.raises(ArgumentError, match="table='2 different load of tiny'"):
        tlc.correlate(table[table["weights"] == "b"], {"tiny": 1.0})
    import pandas as pd

    once = table[table["weights"] == "a"]
    with pytest.raises(ArgumentError, match="table='6 rows twice, such as tiny'"):
        tlc.correlate(pd.concat([once, once]), {"tiny": 1.0})

    monkeypatch.setattr(cells, "MEASUREMENT", 0)
    outdated = store.table()
    assert set(outdated["status"]) == {"outdated"} and set(outdated["key"]) == store.keys()
    assert outdated["coupling"].isna().all() and set(outdated["weights"]) == {"a", "b"}


@pytest.mark.skipif(not hasattr(_transformer_bridge(), "boot_native"), reason="needs transformer-lens 4")
def test_a_hybrids_mixer_has_a_row():
    import architectures

    model = architectures.boot("JambaForCausalLM")
    cell = Cell(model="hybrid", prompt=(1, 2, 3, 4, 5), settings=Settings.of(k=2, sublayers=["mixer", "mlp"]))
    analysis = tlc.analyze(model, list(cell.prompt), attention=False, **cell.settings.arguments())
    rows = list(rows_of_cell(cell, analysis, cells.ModelFacts.of(model)))
    assert [row["sublayer"] for row in rows] == ["mixer", "mlp"]
    path = analysis.linearity.path("mixer")
    assert rows[0]["lss"] == pytest.approx(float(path[-1])) and rows[0]["lss"] != rows[1]["lss"]


def test_without_pyarrow_the_error_says_what_to_install(
    store: tlc.SweepStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cell = cell_of()
    store.save(cell, *measured(cell))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for use in (store.table, lambda: store.write_table(tmp_path / "table.parquet")):
        with pytest.raises(StoreError, match="the table needs pyarrow: pip install pyarrow"):
            use()
    assert not (tmp_path / "table.parquet").exists() and store.keys() == {cell.key}


@pytest.mark.skipif(not hasattr(_transformer_bridge(), "boot_native"), reason="Jamba needs transformer-lens 4")
def test_a_hybrid_beside_a_plain_decoder_tells_kinds_of_layers_apart(tmp_path: Path):
    import architectures

    save_model(tmp_path / "plain")
    architectures.huggingface("JambaForCausalLM").save_pretrained(tmp_path / "hybrid")
    word_tokenizer(40).save_pretrained(tmp_path / "hybrid")
    plan = plan_of(tmp_path, ["plain", "hybrid"], 1, settings={"k": [2, 4]})
    store = tlc.sweep(plan, tmp_path / "store").store
    table = store.table().set_index(["model", "sublayer", "k"]).sort_index()
    assert (table["status"] == "measured").all()
    assert set(table.loc["plain"].index.levels[0]) >= {"block", "attn", "mlp"}
    assert table.loc["plain", ["layer_kinds", "excess_same_kind", "excess_other_kind"]].isna().all(axis=None)
    hybrid = table.loc["hybrid"]
    assert set(hybrid.index.get_level_values(0)) == {"block", "mixer", "mlp"}
    kinds = json.loads(hybrid["layer_kinds"].iloc[0])
    assert kinds == ["mixer+mlp", "mixer+mlp", "attn+mlp", "mixer+mlp"]
    same, other = hybrid["excess_same_kind"], hybrid["excess_other_kind"]
    # 6 of the 12 ordered pairs of layers are of two mixers, 6 of a mixer and the attention
    np.testing.assert_allclose((same + other) / 2, hybrid["excess"], rtol=1e-6, atol=1e-8)
    assert not np.allclose(same, other)
