"""How results display and draw themselves. ``viz``, which comes after all results, registers itself here."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from tlcoupling.errors import TLCouplingError


@singledispatch
def markup(result: Any) -> str | None:
    """Return a result's HTML for a notebook; None before ``tlcoupling.viz`` is imported."""
    return None


@singledispatch
def draw(result: Any, **options: Any) -> Any:
    """Draw a result.

    Raises:
        TLCouplingError: ``tlcoupling.viz`` has not been imported.
    """
    raise TLCouplingError("figures are drawn by tlcoupling.viz: import tlcoupling.viz")
