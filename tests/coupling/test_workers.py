"""Work on several items at once: its order, its threads, and what is left of them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tlcoupling.coupling.workers import Workers


def item_and_thread(item: int) -> tuple[int, int]:
    return item, threading.get_ident()


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order_and_from_the_calling_thread_unless_at_once(count: int):
    here = threading.get_ident()
    with Workers(count) as workers:
        alone, together = (workers.map(item_and_thread, range(6), at_once) for at_once in (False, True))
    assert alone == [(item, here) for item in range(6)]
    assert [item for item, _ in together] == list(range(6))
    assert all((thread == here) == (count == 1) for _, thread in together)


def test_workers_share_the_threads_of_pytorch_and_give_them_back():
    """PyTorch gives a new thread the number that was set last, in whichever thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with Workers(2) as workers:
            assert workers.map(lambda _: torch.get_num_threads(), range(2), at_once=True) == [2, 2]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
