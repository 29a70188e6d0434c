"""What a sweep would cost: counted before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from families import D_MODEL, N_HEADS, N_LAYERS, families
from small_sweeps import LAYERS, WIDTH, needs_folders, plan_of, save_model
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app
from tlcoupling.forward.block import Block
from tlcoupling.forward.split import topology_of
from tlcoupling.sweeps.cells import Cell, Settings
from tlcoupling.sweeps.forecast import forecast
from tlcoupling.sweeps.shapes import Shape, cell_cost, shape_at_hand

OTHER_FORMS = ("mixtral", "deepseek-v3", "deepseek-v2", "gpt-oss", "qwen3-next", "afmoe", "llama4")


def test_a_cost_is_that_of_the_model_itself():
    """A stand-in of the shape alone costs what ``tlc.estimate`` says of the model with its weights."""
    case = next(case for case in CASES if case.name in ("bridge-llama", "hooked-gated"))
    model = case.model(torch.float32)
    shape = Shape(
        n_layers=len(model.blocks),
        d_model=model.cfg.d_model,
        n_heads=model.cfg.n_heads,
        d_mlp=model.blocks[0].mlp.W_in.shape[1],
        n_key_value_heads=model.cfg.n_key_value_heads or model.cfg.n_heads,
        d_head=model.cfg.d_head,
    )
    cell = Cell(model="x", prompt=tuple(range(7)), settings=Settings(k=(4,), tokens="all"))
    truth = tlc.estimate(model, list(range(7)), 4, tokens="all")
    # norms' gains are not in the shape
    cost = cell_cost(shape, cell, truth.rates)
    assert cost.flops == pytest.approx(truth.flops, rel=0.02)
    assert cost.seconds == pytest.approx(truth.seconds, rel=0.02)


def test_a_forecast_of_what_is_here_and_what_is_not(tmp_path: Path):
    needs_folders()
    save_model(tmp_path / "here")
    plan = plan_of(
        tmp_path,
        ["here", "EleutherAI/no-such-model", {"name": "big", "shape": {"n_layers": 4, "d_model": 64, "n_heads": 4}}],
    )
    found = forecast(plan, rate=1e12)
    assert [group.flops is None for group in found.groups] == [False, True, False]
    assert found.groups[2].flops > found.groups[0].flops > 0
    assert shape_at_hand(str(tmp_path / "here")).d_model == WIDTH
    store = tlc.sweep(plan_of(tmp_path, ["here"]), tmp_path / "store").store
    sizes = [path.stat().st_size for path in (store.folder / "cells").iterdir()]
    # at this size a file is mostly its header, whose length no shape tells
    assert found.groups[0].file_bytes == pytest.approx(sum(sizes), rel=0.3)
    assert forecast(plan, store.folder, rate=1e12).groups[0].n_kept == 3
    assert shape_at_hand(str(tmp_path / "here")).n_layers == LAYERS


def test_a_dry_run_prints_and_writes_nothing(tmp_path: Path):
    (tmp_path / "plan.toml").write_text(
        'models = [{ name = "nowhere/big", shape = { n_layers = 4, d_model = 64, n_heads = 4 } }, "nowhere/other"]\n'
        'prompts = { text = ["a", "b"] }'
    )
    result = CliRunner().invoke(app, ["sweep", str(tmp_path / "plan.toml"), "--dry-run"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    (big,) = (line.split() for line in lines if line.startswith("big "))
    (other,) = (line.split() for line in lines if line.startswith("other "))
    assert big[1:3] == other[1:3] == ["2", "0"] and other[3:] == ["?"] * 4 and float(big[3]) > 0
    assert "such as nowhere/other" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


@pytest.mark.parametrize(
    "name",
    [
        "trained_untrained",
        "pythia_checkpoints",  # 154 times the cells of one checkpoint, whose cost is counted once
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pythia_series", "paper_models")),
    ],
)
def test_the_demos_say_what_their_dry_run_says(name: str):
    """Of the comment at a plan's head: cells, work, size of the results and time, at the rate that it names."""
    path = Path(__file__).parents[2] / "demos" / "plans" / f"{name}.toml"
    head = path.read_text(encoding="utf-8").split("\n\n", 3)
    said = " ".join(line.lstrip("# ") for part in head for line in part.splitlines() if line.startswith("#"))
    rate = 1e12 * float(re.search(r"--rate (\d+)", said)[1])
    found = forecast(tlc.Plan.read(path), rate=rate)
    cells, flops, size = re.search(r"([\d,]+) cells, ([\d,]+) TFLOP, (\d+) MB of results", said).groups()
    assert int(cells) == sum(group.n_cells for group in found.groups)
    assert float(flops.replace(",", "")) == pytest.approx(found.flops / 1e12, rel=0.005)  # three digits
    assert int(size) == round(found.file_bytes / 1e6)
    said_time, unit = re.search(r"about ([\d.]+) (minutes|hours) on one GPU", said).groups()
    seconds, half = {"minutes": (60, 0.5), "hours": (3600, 0.05)}[unit]  # half of the last digit
    assert float(said_time) == pytest.approx(found.seconds / seconds, abs=half)


def test_revisions_of_one_shape_are_counted_once(monkeypatch: pytest.MonkeyPatch):
    """All 154 checkpoints cost what 154 times one costs, for the work of one."""
    counted = []

    def counting(*args: Any) -> Any:
        counted.append(1)
        return cell_cost(*args)

    monkeypatch.setattr("tlcoupling.sweeps.shapes.cell_cost", counting)
    shape = {"n_layers": 3, "d_model": 64, "n_heads": 4}
    one, every = (
        forecast(
            tlc.Plan.of(
                {
                    "models": [{"name": "EleutherAI/pythia-70m", "checkpoints": checkpoints, "shape": shape}],
                    "prompts": {"text": ["a", "b c d e f"]},
                }
            ),
            rate=1e12,
        ).groups[0]
        for checkpoints in ([1000], "all")
    )
    assert len(counted) == 4 and every.n_revisions == 154
    assert every.flops == pytest.approx(154 * one.flops, rel=1e-12)
    assert every.seconds == pytest.approx(154 * one.seconds, rel=1e-12)
    assert every.memory_bytes == one.memory_bytes


@pytest.mark.parametrize("name", [name for name in families() if name not in OTHER_FORMS])
def test_a_shape_is_that_of_the_weights(name: str, tmp_path: Path):
    """Read from a configuration without weights, against the model that TransformerLens makes of it."""
    _, architecture, config = families()[name]
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    shape = shape_at_hand(str(tmp_path))
    assert shape is not None
    case = next(case for case in CASES if case.name == f"bridge-{name}")
    assert (shape.d_model, shape.n_heads, shape.n_layers) == (D_MODEL, N_HEADS, N_LAYERS)
    assert topology_of(shape.splits) == case.topology
    block = Block.read(case.model(torch.float32), 0)
    weights = {name: sublayer.weights() for name, sublayer in block.sublayers.items()}
    _, _, d_head = weights["attn"]["W_Q"].shape
    assert (shape.d_head, shape.d_mlp) == (d_head, weights["mlp"]["W_in"].shape[1])
    assert shape.gated == ("W_gate" in weights["mlp"])
    assert shape.n_key_value_heads == (block.n_groups or weights["attn"]["W_K"].shape[0])


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_a_shape_of_another_form_is_unknown(name: str, tmp_path: Path):
    """Experts are not one MLP, and latent attention has more matrices: no estimate, rather than a wrong one."""
    families()[name][2].save_pretrained(tmp_path)
    assert shape_at_hand(str(tmp_path)) is None
