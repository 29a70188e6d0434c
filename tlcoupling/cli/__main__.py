"""Run the command line as ``python -m tlcoupling.cli``."""

from tlcoupling.cli import app

app()
