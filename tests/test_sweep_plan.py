"""Plans: what they mean, what they refuse and how they say so, and what they would cost."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import CASES
from sweeps import LAYERS, WIDTH, needs_folders, plan_of, save_model
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app
from tlcoupling.errors import ArgumentError, PlanError
from tlcoupling.sweeps.cells import Cell, Settings
from tlcoupling.sweeps.checkpoints import pick_steps, published_steps
from tlcoupling.sweeps.forecast import forecast
from tlcoupling.sweeps.shapes import Shape, cell_cost, shape_at_hand

GOOD = """\
models = ["gpt2"]

[prompts]
text = ["a", "b"]
"""


def read(tmp_path: Path, text: str) -> tlc.Plan:
    (tmp_path / "plan.toml").write_text(text)
    return tlc.Plan.read(tmp_path / "plan.toml")


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
        (GOOD.replace("models", "# models"), ["needs models", "there are none"]),
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
        (GOOD.replace("text = ", "file = 'bad.jsonl' #"), ["bad.jsonl", "line 2 is no JSON"]),
        (GOOD.replace("text = ", "field = 'body'\nfile = 'good.jsonl' #"), ["line 1 has no field 'body'", "text, n"]),
        (GOOD.replace("text = ", "field = 'n'\nfile = 'good.jsonl' #"), ["'n' holds a int"]),
        (GOOD + "limit = 0", ["limit = 0"]),
        ("random_baseline = -1\n" + GOOD, ["line 1", "random_baseline = -1"]),
        ("cells_per_job = 0\n" + GOOD, ["line 1", "cells_per_job = 0"]),
        (GOOD + "[resources]\nmemory = 4", ["line 6", "'memory'", "mem_gb"]),
        ("models = [", ["plan.toml", "cannot be read"]),
        (
            GOOD.replace('["gpt2"]', '["gpt2", { name = "gpt2-medium", label = "gpt2" }]'),
            ["line 1", "'gpt2' and 'gpt2-medium' are both called 'gpt2'", "a label of its own"],
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


def test_prompts_of_files(tmp_path: Path):
    (tmp_path / "lines.txt").write_text("one\n\ntwo\r\nthree\n", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"body": f"row {i}"}) for i in range(5)))
    plan = read(
        tmp_path,
        """
        models = ["gpt2"]
        prompts = [
          { file = "lines.txt", limit = 2 },
          { file = "rows.jsonl", field = "body", limit = 3 },
        ]
        """,
    )
    assert [cell.prompt for cell in plan.cells] == ["one", "two", "row 0", "row 1", "row 2"]


def test_a_prompt_keeps_all_of_its_characters(tmp_path: Path):
    """A line of a file ends at its line feed alone; a byte order mark is no part of the first."""
    odd = [f"a{char}b" for char in "\u2028\u2029\x85\x0b\x0c\x1c"]
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "lines.txt").write_text("\n".join(["first", *odd]) + "\n", encoding=encoding)
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in ("first", *odd)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding=encoding)
        for name in ("lines.txt", "rows.jsonl"):
            plan = tlc.Plan.of({"models": ["gpt2"], "prompts": {"file": name}}, base=tmp_path)
            assert [cell.prompt for cell in plan.cells] == ["first", *odd]


def test_prompts_of_a_dataset(tmp_path: Path):
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    rows = [{"text": text, "label": 0} for text in ("first", "", "second", "third")]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = 'models = ["gpt2"]\nlocal_files_only = true\n[prompts]\ndataset = "data"\nlimit = 2\n'
    assert [cell.prompt for cell in read(tmp_path, text).cells] == ["first", "second"]
    with pytest.raises(PlanError, match="has no field 'body'; it has: text, label"):
        read(tmp_path, text + 'field = "body"')
    with pytest.raises(PlanError, match="split 'test' cannot be loaded"):
        read(tmp_path, text + 'split = "test"')


def test_the_published_steps_of_pythia_and_stanford():
    steps, pattern = published_steps("EleutherAI/pythia-1.4b-deduped")
    assert steps == [0, *(2**i for i in range(10)), *range(1000, 143001, 1000)]
    assert pattern.format(steps[-1]) == "step143000"
    assert published_steps("pythia-70m")[0] == steps
    assert 1 not in published_steps("EleutherAI/pythia-70m-v0")[0]
    steps, pattern = published_steps("stanford-crfm/alias-gpt2-small-x21")
    assert (steps[0], steps[-1], pattern.format(10)) == (0, 400000, "checkpoint-10")
    assert published_steps("gpt2") is None and published_steps("someone/pythia-70m") is None


@pytest.mark.parametrize("count", [2, 3, 7, 12, 40, 154])
def test_log_spaced_steps(count: int):
    steps = published_steps("pythia-70m")[0]
    picked = pick_steps(f"log:{count}", steps)
    assert len(picked) == count and picked == sorted(set(picked)) and set(picked) <= set(steps)
    assert picked[0] == 0 and picked[-1] == 143000
    if 3 < count < 20:
        ratios = [math.log(b / a) for a, b in pairwise(picked[1:])]
        # Pythia's steps double at the start, which is the coarsest that its series has: half of that is the error
        assert max(ratios) - min(ratios) <= 2 * math.log(2)
    assert pick_steps("all", steps) == steps and pick_steps([1000, 0], steps) == [0, 1000]


@pytest.mark.parametrize("wrong", ["log:1", "log:155", "log:x", "some", [], [0.5], 3])
def test_checkpoints_that_are_none(wrong):
    with pytest.raises(ArgumentError, match="^checkpoints="):
        pick_steps(wrong, published_steps("pythia-70m")[0])


def test_a_series_gives_its_revisions(tmp_path: Path):
    plan = read(tmp_path, GOOD.replace('"gpt2"', '{ name = "EleutherAI/pythia-70m", checkpoints = "log:3" }'))
    assert [(one.revision, one.step) for one in plan.cells[::2]] == [("step0", 0), ("step1", 1), ("step143000", 143000)]
    assert plan.groups[1].source.arguments in ({"revision": "step1"}, {"checkpoint_value": 1})


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
    found = cell_cost(shape, cell, truth.rates)
    assert found.flops == pytest.approx(truth.flops, rel=0.02)
    assert found.seconds == pytest.approx(truth.seconds, rel=0.02)


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


def test_the_plans_of_the_demos_are_plans():
    """Each is read without a hub, and the cost of every model in it is known."""
    folder = Path(__file__).parent.parent / "demos" / "plans"
    plans = {path.stem: tlc.Plan.read(path) for path in sorted(folder.glob("*.toml"))}
    assert {name: len(plan.cells) for name, plan in plans.items()} == {
        "paper_models": 28 * 12,
        "pythia_series": (24 + 12 + 11 + 11 + 4) * 12,
        "trained_untrained": 5 * 4 * 12,
    }
    assert all(group.shape is not None for plan in plans.values() for group in plan.groups)
    # 12 layers of 12 d^2, as GPT-2's are counted
    assert plans["paper_models"].groups[0].shape.weights == 12 * 12 * 768**2


@pytest.mark.parametrize(
    "name",
    ["trained_untrained", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pythia_series", "paper_models"))],
)
def test_the_demos_say_what_their_dry_run_says(name: str):
    """Of the comment at a plan's head: cells, work, size of the results and time, at the rate that it names."""
    path = Path(__file__).parent.parent / "demos" / "plans" / f"{name}.toml"
    head = path.read_text(encoding="utf-8").split("\n\n", 3)
    said = " ".join(line.lstrip("# ") for part in head for line in part.splitlines() if line.startswith("#"))
    rate = 1e12 * float(re.search(r"--rate (\d+)", said)[1])
    found = forecast(tlc.Plan.read(path), rate=rate)
    cells, flops, size = re.search(r"([\d,]+) cells, ([\d,]+) TFLOP, (\d+) MB of results", said).groups()
    assert int(cells) == sum(group.n_cells for group in found.groups)
    assert float(flops.replace(",", "")) == pytest.approx(found.flops / 1e12, rel=0.005)  # three digits
    assert int(size) == round(found.file_bytes / 1e6)
    low, high, unit = re.search(r"([\d.]+) to ([\d.]+) (minutes|hours)", said).groups()
    seconds, half = {"minutes": (60, 0.5), "hours": (3600, 0.05)}[unit]  # half of the last digit
    for text, share in ((low, 0.25), (high, 0.1)):
        assert float(text) == pytest.approx(found.flops / (rate * share) / seconds, abs=half)
