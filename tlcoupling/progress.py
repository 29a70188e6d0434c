"""The progress bar of long measurements."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


def ticking(items: Collection[ItemT], name: str, progress: bool) -> Iterator[ItemT]:
    """The items one by one, with a bar of that name that moves as they are taken where progress is wanted."""
    if not progress:
        return iter(items)
    from tqdm.auto import tqdm

    return iter(tqdm(items, desc=name, leave=False))
