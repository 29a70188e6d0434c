"""The progress bar of long measurements."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


def ticking(items: Collection[ItemT], name: str, progress: bool) -> Iterator[ItemT]:
    """Iterate over the items, with a progress bar called ``name`` if ``progress`` is True."""
    if not progress:
        return iter(items)
    from tqdm.auto import tqdm

    return iter(tqdm(items, desc=name, leave=False))
