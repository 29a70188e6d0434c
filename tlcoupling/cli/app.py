"""Parts that all commands share: the application, loading a model, the default prompt, errors as one line."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo

from tlcoupling.cli import environment
from tlcoupling.errors import ArgumentError, TLCouplingError
from tlcoupling.text import visible

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PROMPT = "landmarks"

app = typer.Typer(
    help="Measure transformers as dynamical systems: coupling, linearity and growth.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(context: Any, wanted: bool) -> bool:
    if wanted:
        typer.echo(f"tlcoupling {environment.installed('tlcoupling')}")
        for line in environment.lines() if context.params["verbose"] else ():
            typer.echo(line)
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Show the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", is_eager=True, help="With --version, also those of Python, torch and others.")
    ] = False,
) -> None:
    """Measure transformers as dynamical systems: coupling, linearity and growth."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a token that the terminal cannot encode must not crash the command


def load(name: str) -> Any:
    """Load a model, with a spinner on stderr in a terminal."""
    from rich.console import Console
    from rich.text import Text

    from tlcoupling.models.load import load_model

    with Console(stderr=True).status(Text(f"loading {visible(name)}")):
        return load_model(name)


def prompt_or_default(given: str | None) -> str:
    """Return the given prompt, or the default prompt for None."""
    if given is not None:
        return given
    prompts = resources.files("tlcoupling") / "data" / "prompts.json"
    return json.loads(prompts.read_text(encoding="utf-8"))[DEFAULT_PROMPT]


def say(text: str, err: bool = False) -> None:
    """Print lines of text, on stderr if ``err``. Names in it cannot command the terminal (``tlcoupling.text``)."""
    for line in text.split("\n"):
        typer.echo(visible(line) if line else "", err=err)


def refuse(given: Mapping[str, bool], allowed: str) -> None:
    """Reject options that would have no effect, with exit code 2.

    Args:
        given: for each option as it is typed, whether it was given.
        allowed: the end of the message "Invalid value for --option: ...".
    """
    for option, present in given.items():
        if present:
            raise typer.BadParameter(allowed, param_hint=option)


def _in_words_of_options(error: TLCouplingError, command: Callable[..., None]) -> str:
    """Return an error's message; an argument of Python that was given as an option has the option's name."""
    hints = get_type_hints(command, include_extras=True)
    options = {name for name, hint in hints.items() if isinstance(getattr(hint, "__metadata__", "-")[0], OptionInfo)}
    if not isinstance(error, ArgumentError) or error.name not in options:
        return str(error)
    option = "--" + error.name.replace("_", "-")
    given = f"{option} is not given" if error.value is None else f"{option} {error.value!r} is not allowed"
    return f"{given}; allowed: {error.allowed}"


@contextmanager
def errors_as_one_line(command: Callable[..., None]) -> Iterator[None]:
    """Turn a ``TLCouplingError`` into one line on stderr and exit code 1, and each warning into one line.

    Args:
        command: the command that runs. Its arguments are named as its options are typed.
    """
    formatted = warnings.formatwarning

    def shown(message: Warning | str, *rest: Any, **more: Any) -> str:
        return f"warning: {visible(' '.join(str(message).split()))}\n"

    warnings.formatwarning = shown
    try:
        yield
    except TLCouplingError as error:
        say(f"error: {' '.join(_in_words_of_options(error, command).split())}", err=True)
        raise typer.Exit(1) from error
    finally:
        warnings.formatwarning = formatted
