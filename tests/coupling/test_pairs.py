"""What a measurement runs, counted instead of timed: blocks, backward passes, floating-point operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from broken import LLAMA, adapter, forward, needs_llama
from cases import VOCABULARY, part
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import tlcoupling as tlc
import tlcoupling.jacobian.analytic
from tlcoupling.analysis.analyze import couplings_of_tokens
from tlcoupling.forward.hooked import BlockCall
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.jacobian.runs import BlockRun


@dataclass
class Count:
    """What was run.

    Attributes:
        blocks: calls of blocks.
        rows: positions that these ran on, those of all streams of a batch together.
        backward: backward passes.
        flops: floating-point operations of products.
    """

    blocks: int = 0
    rows: int = 0
    backward: int = 0
    flops: float = 0.0


class Flops(TorchDispatchMode):
    """Adds up the operations of products. ``FlopCounterMode`` sets hooks on all modules, which count as the user's."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    """Count what is run again meanwhile. Hooks on the blocks would count as the user's."""
    count, run, grad = Count(), BlockCall.run, torch.autograd.grad

    def block(call: BlockCall, module: Any, stream: torch.Tensor) -> torch.Tensor:
        count.blocks += 1
        count.rows += stream.shape[0] * stream.shape[1]
        return run(call, module, stream)

    def pulled(*args: Any, **kwargs: Any) -> Any:
        count.backward += 1
        return grad(*args, **kwargs)

    with monkeypatch.context() as patch, Flops() as flops:
        patch.setattr(BlockCall, "run", block)
        patch.setattr(torch.autograd, "grad", pulled)
        yield count
    count.flops = flops.total


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch have so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@needs_llama
def test_one_destination_is_measured_without_the_rest_of_the_prompt(monkeypatch: pytest.MonkeyPatch):
    """Beyond the traced pass, a layer is run once, on two positions, whatever the length of the prompt."""
    model = LLAMA.model(torch.float32)
    counts = []
    for length in (8, 16, 24):
        tokens = torch.arange(length) % (VOCABULARY - 2)
        trace = tlc.trace(model, tokens)
        engine = JacobianEngine(trace, "analytic", {(length - 1, length - 1)})
        with counted(monkeypatch) as count:
            for layer in range(trace.n_layers):
                engine.operator(layer, "block", length - 1, length - 1)
        counts.append(count)
    for count in counts:
        # two copies with a graph, and two moved ahead and back for the differences
        assert (count.blocks, count.rows) == (3, 3 * 4 * 2)
        # of attention, MLP and activation together
        assert count.backward == 3
    # more keys before the window cost a step's share each, and nothing grows with the square of their number
    short, middle, long = (count.flops for count in counts)
    assert long - middle == middle - short > 0
    weights = sum(parameter.numel() for parameter in model.blocks.parameters())
    # a weight takes part in products with 22 vectors: the 8 rows there and back, and 6 of the closed form's
    assert short <= 44 * weights


@needs_llama
@pytest.mark.parametrize("n_dest", [2, 6])
def test_an_mlp_answers_for_all_destinations_at_once(n_dest: int, monkeypatch: pytest.MonkeyPatch):
    """Of the products by the modules, those of attention are one for each destination, and two of the MLP serve all."""
    trace = tlc.trace(LLAMA.model(torch.float32), torch.arange(8))
    pairs = {(pos, pos) for pos in range(n_dest)}
    pull, products = BlockRun.pull, dict[str, int]()

    def counting(run: BlockRun, name: str, factors: Any) -> torch.Tensor:
        products[name] = products.get(name, 0) + len(factors)
        return pull(run, name, factors)

    monkeypatch.setattr(BlockRun, "pull", counting)
    engine = JacobianEngine(trace, "analytic", pairs)
    with counted(monkeypatch) as count:
        for src, dest in pairs:
            engine.operator(1, "block", src, dest)
    assert products == {"attn": n_dest, "mlp": 2}
    assert count.backward == 3  # all of the attention, of the MLP, and the slopes of its activation


@needs_llama
def test_tokens_and_contexts_of_a_report_share_a_layer(monkeypatch: pytest.MonkeyPatch):
    """Three couplings run a layer, pull through it and form its MLPs as often as the one of tokens does."""
    trace, layers = tlc.trace(LLAMA.model(torch.float32), torch.arange(8)), (0, 2)
    options = {"k": 2, "normalizer": "frobenius", "bases": "uv", "absolute": True, "engine": "analytic"}
    together = {**options, "solver": "auto", "sublayers": trace.sublayers, "basis_layers": layers}
    assert trace.causal  # asked once, by runs of its blocks
    mlp_map, formed = tlcoupling.jacobian.analytic.mlp_map, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        formed.append(1)
        return mlp_map(*args, **kwargs)

    monkeypatch.setattr(tlcoupling.jacobian.analytic, "mlp_map", counting)
    with counted(monkeypatch) as of_tokens:
        tlc.token_coupling(trace, layers=layers, solver="auto", **options)
    assert len(formed) == len(layers) * trace.n_tokens
    formed.clear()
    with counted(monkeypatch) as of_all:
        found = couplings_of_tokens(trace, layers, together)
    assert len(formed) == len(layers) * trace.n_tokens
    assert (of_all.blocks, of_all.rows, of_all.backward) == (of_tokens.blocks, of_tokens.rows, of_tokens.backward)
    # without memory for matrices, groups are compared one after another: the layer is held, and nothing is run again
    monkeypatch.setattr("tlcoupling.coupling.schedule.KEPT_SHARE", 0.0)
    with counted(monkeypatch) as of_each:
        again = couplings_of_tokens(trace, layers, together)
    assert (of_each.blocks, of_each.rows, of_each.backward) == (of_all.blocks, of_all.rows, of_all.backward)
    for name, one in found.items():  # products in place of matrices round otherwise
        torch.testing.assert_close(again[name].values, one.values, rtol=1e-4, atol=1e-4)


@needs_llama
@pytest.mark.parametrize("heavy", [False, True])
def test_layers_are_made_together_where_their_checks_are_small(heavy: bool, monkeypatch: pytest.MonkeyPatch):
    """Two threads then form their matrices side by side; nothing is run more often, and no number differs."""
    trace = tlc.trace(LLAMA.model(torch.float32), torch.arange(8))
    together, calls = JacobianEngine.formed_together, list[list[int]]()

    def noting(engine: JacobianEngine, wanted: Any, run: Any) -> Any:
        calls.append([layer for layer, *_ in wanted])
        return together(engine, wanted, run)

    with threads(1), counted(monkeypatch) as alone:
        expected = tlc.depth_coupling(trace, 2, sublayers="block", engine="analytic")
    monkeypatch.setattr(JacobianEngine, "formed_together", noting)
    if heavy:
        monkeypatch.setattr("tlcoupling.coupling.schedule.HEAP", 0)
    with threads(2), counted(monkeypatch) as both:
        found = tlc.depth_coupling(trace, 2, sublayers="block", engine="analytic")
    layers = [*range(trace.n_layers)]
    assert calls == ([[layer] for layer in layers] if heavy else [layers])
    assert (both.blocks, both.rows, both.backward) == (alone.blocks, alone.rows, alone.backward)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)  # rounding of other products


@needs_llama
@pytest.mark.filterwarnings("ignore:tlcoupling computes by autograd")
@pytest.mark.parametrize("path", ["attn.q", "attn.v", "mlp.out"])
def test_an_adapter_in_one_of_the_layers_that_are_made_together_is_seen(path: str):
    """A matrix that is formed ahead of its test is no more trusted than another."""
    model = LLAMA.build(torch.float64).eval()
    with forward(part(model, 1, path), adapter), threads(2):
        trace = tlc.trace(model, torch.arange(8))
        found = tlc.depth_coupling(trace, 3)
        truth = tlc.depth_coupling(trace, 3, engine="autograd")
    torch.testing.assert_close(found.values, truth.values, rtol=0, atol=1e-5)
    assert "autograd" in found.provenance.engine["block"]


@needs_llama
@pytest.mark.parametrize("count", [1, 2])
def test_heads_of_a_layer_share_its_run(count: int, monkeypatch: pytest.MonkeyPatch):
    trace = tlc.trace(LLAMA.model(torch.float32), torch.arange(8))
    assert trace.causal  # asked once, by runs of its blocks
    with threads(count), counted(monkeypatch) as run:
        tlc.head_coupling(trace, 2, engine="analytic")
    assert (run.blocks, run.backward) == (trace.n_layers, trace.n_layers)
