"""``tlcoupling report``: measure a model on a prompt, print tables, and write the numbers and a web page."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tlcoupling.cli.app import (
    DEFAULT_MODEL,
    DEFAULT_PROMPT,
    app,
    errors_as_one_line,
    load,
    prompt_or_default,
    refuse,
    say,
)
from tlcoupling.errors import ResultFileError, TLCouplingError

if TYPE_CHECKING:
    from tlcoupling.analysis.analyze import Analysis
    from tlcoupling.forward.trace import Trace

FOLDER = "tlcoupling-report"
# The longest prompt whose tokens are compared by default: the work grows with the square of its length.
SHORT = 64
# Seconds: a measurement that took less is repeated on fresh weights by default.
QUICK = 60


class Engine(str, Enum):
    """Jacobian engines, as ``tlcoupling.analyze`` names them."""

    auto = "auto"
    analytic = "analytic"
    autograd = "autograd"


def _k(text: str) -> int | float:
    """Parse an int, or a fraction of d_model."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither an int nor a fraction of d_model", param_hint="--k") from None


def _tokens(text: str) -> list[int] | Literal["all"]:
    """Parse positions separated by commas, or ``all``."""
    if text == "all":
        return "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither 'all' nor positions such as -1 or 0,5,-1", param_hint="--tokens"
        ) from None


def _basis_layers(text: str | None) -> list[int] | int | None:
    """Parse one layer, or several separated by commas."""
    if text is None:
        return None
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not layers such as 15 or 0,15,-1", param_hint="--basis-layers") from None
    return layers if len(layers) > 1 else layers[0]


def _token_layers(text: str | None) -> list[int] | Literal["all", "none", "some"]:
    """Parse layers separated by commas, ``all`` or ``none``; None becomes ``some``, the default layers."""
    if text is None:
        return "some"
    if text in ("all", "none"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither 'all' nor 'none' nor layers such as 15 or 0,15,-1", param_hint="--token-layers"
        ) from None


@app.command()
def report(
    model: Annotated[
        str, typer.Argument(help="A model name that TransformerLens knows, or a local HuggingFace folder.")
    ] = DEFAULT_MODEL,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt to measure on.", show_default=f"the prompt {DEFAULT_PROMPT!r}")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the files; created if missing.", show_default=FOLDER)
    ] = None,
    k: Annotated[
        list[str] | None,
        typer.Option(
            help="Number of singular vectors: an int, or a fraction of d_model. Repeatable.", show_default="10"
        ),
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Tokens whose coupling is measured: positions such as -1 or 0,5,-1, or 'all'.")
    ] = "-1",
    token_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers in which tokens are compared with each other (token-wise and context coupling): such as "
            "0,15,-1, 'all' or 'none'.",
            show_default=f"first, middle and last; none at more than {SHORT} tokens",
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="How Jacobians are computed.")] = Engine.auto,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print work, memory and time without measuring.")
    ] = False,
    baseline: Annotated[
        bool | None,
        typer.Option(
            help="Measure fresh weights of the same architecture beside the model; it takes as long again.",
            show_default=f"where the measurement took less than {QUICK} seconds",
        ),
    ] = None,
    directions: Annotated[
        bool | None,
        typer.Option(
            help="Keep what pairs of layers share: the matrices behind their coupling, and tokens of the directions.",
            show_default=f"where the measurement took less than {QUICK} seconds",
        ),
    ] = None,
    basis_layers: Annotated[
        str | None,
        typer.Option(
            help="Compare tokens across layers: the layer that gives the bases, or one for each of --token-layers.",
            show_default="the same layers",
        ),
    ] = None,
    measures: Annotated[
        str,
        typer.Option(
            help="More to measure, beside fresh weights where these are measured: 'all', or some of geometry, "
            "lyapunov, profile, separated by commas. Each takes about a minute for SmolLM2-135M.",
            show_default="none",
        ),
    ] = "",
    csv: Annotated[
        bool, typer.Option("--csv", help="Also write all numbers as a long table, result.csv (some megabytes).")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Measure coupling, linearity and growth of a model on a prompt. Print tables; save the numbers and a web page."""
    if estimate:
        refuse(
            {
                "--baseline": baseline is not None,
                "--measures": bool(measures),
                "--output": output is not None,
                "--csv": csv,
                "--open": open_page,
            },
            "an estimate writes nothing",
        )
    folder = Path(FOLDER) if output is None else output
    ks, positions, compared = [_k(text) for text in k or ["10"]], _tokens(tokens), _token_layers(token_layers)
    across = _basis_layers(basis_layers)
    with errors_as_one_line(report):
        from tlcoupling.analysis.measures import measures_of, resolve_measures

        named = resolve_measures(measures if measures == "all" else [one for one in measures.split(",") if one])
        if not estimate:
            from tlcoupling.results.base import check_writable

            check_writable(folder, "output")
        loaded, text = load(model), prompt_or_default(prompt)
        options: dict[str, Any] = {
            "k": ks,
            "tokens": positions,
            "token_layers": _layers_of(loaded, text, compared),
            "basis_layers": across,
            "engine": engine.value,
        }
        if estimate:
            from tlcoupling.analysis.estimate import estimate as estimated
            from tlcoupling.cli.terminal import print_estimate

            return print_estimate(estimated(loaded, text, **options, shared=bool(directions)))

        from tlcoupling.analysis.analyze import analyze
        from tlcoupling.cli.terminal import print_analysis

        chosen = {"baseline": "fresh" if baseline else None, "shared": bool(directions)}
        analysis = analyze(loaded, text, **options, **chosen)
        if analysis.trace is not None and analysis.provenance.seconds < QUICK:
            analysis = _with_more(analysis, analysis.trace, options, baseline is None, directions is None)
        if named and analysis.trace is not None:
            beside = None if analysis.baseline is None else "fresh"
            more = measures_of(named, analysis.trace, text, analysis.coupling, baseline=beside)
            analysis = replace(analysis, **more)
        print_analysis(analysis)
        page = _save(analysis, folder, csv)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


def _layers_of(
    model: Any, prompt: str, chosen: list[int] | Literal["all", "none", "some"]
) -> list[int] | Literal["all"] | None:
    """Return the layers whose tokens are compared; by default the first, the middle and the last."""
    if chosen == "none":
        return None
    if chosen != "some":
        return chosen
    from tlcoupling.forward.hooked import require_supported
    from tlcoupling.forward.prompt import to_tokens

    require_supported(model)
    last = len(model.blocks) - 1
    return sorted({0, (last + 1) // 2, last}) if 2 <= to_tokens(model, prompt, None).shape[1] <= SHORT else None


def _with_more(analysis: Analysis, trace: Trace, options: Mapping[str, Any], fresh: bool, directions: bool) -> Analysis:
    """Return the analysis with fresh weights and shared directions; say why where there can be none."""
    from tlcoupling.analysis.analyze import analyze_baseline
    from tlcoupling.analysis.shared import shared_directions

    measures: dict[str, tuple[str, Callable[[], Any]]] = {}
    if fresh:
        measures["baseline"] = "fresh weights", lambda: analyze_baseline("fresh", trace, **options)
    if directions:
        measures["shared"] = "shared directions", lambda: shared_directions(trace, analysis.coupling)
    more = {}
    for name, (words, measure) in measures.items():
        try:
            more[name] = measure()
        except TLCouplingError as error:
            say(f"{words} were not measured: {error}", err=True)
    return replace(analysis, **more)


def _save(analysis: Analysis, folder: Path, csv: bool) -> Path:
    """Write the result, the page and the long table if asked; print their paths, and return that of the page."""
    from tlcoupling.viz import write_html

    say(f"\nresult  {analysis.save(folder / 'result.safetensors')}")
    if csv:
        table = folder / "result.csv"
        try:
            analysis.to_dataframe().to_csv(table, index=False)
        except OSError as error:
            raise ResultFileError(f"cannot write the table to {str(table)!r}: {error}") from error
        say(f"table   {table}")
    page = write_html(analysis, folder / "report.html")
    say(f"page    {page}")
    return page
