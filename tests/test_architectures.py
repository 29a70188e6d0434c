"""The table of models in docs/models.md: a few rows are measured again, and more of them where `slow` tests run.

`python benchmarks/architectures.py --write` measures all.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tlcoupling.errors import REASONS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
if not version("transformer-lens").startswith("4."):
    pytest.skip("the table is of transformer-lens 4", allow_module_level=True)
import architectures

# a plain decoder, one with experts, a state-space model, an encoder, a decoder with an encoder, and a refused one
FEW = (
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "MambaForCausalLM",
    "ViTModel",
    "T5ForConditionalGeneration decoder",
    "HrmTextForCausalLM",
)


def check(name: str) -> None:
    row = architectures.measure_apart(name)
    assert str(row) == architectures.stored()[name], "benchmarks/architectures.py --write updates docs/models.md"
    assert row.gap < 1, "the block's Jacobian is not that of the real model"


@pytest.mark.parametrize("name", FEW)
def test_a_row_is_what_is_measured(name: str):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in architectures.architectures() if name not in FEW][::6])
def test_every_sixth_row_is_what_is_measured(name: str):
    check(name)


def test_the_table_holds_every_architecture_and_only_documented_reasons():
    rows = architectures.stored()
    assert list(rows) == architectures.architectures()
    page = architectures.PAGE.read_text(encoding="utf-8")
    assert all(f"| {reason} |" in page for reason in REASONS)
    refused = [row.rpartition("refused: ")[2].rstrip(" |") for row in rows.values() if "refused: " in row]
    assert refused and set(refused) <= set(REASONS)
    measured = {name.partition(" ")[0] for name, row in rows.items() if row.split("|")[3].strip()}
    assert len(measured) >= 105
