"""Statements about chance: those of the documentation hold, and a short simulation of each agrees."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PARTS = {  # of the simulations: seconds, not minutes
    "null": 0.05,
    "rotation": 0.025,
    "fresh": 0.015,
    "tokens": 0.25,
    "overlaps": 0.1,
    "intervals": 0.05,
    "correlations": 0.1,
}


@pytest.fixture(scope="module")
def chance() -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("chance_rows", ROOT / "benchmarks" / "chance.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_row_of_the_documentation_holds(chance: ModuleType):
    """Within three standard errors; of a hundred rows at the edge of what is said, one in eight would miss by two."""
    rows = chance.stored()
    assert list(rows) == list(chance.GROUPS)
    assert [str(row) for of in rows.values() for row in of if not row.holds(3)] == []


def test_each_statement_is_where_the_page_says_and_has_its_rows(chance: ModuleType):
    page = (ROOT / "docs" / "concepts" / "chance.md").read_text(encoding="utf-8")
    statements = re.findall(r'^\| "(.*)" \| `(\S+)` \| (.*) \|$', page, re.MULTILINE)
    assert len(statements) > 10
    for text, where, _ in statements:
        assert text in " ".join((ROOT / where).read_text(encoding="utf-8").split()), (text, where)
    assert {name for *_, names in statements for name in re.findall(r"`(\w+)`", names)} == set(chance.GROUPS)


@pytest.mark.parametrize(
    "name", [*PARTS, *(pytest.param(name, marks=pytest.mark.slow) for name in ("power", "weights"))]
)
def test_a_short_simulation_agrees(chance: ModuleType, name: str):
    """Each row within four of its own standard errors, which is one chance in 10^4 a row."""
    rows = chance.simulated(name, PARTS.get(name, 0.25))
    assert [row.what for row in rows] == [row.what for row in chance.stored()[name]]
    assert [str(row) for row in rows if not row.holds(4)] == []
