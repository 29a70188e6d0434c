"""The ``tlcoupling`` command: one module per command, registered on the application in ``app``.

Mistyped options and unwritable folders are reported before a model is loaded. Each command imports what only it needs.
``terminal`` and ``sweep_tables`` print the tables.
"""

from tlcoupling.cli import check, correlate, report, sweep
from tlcoupling.cli.app import app

__all__ = ["app", "check", "correlate", "report", "sweep"]
