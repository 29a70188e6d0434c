"""The global random state: whatever draws or seeds within, it is afterwards as it was."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tlcoupling.models.generators import generators_kept


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


@pytest.mark.parametrize("within", [draws, seed])
def test_the_generators_go_on_as_if_nothing_had_drawn_from_them(within: Callable[[], object]):
    seed()
    draws()
    expected = draws()
    seed()
    draws()
    with generators_kept():
        within()
    assert draws() == expected
    seed()
    draws()
    with pytest.raises(KeyError), generators_kept():
        within()
        raise KeyError
    assert draws() == expected
