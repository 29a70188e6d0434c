"""The Jacobian lens of a corpus through a store: resumed, damaged, joined."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FEW, TOKENS
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app
from tlcoupling.errors import HookError
from tlcoupling.sweeps import lenses

PROMPTS = {"one": TOKENS, "two": torch.tensor([3, 17, 28, 9, 40]), "three": torch.tensor([8, 1, 5, 7, 2, 40])}
OPTIONS: dict[str, Any] = {"skip_first_positions": 0, "layers": [0, 1]}


@pytest.fixture
def model() -> Any:
    return FEW[0].model()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the prompts that were measured; a run is killed at the one named ``"killed"``."""
    names: list[str] = []

    def spied(model: Any, prompts: dict[str, Any], **options: Any) -> tlc.JacobianLens:
        if "killed" in prompts:
            raise KeyboardInterrupt
        names.extend(prompts)
        return tlc.jacobian_lens(model, prompts, **options)

    monkeypatch.setattr(lenses, "jacobian_lens", spied)
    return names


def assert_same(one: tlc.JacobianLens, other: tlc.JacobianLens) -> None:
    torch.testing.assert_close(one.matrices, other.matrices, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.squares, other.squares, rtol=1e-12, atol=1e-12)
    assert (one.layers, one.n_prompts, one.sketched) == (other.layers, other.n_prompts, other.sketched)


@pytest.mark.parametrize("sketch", [None, 8])
def test_a_killed_run_is_resumed_to_the_lens_of_one_run(
    model: Any, store: tlc.SweepStore, measured: list[str], sketch: int | None
):
    with pytest.raises(KeyboardInterrupt):
        begun = {"one": PROMPTS["one"], "two": PROMPTS["two"], "killed": PROMPTS["three"]}
        tlc.lens_sweep(model, begun, store, sketch=sketch, **OPTIONS)
    lens = tlc.lens_sweep(model, PROMPTS, store, sketch=sketch, **OPTIONS)
    assert measured == ["one", "two", "three"] and len(store.lens_keys()) == 3
    whole = tlc.jacobian_lens(model, PROMPTS, sketch=sketch, **OPTIONS)
    assert_same(lens, whole)
    assert lens.provenance.engine == whole.provenance.engine
    # the order of prompts does not matter, and a prompt that is there twice counts twice
    again = tlc.lens_sweep(model, {"two": PROMPTS["two"], "2": PROMPTS["two"]}, store.folder, sketch=sketch, **OPTIONS)
    assert len(measured) == 3
    assert_same(again, tlc.jacobian_lens(model, [PROMPTS["two"]] * 2, sketch=sketch, **OPTIONS))


def test_a_damaged_file_costs_its_prompt_and_is_named(model: Any, store: tlc.SweepStore, measured: list[str]):
    whole = tlc.lens_sweep(model, PROMPTS, store, **OPTIONS)
    paths = [store.lens_path(key) for key in store.lens_keys()]
    spoilt = next(path for path in paths if torch.equal(tlc.load(path).matrices, _only(model, "two")))
    content = spoilt.read_bytes()
    other = next(path for path in paths if path != spoilt).read_bytes()  # whole, but of another prompt
    for damage in (content[:-8], content.replace(content[-8:], bytes(8)), other):
        spoilt.write_bytes(damage)
        del measured[:]
        with pytest.warns(UserWarning, match=f"prompt 'two' is measured again: .*{spoilt.name}"):
            assert_same(tlc.lens_sweep(model, PROMPTS, store, **OPTIONS), whole)
        assert measured == ["two"]


def _only(model: Any, name: str) -> torch.Tensor:
    return tlc.jacobian_lens(model, {name: PROMPTS[name]}, **OPTIONS).matrices


def test_stores_of_two_machines_are_joined(model: Any, tmp_path: Path, measured: list[str]):
    stores = [tlc.SweepStore(tmp_path / name, create=True) for name in ("first", "second")]
    names = list(PROMPTS)
    for store, own in zip(stores, (names[:2], names[2:]), strict=True):
        tlc.lens_sweep(model, {name: PROMPTS[name] for name in own}, store, **OPTIONS)
    (only,) = (stores[1].lens_path(key) for key in stores[1].lens_keys())
    whole = only.read_bytes()
    only.write_bytes(whole[:-1])
    command = ["merge", *(str(store.folder) for store in stores), "--into", str(tmp_path / "all")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and f"skipped: {str(only)!r} is damaged" in re.sub(r"\s+", " ", done.output)
    only.write_bytes(whole)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "0 cells, 0 failed, 3 lens files" in done.output, done.output
    del measured[:]
    assert_same(
        tlc.lens_sweep(model, PROMPTS, tmp_path / "all", **OPTIONS), tlc.jacobian_lens(model, PROMPTS, **OPTIONS)
    )
    assert not measured


def test_another_model_or_setting_is_another_lens(store: tlc.SweepStore, measured: list[str]):
    model = FEW[0].build(torch.float64).eval()  # of its own: its weights change
    prompts = {"one": TOKENS}
    runs = [OPTIONS, {**OPTIONS, "skip_first_positions": 1}, {**OPTIONS, "layers": [1]}, {**OPTIONS, "sketch": 4}]
    for options in (*runs, {**OPTIONS, "sketch": 4, "seed": 1}, {**OPTIONS, "seed": 1}):
        assert_same(tlc.lens_sweep(model, prompts, store, **options), tlc.jacobian_lens(model, prompts, **options))
    assert len(measured) == 5  # without a sketch, a seed changes nothing
    with torch.no_grad():
        next(model.blocks[1].parameters())[0] *= 1.5
    tlc.lens_sweep(model, prompts, store, **OPTIONS)
    assert len(measured) == 6
    with model.hooks([("hook_embed", lambda tensor, hook: 2 * tensor)]), pytest.raises(HookError, match="store cannot"):
        tlc.lens_sweep(model, prompts, store, **OPTIONS)
    handle = model.blocks[1].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(HookError, match="store cannot"):
        tlc.lens_sweep(model, prompts, store, **OPTIONS)
    handle.remove()
