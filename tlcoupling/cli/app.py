"""What the commands share: the application, the model, the default prompt, and errors as one line."""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from typing import Annotated, Any

import typer

from tlcoupling.errors import TLCouplingError

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PROMPT = "landmarks"

app = typer.Typer(
    help="Transformer models as dynamical systems: coupling, linearity and growth.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> bool:
    if wanted:
        try:
            version = importlib.metadata.version("tlcoupling")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        typer.echo(f"tlcoupling {version}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Transformer models as dynamical systems: coupling, linearity and growth."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a token that a terminal cannot show must not end the command


def load(name: str) -> Any:
    """Load a model, with a sign of life on a terminal's stderr."""
    from rich.console import Console
    from rich.text import Text

    from tlcoupling.models.load import load_model

    with Console(stderr=True).status(Text(f"loading {name}")):
        return load_model(name)


def prompt_or_default(given: str | None) -> str:
    """The prompt, or the one of the examples."""
    if given is not None:
        return given
    prompts = resources.files("tlcoupling") / "data" / "prompts.json"
    return json.loads(prompts.read_text(encoding="utf-8"))[DEFAULT_PROMPT]


def refuse(given: Mapping[str, bool], allowed: str) -> None:
    """End with exit code 2 where an option is given that would do nothing.

    Args:
        given: options as they are typed, and whether each was.
        allowed: where they are, as the end of the sentence "Invalid value for --option: ...".
    """
    for option, present in given.items():
        if present:
            raise typer.BadParameter(allowed, param_hint=option)


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """End with exit code 1 and one line on stderr where tlcoupling refuses on purpose."""
    try:
        yield
    except TLCouplingError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error
