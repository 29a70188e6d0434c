"""The source of a model: a result never has the digest of other weights than those that were measured."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sweeps import needs_folders, plan_of, save_model

import tlcoupling as tlc
from tlcoupling.errors import ModelLoadError
from tlcoupling.models import load
from tlcoupling.sweeps.source import digest_of_folder

TOKENS = torch.tensor([1, 2, 3, 4])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A model, and another to overwrite it with."""
    needs_folders()
    for seed, name in enumerate(("one", "other")):
        save_model(tmp_path / name, seed)
    return tmp_path


def overwrite(folders: Path) -> None:
    """As a training run that still writes: into the same file."""
    with (folders / "one" / "model.safetensors").open("r+b") as file:
        file.write((folders / "other" / "model.safetensors").read_bytes())


class Queue(Executor):
    """Runs a call long after it was submitted, as another process would get it."""

    def __init__(self, meanwhile: Callable[[], Any]) -> None:
        self.meanwhile = meanwhile

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        call = pickle.dumps((fn, args))
        self.meanwhile()
        future: Future[Any] = Future()
        function, arguments = pickle.loads(call)
        future.set_result(function(*arguments))
        return future


def resid(model: Any) -> torch.Tensor:
    return tlc.trace(model, TOKENS).resid


@pytest.mark.parametrize("when", ["before loading", "in the queue", "while loading"])
def test_weights_that_changed_since_the_plan_was_read_are_not_measured(
    folders: Path, when: str, monkeypatch: pytest.MonkeyPatch
):
    plan, executor = plan_of(folders, ["one"], 2), None
    if when == "before loading":
        overwrite(folders)
    elif when == "in the queue":
        executor = Queue(lambda: overwrite(folders))
    else:
        real = load.load_model

        def loaded(*args: Any, **kwargs: Any) -> Any:
            model = real(*args, **kwargs)
            overwrite(folders)
            return model

        monkeypatch.setattr(load, "load_model", loaded)
    report = tlc.sweep(plan, folders / "store", executor=executor)
    monkeypatch.undo()
    assert report.n_measured == 0 and len(report.failed) == 2
    assert all("the weights changed while they were loaded" in error for error in report.failed.values())
    again = tlc.sweep(plan_of(folders, ["one"], 2), folders / "store")
    assert again.complete and again.n_measured == 2
    table = again.store.table()
    assert set(table[table["status"] == "measured"]["weights"]) == {digest_of_folder(folders / "one")}


def test_a_loaded_model_does_not_follow_a_later_write(folders: Path):
    """Transformers maps files into memory: without a copy, the first use of the weights would read the other ones."""
    (source,) = (group.source for group in plan_of(folders, ["one"]).groups)
    expected, model = resid(source.open()).clone(), source.open()
    overwrite(folders)
    assert torch.equal(resid(model), expected)
    assert not torch.equal(resid(tlc.load_model(folders / "one")), expected)


def test_a_model_that_was_deleted_while_it_was_loaded_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch):
    (source,) = (group.source for group in plan_of(folders, ["one"]).groups)
    model = source.open()
    monkeypatch.setattr(load, "load_model", lambda *args, **kwargs: model)
    (folders / "one").rename(folders / "gone")
    with pytest.raises(ModelLoadError, match="cannot be read again"):
        source.open()
