"""``tlcoupling report``: measure a model on a prompt, print tables, and write numbers and a page."""

from __future__ import annotations

import sys
import webbrowser
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tlcoupling.cli.app import DEFAULT_MODEL, DEFAULT_PROMPT, app, errors_as_one_line, load, prompt_or_default
from tlcoupling.errors import ResultFileError

if TYPE_CHECKING:
    from tlcoupling.analysis import Analysis


class Engine(str, Enum):
    """Jacobian engines, as ``tlcoupling.analyze`` names them."""

    auto = "auto"
    analytic = "analytic"
    autograd = "autograd"


def _k(text: str) -> int | float:
    """An int, or a fraction of d_model."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither an int nor a fraction of d_model", param_hint="--k") from None


def _tokens(text: str) -> list[int] | Literal["all"]:
    """Positions separated by commas, or ``all``."""
    if text == "all":
        return "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither 'all' nor positions such as -1 or 0,5,-1", param_hint="--tokens"
        ) from None


@app.command()
def report(
    model: Annotated[
        str, typer.Argument(help="A model name that TransformerLens knows, or a local HuggingFace folder.")
    ] = DEFAULT_MODEL,
    prompt: Annotated[
        str | None, typer.Option(help="What to measure on.", show_default=f"the prompt {DEFAULT_PROMPT!r}")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the files; made if missing.")] = Path("tlcoupling-report"),
    k: Annotated[
        list[str] | None,
        typer.Option(
            help="Singular vectors to compare: an int, or a fraction of d_model. Repeatable.", show_default="10"
        ),
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Tokens whose coupling is measured: positions such as -1 or 0,5,-1, or 'all'.")
    ] = "-1",
    layer: Annotated[
        int | None, typer.Option(help="Layer whose attention is shown.", show_default="the middle one")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="How Jacobians are computed.")] = Engine.auto,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print work, memory and time of the coupling, and measure nothing.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Measure coupling, linearity and growth of a model on a prompt; print tables, save numbers and a web page."""
    ks, positions = [_k(text) for text in k or ["10"]], _tokens(tokens)
    with errors_as_one_line():
        if estimate:
            return _estimate(model, prompt, ks, positions, engine)

        from tlcoupling.results import check_writable

        check_writable(output, "output")
        analysis = _analyze(model, prompt, ks, positions, layer, engine)

        from tlcoupling.terminal import print_analysis

        print_analysis(analysis)
        page = _save(analysis, output)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


def _analyze(
    name: str,
    prompt: str | None,
    ks: list[int | float],
    positions: list[int] | Literal["all"],
    layer: int | None,
    engine: Engine,
) -> Analysis:
    """Load the model and measure, with signs of life on a terminal's stderr."""
    from tlcoupling.analysis import analyze

    return analyze(
        load(name),
        prompt_or_default(prompt),
        k=ks,
        tokens=positions,
        attention_layer=layer,
        engine=engine.value,
        progress=sys.stderr.isatty(),
    )


def _estimate(
    name: str, prompt: str | None, ks: list[int | float], positions: list[int] | Literal["all"], engine: Engine
) -> None:
    """Load the model and say what its coupling would cost."""
    from tlcoupling.estimate import estimate
    from tlcoupling.terminal import print_estimate

    print_estimate(estimate(load(name), prompt_or_default(prompt), ks, tokens=positions, engine=engine.value))


def _save(analysis: Analysis, folder: Path) -> Path:
    """Write the result, its long table and the page; say where they are, and return the page."""
    from tlcoupling.viz import write_html

    typer.echo(f"\nresult  {analysis.save(folder / 'result.safetensors')}")
    table = folder / "result.csv"
    try:
        analysis.to_dataframe().to_csv(table, index=False)
    except OSError as error:
        raise ResultFileError(f"cannot write the table to {str(table)!r}: {error}") from error
    typer.echo(f"table   {table}")
    page = write_html(analysis, folder / "report.html")
    typer.echo(f"page    {page}")
    return page
