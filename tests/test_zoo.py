"""benchmarks/zoo.py in its quick setting: what it leaves, that it goes on, and that its numbers are the sweep's."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

import tlcoupling as tlc
from tlcoupling.models.load import _transformer_bridge

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(_transformer_bridge() is None, reason="a local folder is loaded as a bridge")


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import zoo

    yield zoo
    sys.modules.pop("zoo")


def test_sentences_follow_a_grammar_and_repeat_themselves(zoo):
    language = zoo.Language()
    sentences = language.sentences(200, seed=5)
    assert torch.equal(sentences, language.sentences(200, seed=5)) and sentences.shape == (200, zoo.LENGTH)
    assert not torch.equal(sentences, language.sentences(200, seed=6))
    copies = 0
    for row in sentences.tolist():
        starts = [at for at, word in enumerate(row) if word == zoo.COPY and at + 4 < len(row)]
        copies += sum(any(row[at + 1 : at + 5] == row[i : i + 4] for i in range(at - 3)) for at in starts)
        assert all(at >= 16 for at in starts)
    assert copies > 200  # 0.08 of the places begin one
    # a word has at most eight successors in each of four grammars
    after = {word: set() for word in range(zoo.VOCABULARY)}
    for row in sentences[:, :16].tolist():
        for word, following in itertools.pairwise(row):
            after[word].add(following)
    assert max(map(len, after.values())) <= zoo.GRAMMARS * zoo.SUCCESSORS


def test_permutation_p_is_the_share_of_permutations_within_groups(zoo):
    rng = np.random.default_rng(0)
    x, y, groups = rng.normal(size=9), rng.normal(size=9), list("aaaabbbbb")
    same = zoo.permutation_p(x, x + 0.01 * y, groups)
    assert same < 0.01 and zoo.permutation_p(x, x + 100 * np.array([*[0] * 4, *[1] * 5]), groups) == same
    assert zoo.permutation_p(x, y, groups) > 0.05
    assert np.isnan(zoo.permutation_p(np.ones(9), y, groups))


def test_finished_training_is_neither_repeated_nor_replaced(zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is measured afterwards is no matter of training; what is, ends the run before anything is removed."""
    monkeypatch.setattr(zoo, "train", lambda *args: pytest.fail("it was trained again"))
    monkeypatch.setattr(zoo, "measure", lambda *args: pd.DataFrame())
    monkeypatch.setattr(zoo, "write_report", lambda *args: "")
    setting = dataclasses.replace(zoo.QUICK, checkpoints=(0, 5, 20))
    for model in zoo.zoo(setting):
        folder = tmp_path / "models" / model.name
        folder.mkdir(parents=True)
        (folder / "losses.json").write_text(json.dumps({"losses": {0: 4.0, 5: 3.0, 20: 2.0}}))
    for change in ({}, {"k": 2, "prompts": 3}, {"checkpoints": (0, 20)}):
        zoo.run(dataclasses.replace(setting, **change), tmp_path)
    for change in ({"steps": 30, "checkpoints": (0, 30)}, {"checkpoints": (0, 10, 20)}):
        with pytest.raises(
            SystemExit, match="trained for 20 steps with the checkpoints 0, 5, 20, which is not replaced"
        ):
            zoo.run(dataclasses.replace(setting, **change), tmp_path)
    assert all((tmp_path / "models" / model.name / "losses.json").is_file() for model in zoo.zoo(setting))


def test_the_benchmark_of_sweeps_says_whether_two_processes_do_what_is_expected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else the script sets it, for whatever comes after
    import sweep

    assert sweep.verdict(10.0, 16.0) == ("best: 10.00 and 16.00 cells/s, ratio 1.60: at least the 1.6 expected", True)
    assert sweep.verdict(10.0, 15.0) == ("best: 10.00 and 15.00 cells/s, ratio 1.50: below the 1.6 expected", False)
    sys.modules.pop("sweep")


@pytest.mark.slow
def test_the_quick_zoo_is_trained_swept_and_reported_once(zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = zoo.run(zoo.QUICK, tmp_path)
    models = zoo.zoo(zoo.QUICK)
    for model in models:
        assert (tmp_path / "models" / model.name / "step20" / "model.safetensors").is_file()
    assert set(table["model"]) == {model.name for model in models} and set(table["step"]) == {0, 20}

    # the statistics are those of the store's own cells
    store, width = tlc.SweepStore(tmp_path / "store"), zoo.QUICK.widths[0]
    found = {}
    for key in sorted(store.keys()):
        cell, analysis, _ = store.read(key)
        if cell.step == 20 and cell.model.startswith(f"w{width}-"):
            found[cell.model] = analysis.coupling.mean("excess")[0, :, 0].mean().item()
    losses = [zoo.losses_of(tmp_path / "models" / name, zoo.QUICK)[20] for name in found]
    end = zoo.at_the_end(table, zoo.QUICK).set_index(["measurement", "sublayer"])
    assert len(found) == 4
    direct = scipy.stats.pearsonr(list(found.values()), losses)[0]
    assert end.loc[("excess", "block"), f"r, width {width}"] == pytest.approx(direct, abs=1e-6)
    assert (tmp_path / "report.md").read_text(encoding="utf-8").strip() in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "measurements.csv"), table, check_dtype=False)

    times = {
        path: path.stat().st_mtime_ns for folder in ("models", "store") for path in (tmp_path / folder).rglob("*.*")
    }
    again = zoo.run(zoo.QUICK, tmp_path)
    assert "0 now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    pd.testing.assert_frame_equal(again, table)
