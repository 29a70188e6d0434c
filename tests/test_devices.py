"""A model whose layers lie on several devices: the same numbers, each layer's work on its own device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case
from devices import (
    DEVICES,
    MEASUREMENTS,
    Ledger,
    MixedDevicesError,
    require_same,
    simulated_devices,
    spread,
)

import tlcoupling as tlc
from tlcoupling.coupling.method import methods
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.linalg.operator import JacobianOperator

# rotary, gated, grouped queries; parallel; learned positions and an output embedding tied to the input's
_NAMES = {"bridge-llama", "bridge-pythia", "bridge-gpt2", "hooked-gated", "hooked-parallel", "hooked-layernorm"}
SPREAD = [case for case in CASES if case.name in _NAMES][:3]


@pytest.fixture
def devices() -> Iterator[Ledger]:
    with simulated_devices() as ledger:
        yield ledger


@pytest.fixture(params=SPREAD, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def traces(case: Case, devices: Ledger) -> tuple[tlc.Trace, tlc.Trace]:
    """Of the model on one device, and on two."""
    return tlc.trace(case.model(), TOKENS), tlc.trace(spread(case.build(torch.float64).eval()), TOKENS)


def test_a_simulated_device_refuses_what_a_real_one_refuses(devices: Ledger):
    here, there = (torch.ones(2, 2, device=device, requires_grad=True) for device in DEVICES)
    for other in (there, torch.ones(2, 2)):
        with pytest.raises(MixedDevicesError):
            here @ other
    assert (here * torch.tensor(2.0)).device == DEVICES[0]  # a number of the host may meet any
    devices.products.clear()
    (here.to(DEVICES[1]) @ there).sum().backward()
    assert here.grad is not None and here.grad.device == DEVICES[0]
    torch.testing.assert_close(here.grad.cpu(), torch.full((2, 2), 2.0))
    with pytest.raises(TypeError, match="cpu:1"):
        here.detach().numpy()
    assert set(devices.products) == set(DEVICES[1:])


@pytest.mark.parametrize("case", SPREAD[:1], ids=str)
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_are_those_of_one_device(traces: tuple[tlc.Trace, tlc.Trace], name: str):
    one, two = traces
    measure = MEASUREMENTS[name]
    # Krylov takes the layers of a device in one stack, and products of stacks round as their size has it
    require_same(measure(two), measure(one), 1e-9 if "krylov" in name else 1e-12)


@pytest.mark.parametrize("case", SPREAD[1:], ids=str)
def test_so_they_are_on_other_architectures(traces: tuple[tlc.Trace, tlc.Trace]):
    one, two = traces
    for name in ("depth", "depth, autograd", "tokens, other layers' bases", "growth"):
        require_same(MEASUREMENTS[name](two), MEASUREMENTS[name](one))


@pytest.mark.parametrize("case", SPREAD[:1], ids=str)
@pytest.mark.parametrize("method", ["matrix dropped", "products"])
def test_so_they_are_where_no_matrix_is_kept(
    traces: tuple[tlc.Trace, tlc.Trace], method: str, monkeypatch: pytest.MonkeyPatch
):
    def chosen(work: Any, size: int, k: int, columns: int, solver: Any, *others: Any) -> Any:
        return next(each for each in methods(work, size, k, columns, solver) if each.name == method)

    monkeypatch.setattr("tlcoupling.coupling.schedule.cheapest", chosen)
    one, two = traces
    require_same(tlc.depth_coupling(two, 3, sublayers="block"), tlc.depth_coupling(one, 3, sublayers="block"))


class Watched(JacobianOperator):
    """An operator that writes down where its products came out."""

    def __init__(self, inner: JacobianOperator, layer: int, seen: list[tuple[int, torch.device]]) -> None:
        self.__dict__.update({name: getattr(inner, name) for name in JacobianOperator.__annotations__})
        self._inner, self._layer, self._seen = inner, layer, seen

    def _watched(self, product: torch.Tensor) -> torch.Tensor:
        self._seen.append((self._layer, product.device))
        return product

    def mm(self, x: torch.Tensor) -> torch.Tensor:
        return self._watched(self._inner.mm(x))

    def rmm(self, y: torch.Tensor) -> torch.Tensor:
        return self._watched(self._inner.rmm(y))

    def dense(self) -> torch.Tensor:
        return self._watched(self._inner.dense())


@pytest.mark.parametrize("case", SPREAD[:2], ids=str)
@pytest.mark.parametrize("engine", ["analytic", "autograd"])
def test_each_layers_work_is_done_on_its_own_device(
    traces: tuple[tlc.Trace, tlc.Trace], devices: Ledger, engine: Any, monkeypatch: pytest.MonkeyPatch
):
    """Simulated devices refuse mixed operands, so that a product comes out where its Jacobian's numbers lie."""
    one, two = traces
    lies = [next(block.parameters()).device for block in two.model.blocks]
    assert set(lies) == set(DEVICES)
    for layer, device in enumerate(lies):
        for sublayer in two.sublayers:
            ours, truth = (tlc.residual_jacobian(each, layer, sublayer, 3, 5, engine=engine) for each in (two, one))
            assert ours.device == device
            torch.testing.assert_close(ours.dense().cpu(), truth.dense(), rtol=1e-12, atol=1e-12)
    seen: list[tuple[int, torch.device]] = []
    make = JacobianEngine.operator

    def watched(self: JacobianEngine, layer: int, *args: Any) -> JacobianOperator:
        return Watched(make(self, layer, *args), layer, seen)

    monkeypatch.setattr(JacobianEngine, "operator", watched)
    devices.products.clear()
    tlc.depth_coupling(two, 3, engine=engine)
    assert {layer for layer, _ in seen} == set(range(two.n_layers))
    assert all(device == lies[layer] for layer, device in seen)
    assert set(devices.products) == set(DEVICES)  # none on the host


@pytest.mark.parametrize("case", SPREAD[:1], ids=str)
def test_half_precision_weights_are_lifted_where_they_lie(case: Case, devices: Ledger):
    one = tlc.trace(case.build(torch.bfloat16).eval(), TOKENS)
    two = tlc.trace(spread(case.build(torch.bfloat16).eval()), TOKENS)
    require_same(tlc.depth_coupling(two, 3), tlc.depth_coupling(one, 3))
    for block in two.model.blocks:
        assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("case", SPREAD[:1], ids=str)
def test_the_loss_and_its_gradient_are_those_of_one_device(case: Case, devices: Ledger):
    one, two = case.build(torch.float64).eval(), spread(case.build(torch.float64).eval())
    losses = []
    for model in (one, two):
        loss = tlc.coupling_loss(model, TOKENS, 3, layers=[0, 2], quantity="excess")
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    pairs = list(zip(one.blocks[-1].parameters(), two.blocks[-1].parameters(), strict=True))
    assert any(truth.grad is not None and truth.grad.norm() > 0 for truth, _ in pairs)
    for truth, ours in pairs:
        if truth.grad is not None:
            assert ours.grad.device == DEVICES[1]
            # the order of a sum over the layers' contributions is the graph's
            torch.testing.assert_close(ours.grad.cpu(), truth.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", SPREAD[-1:], ids=str)
def test_a_cache_and_a_recorder_of_several_devices(traces: tuple[tlc.Trace, tlc.Trace]):
    one, two = traces
    tokens = TOKENS[None].to(DEVICES[0])
    recorder = tlc.TrajectoryRecorder(two.model)
    _, cache = two.model.run_with_cache(tokens)
    two.model.run_with_hooks(tokens, fwd_hooks=recorder.fwd_hooks)
    for found in (tlc.growth(cache), tlc.growth(tlc.Trace.from_cache(two.model, cache, TOKENS)), recorder.growth()):
        torch.testing.assert_close(found.norms.squeeze(), tlc.growth(one).norms, rtol=1e-12, atol=0)
