"""``tlcoupling check``: test the library's guarantees on a model of the user."""

from __future__ import annotations

from typing import Annotated

import typer

from tlcoupling.cli.app import DEFAULT_MODEL, app, errors_as_one_line, load


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="A model name that TransformerLens knows, or a local HuggingFace folder.")
    ] = DEFAULT_MODEL,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt to check on.", show_default="eight tokens spread over the vocabulary")
    ] = None,
) -> None:
    """Check a model: what holds, what falls back to autograd, and what is refused and why. Exit code 1 if refused."""
    with errors_as_one_line(check):
        from tlcoupling.analysis.checking import check as check_model
        from tlcoupling.cli.terminal import print_check

        result = check_model(load(model), prompt)
        print_check(result)
    if not result.passed:
        raise typer.Exit(1)
