"""Cells: keys of the contents, and settings that are checked."""

from __future__ import annotations

import dataclasses
import json

import pytest
from sweep_cells import SETTINGS, cell_of

from tlcoupling.errors import ArgumentError
from tlcoupling.sweeps.cells import MEASUREMENT, Cell, Settings


def test_a_key_is_of_the_contents():
    cell = cell_of()
    assert cell.key == cell_of().key == Cell.from_json(json.loads(json.dumps(cell.to_json()))).key
    others = [
        cell_of((1, 2)),
        cell_of(revision="step1"),
        cell_of(step=1),
        cell_of(weights="0"),
        cell_of(load={"dtype": "float64"}),
        cell_of(random_seed=0),
        dataclasses.replace(cell, settings=Settings.of(k=2)),
        dataclasses.replace(cell, model="other"),
        dataclasses.replace(cell, prompt="7 23"),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 1 + len(others)
    assert Settings.of(k=[2, 0.25], tokens=[0, -1]) == SETTINGS
    assert Settings.of(k=10, tokens=-1, sublayers="mlp") == Settings(sublayers=("mlp",))


def test_each_setting_and_the_version_of_the_measurement_are_in_the_key(monkeypatch: pytest.MonkeyPatch):
    changes = {"k": 2, "tokens": "all", "sublayers": "mlp", "normalizer": "trace", "bases": "vu", "absolute": False}
    changes |= {"prepend_bos": False, "engine": "autograd", "solver": "dense"}
    assert changes.keys() == SETTINGS.arguments().keys()
    settings = [Settings.of(**{**SETTINGS.arguments(), name: value}) for name, value in changes.items()]
    keys = {cell_of().key, *(dataclasses.replace(cell_of(), settings=one).key for one in settings)}
    assert len(keys) == 1 + len(changes)
    monkeypatch.setattr("tlcoupling.sweeps.cells.MEASUREMENT", MEASUREMENT + 1)
    assert cell_of().key not in keys


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0},
        {"k": []},
        {"k": 1.5},
        {"tokens": "last"},
        {"tokens": []},
        {"sublayers": ["head"]},
        {"normalizer": "max"},
        {"engine": "magic"},
        {"absolute": 1},
        {"prepend_bos": "yes"},
    ],
)
def test_settings_that_no_model_takes_are_refused(wrong, unchecked):
    (name,) = wrong
    with pytest.raises(ArgumentError, match=f"^{name}="):
        Settings.of(**wrong)
