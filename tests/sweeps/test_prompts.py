"""Prompts of files and datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_sweeps import read

import tlcoupling as tlc
from tlcoupling.errors import PlanError


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
