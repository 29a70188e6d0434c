"""Weights as modules hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.weights import output_of_heads, weight_of


def test_a_weight_that_a_module_refuses_is_none():
    """DeepSeek's attention answers with NotImplementedError, which getattr with a default lets through."""

    class Compressed(torch.nn.Module):
        def __getattr__(self, name: str) -> Any:
            if name == "W_Q":
                raise NotImplementedError(name)
            return super().__getattr__(name)

    module = Compressed()
    module.W_K = torch.nn.Parameter(torch.ones(2))
    assert weight_of(module, "W_Q") is None
    assert weight_of(module, "W_V") is None
    assert weight_of(module, "W_K") is module.W_K
    assert weight_of(torch.nn.Linear(2, 2), "training") is None  # no tensor
    with pytest.raises(UnsupportedModelError, match=r"layer 3 \(Compressed\) has no W_O to split it"):
        output_of_heads(module, 3, torch.ones(1, 5, 2, 4))
