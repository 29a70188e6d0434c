"""Windows: blocks that run on some positions alone give there what they give among all, or are not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case, huggingface
from families import CONTEXT, families

import tlcoupling as tlc
from tlcoupling.jacobian.autograd import AutogradJacobian
from tlcoupling.jacobian.engine import JacobianEngine

BRIDGES = [case for case in CASES if case.name.startswith("bridge-")]


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


def _wide(name: str) -> Any:
    """A small model of a family, whose sliding windows, if it has some, are wider than its prompts."""
    hub_name, architecture, config = families()[name]
    if getattr(config, "sliding_window", None):
        config.sliding_window = CONTEXT
    return huggingface(config, hub_name, architecture)(torch.float32)


@pytest.mark.skipif(not BRIDGES, reason="a HookedTransformer caches no keys and values")
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gemma3"])
def test_windows_are_used_for_every_layer(name: str):
    """Of two positions; an exception in one sends all to runs of all positions without a word."""
    trace = tlc.trace(_wide(name), torch.arange(16))
    engine = JacobianEngine(trace, pairs={(15, 15)})
    for layer in range(trace.n_layers):
        for sublayer in trace.sublayers:
            engine.operator(layer, sublayer, 15, 15)
    assert (
        engine._window is not None
        and engine._window.n_tokens == 2
        and not any(not windowed for _, windowed in engine._layers)
    )


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("hooked-layernorm", "bridge-mistral")], ids=str
)
def test_without_all_keys_and_values_there_is_no_window(case: Case):
    """A ``HookedTransformer`` caches none unless asked to, a sliding window only its last ones."""
    trace = tlc.trace(case.model(), TOKENS)
    assert trace.window(3, 5) is None
