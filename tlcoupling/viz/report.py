"""The report: all of an analysis on one HTML page that needs no network."""

from __future__ import annotations

from pathlib import Path

from tlcoupling.analysis import Analysis
from tlcoupling.errors import ResultFileError
from tlcoupling.viz import payload
from tlcoupling.viz.page import render


def render_html(analysis: Analysis) -> str:
    """The report as one HTML document: no file beside it, no request to any network.

    Raises:
        ImportError: circuitsvis, which draws the attention patterns, is not installed.
    """
    return render(
        f"{analysis.provenance.model_name} · tlcoupling",
        {
            "header": payload.header(analysis),
            "summary": payload.summary(analysis),
            "coupling": payload.coupling(analysis.coupling),
            "tokens": payload.tokens(analysis),
            "growth": payload.growth(analysis),
            "attention": payload.attention(analysis),
        },
    )


def write_html(analysis: Analysis, path: str | Path) -> Path:
    """Write the report to a file.

    Returns:
        The path written.

    Raises:
        ResultFileError: the file cannot be written; the message says why.
    """
    path, page = Path(path), render_html(analysis)
    try:
        # The data is ASCII; what a title may hold beyond UTF-8 (half of a character) becomes a reference.
        path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise ResultFileError(f"cannot write the report to {str(path)!r}: {error}") from error
    return path
