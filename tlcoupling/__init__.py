"""Transformer models as dynamical systems: coupling, linearity and growth from a hooked forward pass.

The public names are those of ``public``, and are imported when the first of them is used. So the command line shows its
help without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlcoupling.public import *  # noqa: F403
    from tlcoupling.public import __all__ as __all__


def __getattr__(name: str) -> Any:
    """Import all public names."""
    if name == "__all__" or not name.startswith("__"):
        public = importlib.import_module("tlcoupling.public")
        globals().update({each: getattr(public, each) for each in public.__all__}, __all__=public.__all__)
    try:
        return globals()[name]  # folders too, such as tlcoupling.sweeps
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    """The public names alone, for tab completion."""
    return sorted(__getattr__("__all__"))
