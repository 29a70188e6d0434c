"""The progress bar of long measurements."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")

DELAY = 2.0  # seconds after which a bar that nobody asked for appears


def watched() -> bool:
    """Return whether somebody may watch: on a terminal or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def ticking(items: Collection[ItemT], name: str, progress: bool | None) -> Iterator[ItemT]:
    """Iterate over the items, with a progress bar called ``name`` if ``progress`` is True.

    None shows it where somebody may watch, once the items have taken two seconds.
    """
    if not (watched() if progress is None else progress):
        return iter(items)
    from tqdm.auto import tqdm

    return iter(tqdm(items, desc=name, leave=False, delay=0.0 if progress else DELAY))
