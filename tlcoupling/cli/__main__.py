"""``python -m tlcoupling.cli``."""

from tlcoupling.cli import app

app()
