"""Plans: what they mean, what they refuse and how they say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_sweeps import GOOD, needs_folders, plan_of, read, save_model
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app


def test_cells_are_the_product_each_once(tmp_path: Path):
    plan = read(
        tmp_path,
        """
        random_baseline = [0, 1]
        models = ["gpt2", { name = "gpt2-medium", revisions = ["main", "other"], random_baseline = false }]
        prompts = [{ text = ["a", "b", "a"] }, { text = "b" }]
        settings = [{ k = 10 }, { k = [10] }, { k = [5, 0.1], normalizer = "trace" }]
        """,
    )
    assert [str(group.source) for group in plan.groups] == ["gpt2", "gpt2-medium@main", "gpt2-medium@other"]
    assert [len(group.cells) for group in plan.groups] == [3 * 2 * 2, 2 * 2, 2 * 2]
    assert len({cell.key for cell in plan.cells}) == len(plan.cells)
    assert {cell.random_seed for cell in plan.groups[0].cells} == {None, 0, 1}
    again = read(tmp_path, (tmp_path / "plan.toml").read_text())
    assert [cell.key for cell in again.cells] == [cell.key for cell in plan.cells]


def test_what_is_pending_is_split_and_loses_nothing(tmp_path: Path):
    plan = read(tmp_path, 'models = ["a", "b"]\n[prompts]\ntext = ["1", "2", "3", "4", "5"]')
    done = {plan.cells[1].key, *(cell.key for cell in plan.groups[1].cells[:4])}
    groups = plan.pending(done, 3)
    assert [len(group.cells) for group in groups] == [3, 1, 1]
    assert [cell.key for group in groups for cell in group.cells] == [c.key for c in plan.cells if c.key not in done]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            GOOD.replace("models", "modles"),
            ["plan.toml, line 1", "'modles'", "'models' is", "allowed: models, "],
        ),
        (GOOD + "[settings]\nsublayer = 'mlp'", ["line 6", "'sublayer'", "'sublayers' is"]),
        (GOOD + "[settings]\nk = 0", ["line 6", "k=[0]", "from 1 on"]),
        (GOOD + "[settings]\nengine = 'magic'", ["line 6", "engine='magic'", "autograd"]),
        (GOOD.replace('["gpt2"]', "[]"), ["line 1", "needs models"]),
        (GOOD.replace("models", "# models"), ["needs models", "has none"]),
        (GOOD.replace('["gpt2"]', '["./missing"]'), ["line 1", "'./missing'", "not a folder that exists"]),
        (GOOD.replace('["gpt2"]', '["./empty"]'), ["line 1", "'./empty'", "no config.json"]),
        (GOOD.replace('["gpt2"]', '[{ name = "gpt2", colour = 1 }]'), ["line 1", "'colour'", "models[0]"]),
        (GOOD.replace('["gpt2"]', '[{ name = "gpt2", dtype = "int8" }]'), ["dtype = 'int8'", "float32"]),
        (GOOD.replace('["gpt2"]', '[{ name = "gpt2", checkpoints = "all" }]'), ["no training steps of 'gpt2'"]),
        (
            GOOD.replace('["gpt2"]', '[{ name = "EleutherAI/pythia-70m", checkpoints = [3] }]'),
            ["line 1", "checkpoints=[3]", "0, 1, 2, 4"],
        ),
        (GOOD.replace("text = ", "file = 'none.txt' #"), ["line 3", "none.txt", "No such file"]),
        (GOOD.replace("text = ", "file = 'empty.txt' #"), ["line 3", "empty.txt", "holds no prompt"]),
        (GOOD.replace("text = ", "limit = 3 #"), ["no source", "one of text, file, dataset"]),
        (GOOD.replace("text = ", "file = 'bad.jsonl' #"), ["bad.jsonl", "line 2 is not JSON"]),
        (GOOD.replace("text = ", "field = 'body'\nfile = 'good.jsonl' #"), ["line 1 has no field 'body'", "text, n"]),
        (GOOD.replace("text = ", "field = 'n'\nfile = 'good.jsonl' #"), ["'n' holds a int"]),
        (GOOD + "limit = 0", ["limit = 0"]),
        ("random_baseline = -1\n" + GOOD, ["line 1", "random_baseline = -1"]),
        ("cells_per_job = 0\n" + GOOD, ["line 1", "cells_per_job = 0"]),
        (GOOD + "[resources]\nmemory = 4", ["line 6", "'memory'", "mem_gb"]),
        ("models = [", ["plan.toml", "cannot be read"]),
        (
            GOOD.replace('["gpt2"]', '["gpt2", { name = "gpt2-medium", label = "gpt2" }]'),
            ["line 1", "'gpt2' and 'gpt2-medium' are both called 'gpt2'", "a different label"],
        ),
    ],
)
def test_a_wrong_plan_says_where_and_what_is_allowed(tmp_path: Path, text: str, parts: list[str], unchecked):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "good.jsonl").write_text('{"text": "a", "n": 1}\n')
    (tmp_path / "plan.toml").write_text(text)
    result = CliRunner().invoke(app, ["sweep", str(tmp_path / "plan.toml")])
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    for part in parts:
        assert part in line
    assert not (tmp_path / "plan.store").exists()


def test_a_folder_is_known_by_its_weights(tmp_path: Path):
    needs_folders()
    for seed, step in enumerate((0, 10, 1000)):
        save_model(tmp_path / "run" / f"checkpoint-{step}", seed)
    plan = plan_of(tmp_path, [{"name": "run", "checkpoints": "all", "label": "mine"}], 1)
    assert [(cell.model, cell.revision, cell.step) for cell in plan.cells] == [
        ("mine", f"checkpoint-{step}", step) for step in (0, 10, 1000)
    ]
    (tmp_path / "run" / "checkpoint-10" / "optimizer.pt").write_text("a state that no number depends on")
    assert [c.key for c in plan_of(tmp_path, [{"name": "run", "checkpoints": "all", "label": "mine"}], 1).cells] == [
        c.key for c in plan.cells
    ]
    save_model(tmp_path / "run" / "checkpoint-10", 7)
    now = plan_of(tmp_path, [{"name": "run", "checkpoints": "all", "label": "mine"}], 1)
    assert [a.key == b.key for a, b in zip(plan.cells, now.cells, strict=True)] == [True, False, True]


def test_a_hubs_model_is_known_by_its_name_whatever_it_is_called(tmp_path: Path):
    """What is measured under a label is not taken for what another name gives under it."""
    names = ("nowhere/one", "nowhere/two")
    keys = [
        [cell.key for cell in read(tmp_path, GOOD.replace('"gpt2"', f'{{ name = "{name}", label = "mine" }}')).cells]
        for name in names
    ]
    assert not set(keys[0]) & set(keys[1])
    # several revisions of one model may be entries of their own
    entries = [{"name": names[0], "label": "mine", "revisions": [one]} for one in ("a", "b")]
    assert len(tlc.Plan.of({"models": entries, "prompts": {"text": "x"}}).cells) == 2


def test_the_plans_of_the_demos_are_plans():
    """Each is read without a hub, and the cost of every model in it is known."""
    folder = Path(__file__).parents[2] / "demos" / "plans"
    plans = {path.stem: tlc.Plan.read(path) for path in sorted(folder.glob("*.toml"))}
    assert {name: len(plan.cells) for name, plan in plans.items()} == {
        "paper_models": 28 * 12,
        "pythia_checkpoints": (4 * 154 + 4) * 12,
        "pythia_series": (24 + 12 + 11 + 11 + 4) * 12,
        "trained_untrained": 5 * 4 * 12,
    }
    assert all(group.shape is not None for plan in plans.values() for group in plan.groups)
    # docs/howto/cluster.md: a job for each model, and for each checkpoint
    assert (len(plans["paper_models"].groups), len(plans["pythia_checkpoints"].groups)) == (28, 4 * 154)
    # 12 layers of 12 d^2, as GPT-2's are counted
    assert plans["paper_models"].groups[0].shape.weights == 12 * 12 * 768**2
