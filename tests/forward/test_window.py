"""Windows: blocks that run on some positions alone give there what they give among all, or are not used."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, TOKENS, Case

import tlcoupling as tlc
from tlcoupling.jacobian.autograd import AutogradJacobian

BRIDGES = [case for case in CASES if case.name.startswith("bridge-")]
# GPT-J tells positions by the length of what it gets; a cache of a sliding window drops what it no longer needs
ELSEWHERE = ("bridge-gptj", "bridge-mistral", "bridge-gemma2", "bridge-gemma3")


@pytest.mark.parametrize(
    "case", [case for case in BRIDGES if case.name.startswith(("bridge-gpt2", "bridge-llama"))], ids=str
)
def test_a_block_gives_at_a_window_what_it_gives_among_all(case: Case):
    """The values and, for sources within, the Jacobians: positions before the window do not depend on these."""
    trace = tlc.trace(case.model(), TOKENS)
    window = trace.window(3, 5)
    assert window is not None
    assert (window.n_tokens, window.str_tokens) == (3, trace.str_tokens[3:6])
    for layer in range(trace.n_layers):
        window.check_current("block", layer, window.run_block(layer, window.block_input(layer), {})[0])
        for sublayer in trace.sublayers:
            found = AutogradJacobian(window, layer, sublayer, 0, 2, None).dense()
            torch.testing.assert_close(
                found, AutogradJacobian(trace, layer, sublayer, 3, 5, None).dense(), atol=1e-6, rtol=1e-6
            )


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("hooked-layernorm", "bridge-mistral")], ids=str
)
def test_without_all_keys_and_values_there_is_no_window(case: Case):
    """A ``HookedTransformer`` caches none unless asked to, a sliding window only its last ones."""
    trace = tlc.trace(case.model(), TOKENS)
    assert trace.window(3, 5) is None
