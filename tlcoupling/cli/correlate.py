"""``tlcoupling correlate``: coupling, linearity and growth against scores of the models, and against width alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlcoupling.cli.app import app, errors_as_one_line
from tlcoupling.errors import ResultFileError

if TYPE_CHECKING:
    from tlcoupling.scores.correlate import Correlations


@app.command()
def correlate(
    table: Annotated[
        str | None,
        typer.Argument(
            help="A store of `tlcoupling sweep`, or a CSV or parquet file with a row per model.",
            show_default="the published points of the paper's figure",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="A CSV or parquet file with the columns model, score and, if you like, revision or step, and family.",
            show_default="the table's own column 'score'",
        ),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="The column of the scores.", show_default="score, or the only one of numbers")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the files; made if missing.")] = Path("tlcoupling-correlate"),
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Leave measured models without a score out, instead of refusing.")
    ] = False,
    confidence: Annotated[float, typer.Option(help="Level of the bootstrap intervals.")] = 0.95,
    resamples: Annotated[int, typer.Option(help="Bootstrap samples.")] = 9999,
) -> None:
    """Set measurements against scores: correlations, intervals, what is left at a fixed null, width or size.

    Without a table: the 28 published points, whose coupling goes with the score at R^2 = 0.80, and of whose variance
    1 - 1/sqrt(0.1 d_model), a function of width alone, explains 93 %.
    """
    with errors_as_one_line():
        from tlcoupling.results.base import check_writable
        from tlcoupling.scores.correlate import correlate as correlate_models

        check_writable(output, "output")
        found = correlate_models(
            table,
            None if scores is None else str(scores),
            score=score,
            confidence=confidence,
            resamples=resamples,
            missing="drop" if drop_missing else "error",
        )
        _print(found, table)
        _write(found, output)


def _print(found: Correlations, table: str | None) -> None:
    """Three tables and what they say in words."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    title = "The published points" if table is None else table
    console.print(Text(title, style="bold"))
    console.print(f"{len(found.models)} models, {len(found.families)} families")
    for heading, columns, rows in (_against(found), _fixed(found), _without(found)):
        console.print(f"\n{heading}")
        console.print(_table(columns, rows))
    for line in summary(found):
        console.print(f"\n{line}")


def summary(found: Correlations) -> list[str]:
    """What the numbers say of the blocks' coupling and excess, in words."""
    lines = []
    for name in found.predictors:
        if " " in name and " block " not in name:
            continue
        of = found.of(name)
        if name.startswith("coupling") and not math.isnan(of["by_null"]):
            lines.append(
                f"{name} goes with the score at R² = {of['r_squared']:.2f}. Its null explains {of['by_null']:.0%} of "
                f"its variance over these models, and width in any form {of['by_width']:.0%}; with the null held "
                f"fixed, r = {of['partial given null']:+.2f} (p = {_p(of['partial_p given null'])}) is left."
            )
        if name.startswith("excess"):
            lines.append(f"{name}, coupling above its null, goes with the score at R² = {of['r_squared']:.2f}.")
    return lines


def _against(found: Correlations) -> tuple[str, list[str], list[list[str]]]:
    interval = f"{found.confidence:.0%} interval"
    rows = []
    for name in found.predictors:
        of = found.of(name)
        between = f"{of['low']:+.2f} to {of['high']:+.2f}" if not math.isnan(of["low"]) else "–"
        cells = [_number(of["r_squared"]), _p(of["p"]), _signed(of["r"]), between, _signed(of["rho"])]
        rows.append([name, str(int(of["n"])), *cells])
    return "Against the score", ["predictor", "n", "R²", "p", "r", interval, "Spearman"], rows


def _fixed(found: Correlations) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name in found.predictors:
        of = found.of(name)
        held = [
            "–" if math.isnan(r := of[f"partial given {each}"]) else f"{r:+.2f} ({_p(of[f'partial_p given {each}'])})"
            for each in found.given
        ]
        rows.append([name, *held])
    return "What is left of r (and p) when something is held fixed", ["predictor", *found.given], rows


def _without(found: Correlations) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name, by_family in zip(found.predictors, found.r_without.square(), strict=True):
        known = [
            (float(value), family) for value, family in zip(by_family, found.families, strict=True) if value == value
        ]
        ends = [part for r, family in (min(known), max(known)) for part in (_number(r), family)] if known else ["–"] * 4
        of = found.of(name)
        rows.append([name, _share(of["by_null"]), _share(of["by_width"]), *ends])
    heading = (
        "Share of a predictor's own variance that its null explains, and width in any\n"
        "form; R² with one family of models left out, at its lowest and highest"
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
        table.add_row(*map(Text, row))
    return table


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}"


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0")


def _write(found: Correlations, folder: Path) -> None:
    """Numbers as CSV and JSON, the result itself, and a figure where matplotlib is installed."""
    typer.echo(f"\nresult  {found.save(folder / 'correlations.safetensors')}")
    by_name = {name: {key: _plain(value) for key, value in found.of(name).items()} for name in found.predictors}
    try:
        found.to_dataframe().to_csv(folder / "correlations.csv", index=False)
        (folder / "correlations.json").write_text(json.dumps(by_name, indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise ResultFileError(f"cannot write to {str(folder)!r}: {error}") from error
    typer.echo(f"table   {folder / 'correlations.csv'}\nnumbers {folder / 'correlations.json'}")
    for name in found.predictors:
        if name.startswith("coupling") and (" " not in name or " block " in name):
            typer.echo(_figure(found, name, folder / f"{name.replace(' ', '-').replace('=', '')}.png"))


def _figure(found: Correlations, coupling: str, path: Path) -> str:
    """Draw a coupling against the score, beside its null, and say where; or why not."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return "figure  none: it needs matplotlib, pip install 'tlcoupling[figures]'"
    from tlcoupling.viz import figures

    null = coupling.replace("coupling", "null", 1)
    figure = figures.coupling_against_score(found.by_model(), coupling=coupling, null=null, width="width")
    return f"figure  {figures.save(figure, path)}"


def _plain(value: float | int) -> float | int | None:
    return None if math.isnan(value) else value
