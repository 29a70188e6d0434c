"""The documentation site: it names all that is public, asks no other server for anything, and opens from disk."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chromium import browser, opened  # noqa: F401

import tlcoupling as tlc
from tlcoupling.sweeps import plan_file as reading
from tlcoupling.sweeps import prompts
from tlcoupling.sweeps.cells import Settings
from tlcoupling.sweeps.shapes import Shape
from tlcoupling.sweeps.table import COLUMNS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
_TOOLS = ("material", "mkdocstrings", "mkdocs_jupyter", "latex2mathml", "ziamath")


def test_the_reference_covers_every_public_name():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^::: tlcoupling\.(\S+)$", pages, re.MULTILINE)
    modules = {"parity", "viz"}
    public = {*tlc.__all__} - modules | {f"viz.{name}" for name in tlc.viz.__all__ if name != "figures"}
    public |= {f"viz.figures.{name}" for name in tlc.viz.figures.__all__}
    public |= {"parity.published", "parity.DEFECTS"}
    assert public - {*documented} == set()
    assert len(documented) == len({*documented})  # none twice: a link would have two targets
    for name in documented:  # none that is gone
        if name == "viz.Live" and importlib.util.find_spec("anywidget") is None:
            continue
        holder = tlc
        for part in name.split("."):
            holder = getattr(holder, part)


def test_the_table_of_defects_is_whole():
    page = (DOCS / "published-code.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert [name for name in rows if name not in ("k", "normalizer")] == [each.name for each in tlc.parity.DEFECTS]


def test_the_page_on_sweeps_has_every_key_of_a_plan():
    page = (DOCS / "howto" / "sweeps.md").read_text(encoding="utf-8")
    keys = {*reading._TOP, *reading._OF_MODEL, *reading._RESOURCES, *prompts.KEYS}
    keys |= {field.name for kind in (Settings, Shape) for field in dataclasses.fields(kind)}
    named = set(re.findall(r"`(\w+)`", page)) | set(re.findall(r"^(\w+) = ", page, re.MULTILINE))
    assert keys - named == set()
    options = page[page.index("Prompts come from") : page.index("Settings are")]
    beside = {row[0]: re.findall(r"`(\w+)`", row[1]) for row in re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", options, re.M)}
    assert beside == {kind: list(keys) for kind, keys in prompts._BESIDE.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    if not all(map(importlib.util.find_spec, _TOOLS)):
        pytest.skip("needs the extra 'docs'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_asks_nobody(site: Path):
    pages = list(site.rglob("*.html"))
    assert {page.stem for page in pages} >= {"coupling", "jacobians", "01_quickstart", "migration"}
    loaded = re.compile(r"""<(?:script|link|img|iframe|source)[^>]*?\s(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert loaded.findall(text) == [], page
        assert 'class="arithmatex"' not in text, f"a formula of {page} was not drawn"
    columns = (site / "howto" / "sweeps.html").read_text(encoding="utf-8")
    assert all(f"<td><code>{name}</code></td>" in columns for name in COLUMNS)
    formulas = (site / "concepts" / "coupling.html").read_text(encoding="utf-8")
    assert formulas.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"') >= 4
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_the_site_opens_from_disk(site: Path, browser: Any):  # noqa: F811
    """Links lead to files, the search finds, formulas have their own font, and no signature is wider than its page."""
    with opened(browser, site / "index.html", strict=False) as page:
        page.get_by_role("link", name="Coupling and its null", exact=True).click()
        page.wait_for_url("**/concepts/coupling.html")
        page.evaluate("document.fonts.ready")
        fonts = page.evaluate("[...document.fonts].filter(font => font.status === 'loaded').map(font => font.family)")
        assert [font.strip('"') for font in fonts] == ["STIX Two Math"]
        page.locator(".md-search__input").click(force=True)
        page.locator(".md-search__input").press_sequentially("expodistance")
        page.wait_for_function("document.querySelectorAll('.md-search-result__link').length > 0")
        first = page.locator(".md-search-result__link").first
        address = first.get_attribute("href")
        first.click()
        page.wait_for_url(address)
        assert "expodistance" in page.content().lower()
        for reference in sorted((site / "api").glob("*.html")):
            page.goto(reference.as_uri())
            signatures = page.evaluate(
                "[...document.querySelectorAll('.doc-signature code')]"
                ".filter(code => code.scrollWidth > code.clientWidth).map(code => code.textContent)"
            )
            assert signatures == [], reference
