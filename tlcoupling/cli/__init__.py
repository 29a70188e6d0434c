"""The ``tlcoupling`` command: one module a command, on the application in ``app``.

Mistyped options and a folder that cannot be written to are found before any model is loaded, and what only a command
needs is imported by that command.
"""

from tlcoupling.cli import check, correlate, report, sweep
from tlcoupling.cli.app import app

__all__ = ["app", "check", "correlate", "report", "sweep"]
