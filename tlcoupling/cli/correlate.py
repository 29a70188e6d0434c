"""``tlcoupling correlate``: coupling, linearity and growth against scores of models, and against width alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlcoupling.cli.app import app, errors_as_one_line, say
from tlcoupling.errors import ResultFileError
from tlcoupling.text import counted, visible

if TYPE_CHECKING:
    from tlcoupling.scores.correlate import Correlations


@app.command()
def correlate(
    table: Annotated[
        str | None,
        typer.Argument(
            help="A store of `tlcoupling sweep`, or a CSV or parquet file with one row per model.",
            show_default="the published points of the paper's figure",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="A CSV or parquet file with columns model and score; optional: revision or step, run and family.",
            show_default="the table's own column 'score'",
        ),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="The column of the scores.", show_default="score, or the only numeric column")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the files; created if missing.")] = Path(
        "tlcoupling-correlate"
    ),
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Skip measured models without a score; otherwise they are an error.")
    ] = False,
    where: Annotated[
        str | None,
        typer.Option(help="Keep models that meet a condition, such as 'score > 50'.", show_default="all models"),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Confidence level of the intervals.")] = 0.95,
) -> None:
    """Correlate measurements with scores: intervals, and partial correlations at a fixed null, width or size.

    Without a table, the 28 published points are used: coupling correlates with the score at R^2 = 0.80.
    The function 1 - 1/sqrt(0.1 d_model) of width alone explains 93 % of the coupling's variance.
    """
    with errors_as_one_line(correlate):
        from tlcoupling.results.base import check_writable
        from tlcoupling.scores.correlate import correlate as correlate_models

        check_writable(output, "output")
        result = correlate_models(
            table,
            None if scores is None else str(scores),
            score=score,
            where=where,
            confidence=confidence,
            missing="drop" if drop_missing else "error",
        )
        _print(result, table)
        _write(result, output)


def _print(result: Correlations, table: str | None) -> None:
    """Print three tables and a summary in words."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    title = "The published points" if table is None else table
    console.print(Text(visible(title), style="bold"))
    console.print(f"{counted(len(result.models), 'model')}, {len(result.families)} families")
    console.print(Text(visible(_units(result))))
    if result.where:
        console.print(Text(visible(f"left out by {result.where!r}: {', '.join(result.left_out) or 'none'}")))
    for heading, columns, rows in (_against(result), _fixed(result), _without(result)):
        console.print(f"\n{heading}")
        console.print(_table(columns, rows))
    for line in summary(result):
        console.print(Text(f"\n{visible(line)}"))


def _units(result: Correlations) -> str:
    """Say what counts as independent."""
    count = len(set(result.cluster))
    if count == len(result.models):
        return "p-values and intervals take the models as independent"
    return f"p-values and intervals are over {count} clusters (column {result.cluster_by!r})"


def summary(result: Correlations) -> list[str]:
    """Summarise the correlations of the blocks' coupling and excess in sentences."""
    lines = []
    for name in result.predictors:
        if " " in name and " block " not in name:
            continue
        of = result.of(name)
        if name.startswith("coupling") and not math.isnan(of["by_null"]):
            lines.append(
                f"{name} correlates with the score at R² = {of['r_squared']:.2f}. Its null explains "
                f"{of['by_null']:.0%} of its variance over these models; width in any form explains "
                f"{of['by_width']:.0%}. With the null held fixed, the partial correlation is "
                f"{of['partial given null']:+.2f} (p = {_p(of['partial_p given null'])})."
            )
        if name.startswith("excess"):
            lines.append(f"{name}, coupling above its null, correlates with the score at R² = {of['r_squared']:.2f}.")
    return lines


def _against(result: Correlations) -> tuple[str, list[str], list[list[str]]]:
    interval = f"{result.confidence:.0%} interval"
    rows = []
    for name in result.predictors:
        of = result.of(name)
        between = f"{of['low']:+.2f} to {of['high']:+.2f}" if not math.isnan(of["low"]) else "–"
        cells = [_number(of["r_squared"]), _p(of["p"]), _signed(of["r"]), between, _signed(of["rho"])]
        rows.append([name, str(int(of["n"])), *cells])
    return "Against the score", ["predictor", "n", "R²", "p", "r", interval, "Spearman"], rows


def _fixed(result: Correlations) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name in result.predictors:
        of = result.of(name)
        held = [
            "–" if math.isnan(r := of[f"partial given {each}"]) else f"{r:+.2f} ({_p(of[f'partial_p given {each}'])})"
            for each in result.given
        ]
        rows.append([name, *held])
    return "Partial correlation r (and p) with one variable held fixed", ["predictor", *result.given], rows


def _without(result: Correlations) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name, by_family in zip(result.predictors, result.r_without.square(), strict=True):
        known = [
            (float(value), family) for value, family in zip(by_family, result.families, strict=True) if value == value
        ]
        ends = [part for r, family in (min(known), max(known)) for part in (_number(r), family)] if known else ["–"] * 4
        of = result.of(name)
        rows.append([name, _share(of["by_null"]), _share(of["by_width"]), *ends])
    heading = (
        "Share of a predictor's variance explained by its null, and by width in any form;\n"
        "lowest and highest R² with one family of models left out"
    )
    return heading, ["predictor", "null", "width", "low", "without", "high", "without "], rows


def _table(columns: list[str], rows: list[list[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        words = index == 0 or name.startswith("without")
        table.add_column(name, justify="left" if words else "right", header_style="dim", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}"


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0")


def _write(result: Correlations, folder: Path) -> None:
    """Write the result, its numbers as CSV and JSON, and figures if matplotlib is installed."""
    say(f"\nresult  {result.save(folder / 'correlations.safetensors')}")
    by_name = {name: {key: _plain(value) for key, value in result.of(name).items()} for name in result.predictors}
    try:
        result.to_dataframe().to_csv(folder / "correlations.csv", index=False)
        (folder / "correlations.json").write_text(json.dumps(by_name, indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise ResultFileError(f"cannot write to {str(folder)!r}: {error}") from error
    say(f"table   {folder / 'correlations.csv'}\nnumbers {folder / 'correlations.json'}")
    for name in result.predictors:
        if name.startswith("coupling") and (" " not in name or " block " in name):
            say(_figure(result, name, folder / f"{name.replace(' ', '-').replace('=', '')}.png"))


def _figure(result: Correlations, coupling: str, path: Path) -> str:
    """Draw a coupling and its null against the score; return a line with the path, or with the reason for none."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return "figure  none: it needs matplotlib, pip install matplotlib"
    from tlcoupling.viz import figures

    figure = figures.coupling_against_score(result, coupling=coupling)
    return f"figure  {figures.save(figure, path)}"


def _plain(value: float | int) -> float | int | None:
    return None if math.isnan(value) else value
