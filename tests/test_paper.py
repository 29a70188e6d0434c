"""docs/paper.md: its numbers are those of its stored output, and what is cheap of that is measured again."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tlcoupling.models.load import _transformer_bridge

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(_transformer_bridge() is None, reason="its networks are bridges")
pytest.importorskip("matplotlib")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import paper

    yield paper
    for name in ("paper", "paper_dynamics", "paper_networks", "paper_smollm2", "zoo", "chance"):
        sys.modules.pop(name, None)


def test_the_page_is_its_template_with_the_stored_numbers(paper: ModuleType):
    numbers = paper.stored()
    assert list(numbers) == list(paper.CLAIMS)
    assert paper.PAGE.read_text(encoding="utf-8") == paper.rendered(numbers)


def test_every_claim_has_its_section_and_its_figure(paper: ModuleType):
    page = paper.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## `(\w+)`", page, re.MULTILINE) == list(paper.CLAIMS)
    assert re.findall(r"\]\((paper/\w+\.png)\)", page) == [f"paper/{name}.png" for name in paper.CLAIMS]
    assert {path.stem for path in paper.FOLDER.glob("*.png")} == set(paper.CLAIMS)


@pytest.mark.filterwarnings("ignore::UserWarning")  # a network that scales its input has steps without a direction
@pytest.mark.parametrize("name", ["points", "pythia", "trivial"])
def test_what_is_cheap_comes_out_again(paper: ModuleType, tmp_path: Path, name: str):
    """To four digits: the rest may differ between machines, and what the solver leaves open differs altogether."""

    def compared(numbers: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in numbers.items() if key not in ("scaling ed", "scaling excess", "twins")}

    again, before = paper.rounded(paper.CLAIMS[name](tmp_path)), paper.stored()[name]
    assert compared(again) == pytest.approx(compared(before), rel=1e-4)
    assert again.get("twins") == before.get("twins")
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
