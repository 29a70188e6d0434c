"""``tlcoupling sweep``: the models that it loads on each generation of TransformerLens, and how it refuses."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pandas as pd
import pytest
import torch
from cases import CASES
from command_line import words_read
from typer.testing import CliRunner

from tlcoupling.cli import app
from tlcoupling.cli.app import errors_as_one_line
from tlcoupling.errors import ModelLoadError
from tlcoupling.models.load import _hooked_transformer, _transformer_bridge

HOOKED, BRIDGE = _hooked_transformer(), _transformer_bridge()
BY_DEFAULT = "bridge" if BRIDGE is not None else "hooked"


def sweep(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["sweep", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both loaders of TransformerLens, as far as they are there, with their signatures and a small model each."""
    loaders = {}
    for name, model_class, loader in (
        ("hooked", HOOKED, "from_pretrained"),
        ("bridge", BRIDGE, "boot_transformers"),
    ):
        if model_class is not None:
            model = next(case for case in CASES if case.name.startswith(name)).model(torch.float32)
            loaders[name] = create_autospec(getattr(model_class, loader), return_value=words_read(model, monkeypatch))
            monkeypatch.setattr(model_class, loader, loaders[name])
    return loaders


@pytest.mark.parametrize(
    ("entry", "loader"), [("", BY_DEFAULT), ("hooked = true, ", "hooked"), ("hooked = false, ", "bridge")]
)
def test_a_published_series_is_loaded_step_by_step(tmp_path: Path, hub: dict[str, Any], entry: str, loader: str):
    """A HookedTransformer knows steps as ``checkpoint_value``, a bridge the hub's revisions."""
    if loader not in hub:
        pytest.skip(f"this transformer-lens has no {loader} model")
    (tmp_path / "plan.toml").write_text(
        f'models = [{{ name = "EleutherAI/pythia-70m", {entry}checkpoints = [0, 1000] }}]\n'
        'prompts = { text = "w1 w2 w3 w4 w5" }\nsettings = { k = 2 }\n'
    )
    table = tmp_path / "table.parquet"
    result = sweep(str(tmp_path / "plan.toml"), "--table", str(table))
    assert result.exit_code == 0, result.output
    given = {
        "hooked": [{"checkpoint_value": 0}, {"checkpoint_value": 1000}],
        "bridge": [{"revision": "step0"}, {"revision": "step1000"}],
    }[loader]
    calls = [(call.args, call.kwargs) for call in hub[loader].call_args_list]
    assert calls == [(("EleutherAI/pythia-70m",), one) for one in given]
    assert all(not other.called for name, other in hub.items() if name != loader)
    rows = pd.read_parquet(table)
    assert rows.groupby("revision")["step"].unique().map(list).to_dict() == {"step0": [0], "step1000": [1000]}
    assert set(rows["status"]) == {"measured"} and set(rows["sublayer"]) == {"block", "attn", "mlp"}


@pytest.mark.parametrize(
    ("options", "refused", "allowed"),
    [
        (["--rate", "50"], "--rate", "give it with --dry-run"),
        (["--logs", "logs"], "--logs", "give it with --executor slurm"),
        (["--workers", "2", "--executor", "slurm"], "--workers", "give it with --executor here"),
        (["--dry-run", "--table", "all.parquet"], "--table", "a dry run measures nothing"),
        (["--dry-run", "--workers", "2"], "--workers", "a dry run measures nothing"),
        (["--dry-run", "--executor", "slurm"], "--executor", "a dry run measures nothing"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path: Path, options: list[str], refused: str, allowed: str):
    plan = tmp_path / "plan.toml"
    plan.write_text('models = ["gpt2"]\nprompts = { text = "a" }\n')
    result = sweep(str(plan), *options)
    assert result.exit_code == 2
    assert f"Invalid value for {refused}: {allowed}" in " ".join(result.stderr.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


def test_a_table_that_nothing_can_write_is_refused_before_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    plan = tmp_path / "plan.toml"
    plan.write_text('models = ["gpt2"]\nprompts = { text = "a" }\n')
    result = sweep(str(plan), "--table", str(tmp_path / "all.parquet"))
    assert result.exit_code == 1 and "the table needs pyarrow: pip install pyarrow" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


@pytest.mark.parametrize(
    ("prompts", "refused", "allowed"),
    [
        ('text = "a"\nfield = "body"', "field = 'body' does not apply to text", "allowed: limit"),
        ('text = "a"\nsplit = "test"', "split = 'test' does not apply to text", "allowed: limit"),
        ('file = "rows.jsonl"\nconfig = "en"', "config = 'en' does not apply to file", "allowed: field, limit"),
        ('file = "rows.jsonl"\nsplit = "test"', "split = 'test' does not apply to file", "allowed: field, limit"),
    ],
)
def test_keys_of_prompts_that_would_do_nothing_are_refused(tmp_path: Path, prompts: str, refused: str, allowed: str):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "plan.toml").write_text(f'models = ["gpt2"]\n[prompts]\n{prompts}\n')
    result = sweep(str(tmp_path / "plan.toml"), "--dry-run")
    assert result.exit_code == 1 and result.stdout == ""
    assert refused in result.stderr and allowed in result.stderr and "plan.toml, line 2" in result.stderr


def test_names_do_not_command_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name with a colour, rich's markup and a bidirectional control; in a failure, a damaged file and an error."""
    evil = "a\x1b[31m[bold]\u202e[/]"

    def unloadable(*args: Any, **kwargs: Any) -> Any:
        raise ModelLoadError(f"no {evil} here")

    monkeypatch.setattr("tlcoupling.models.load.load_model", unloadable)
    plan = tmp_path / "plan.toml"
    label = evil.replace("\x1b", "\\u001b")
    plan.write_text(f'models = [{{ name = "nowhere/one", label = "{label}" }}]\nprompts.text = "a"\n', "utf-8")
    result = sweep(str(plan))
    dry = sweep(str(plan), "--dry-run", "--rate", "1")
    refused = sweep(str(tmp_path / f"no {evil}.toml"))
    merged = CliRunner().invoke(app, ["merge", str(tmp_path / "plan.store"), "--into", str(tmp_path / f"{evil}.store")])
    assert (result.exit_code, dry.exit_code, refused.exit_code, merged.exit_code) == (1, 0, 1, 0)
    for one in (result, dry, refused, merged):
        assert "\x1b" not in one.output and "\u202e" not in one.output
        assert "[31m[bold]" in one.output, "shown, not obeyed"
    with errors_as_one_line(print):
        warning = warnings.formatwarning(f"{evil} is\nodd", UserWarning, "file.py", 1, "")
    assert "\x1b" not in warning and warning.startswith("warning: a") and warning.endswith(" is odd\n")
