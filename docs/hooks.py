"""Extend the site build: demos as pages, formulas as MathML with their font, tables from the code, versions."""

from __future__ import annotations

import csv
import html
import importlib.util
import os
import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from fontTools.ttLib import TTFont
from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

_TABLE = re.compile(r"<!-- table of (\S+)\.(\w+) -->")

_ROWS = re.compile(r"<!-- rows of (\S+) -->")

_REMOTE_IMAGE = re.compile(r'<img [^>]*?src="https?://[^>]*?>')


def on_config(config: Any) -> Any:
    """Show the list of versions where ``mike`` builds one of them. A page from disk has no list to load."""
    if os.environ.get("MIKE_DOCS_VERSION"):
        config.extra["version"] = {"provider": "mike"}
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add the notebooks, which are outside ``docs/``."""
    root = Path(config.config_file_path).parent
    for notebook in sorted((root / "demos").glob("*.ipynb")):
        path = notebook.relative_to(root).as_posix()
        files.append(File(path, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_post_build(config: Any) -> None:
    """Write the font of the formulas, STIX Two Math (SIL Open Font License), from the package ``ziamath``."""
    package = importlib.util.find_spec("ziamath").origin  # found and not imported: only its file is needed
    font = TTFont(Path(package).parent / "fonts" / "STIXTwoMath-Regular.ttf")
    font.flavor = "woff"
    font.save(Path(config.site_dir) / "STIXTwoMath.woff")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Replace two marks by tables.

    ``<!-- table of module.NAME -->`` by that of a dictionary of columns, ``<!-- rows of FILE -->`` by those of a CSV
    file of ``benchmarks/chance.py``, one table for each group.
    """

    def table(match: re.Match[str]) -> str:
        columns = getattr(importlib.import_module(match[1]), match[2])
        rows = [f"| `{name}` | {kind} | {text} |" for name, (kind, text) in columns.items()]
        return "\n".join(["| column | type | what it is |", "|---|---|---|", *rows])

    def rows(match: re.Match[str]) -> str:
        lines: list[str] = []
        with (Path(config.docs_dir) / match[1]).open(encoding="utf-8", newline="") as file:
            for group, members in groupby(csv.DictReader(file), key=itemgetter("group")):
                lines += [
                    "",
                    f"### `{group}`",
                    "",
                    "| what | is to hold | found | error | simulations |",
                    "|---|---|---|---|---|",
                ]
                lines += [
                    "| {what} | {low:g} to {high:g} | {found} | {error} | {simulations} |".format(
                        **{**row, "low": float(row["low"]), "high": float(row["high"])}
                    )
                    for row in members
                ]
        return "\n".join(lines)

    return _ROWS.sub(rows, _TABLE.sub(table, markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Replace the LaTeX that ``pymdownx.arithmatex`` marks by MathML, and remote images by their text."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    # the badges of the notebooks are on another server, so a page shows their text
    content = _REMOTE_IMAGE.sub(lambda image: "".join(re.findall(r'alt="([^"]*)"', image[0])[:1]), content)
    return _FORMULA.sub(formula, content)
