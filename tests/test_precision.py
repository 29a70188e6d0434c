"""Matrix products of float32: measurements take them in full precision and put the caller's setting back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS

import tlcoupling as tlc
from tlcoupling.errors import TLCouplingError
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.linalg.work import measured_rates
from tlcoupling.precision import full_precision

MODEL = CASES[0]
CALLS: dict[str, Callable[[Any, tlc.Trace], Any]] = {
    "trace": lambda model, trace: tlc.trace(model, TOKENS),
    "residual_jacobian": lambda model, trace: tlc.residual_jacobian(trace, 1),
    "residual_jacobian, autograd": lambda model, trace: tlc.residual_jacobian(trace, 1, engine="autograd"),
    "depth_coupling": lambda model, trace: tlc.depth_coupling(trace, 2),
    "token_coupling": lambda model, trace: tlc.token_coupling(trace, 2, layers=[1]),
    "context_coupling": lambda model, trace: tlc.context_coupling(trace, k=2, layers=[1]),
    "head_coupling": lambda model, trace: tlc.head_coupling(trace, 2, layers=[1]),
    "head_alignment": lambda model, trace: tlc.head_alignment(trace, 2, layers=[1]),
    "head_steps": lambda model, trace: tlc.head_steps(trace),
    "projected_jacobians": lambda model, trace: tlc.projected_jacobians(trace, [0, 1], 2),
    "coupling_loss": lambda model, trace: tlc.coupling_loss(model, TOKENS, 2, layers=[0, 1]),
    "causal_effect": lambda model, trace: tlc.causal_effect(model, [TOKENS], 2, layers=[1], draws=1),
    "read_directions": lambda model, trace: tlc.read_directions(trace, 1, k=1, top=2),
    "linearization_gap": lambda model, trace: tlc.linearization_gap(trace, sizes=[0.1]),
    "linearized": lambda model, trace: tlc.linearized(trace, torch.ones(trace.d_model), tokens="all"),
    "check": lambda model, trace: tlc.check(model, TOKENS),
    "analyze": lambda model, trace: tlc.analyze(model, TOKENS, k=2),
    "published": lambda model, trace: tlc.parity.published(model, TOKENS, k=2, final_norm_in_last_block=True),
}


@pytest.fixture(autouse=True)
def reduced() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


class Spy(torch.overrides.TorchFunctionMode):
    """Notes the setting at every matrix product and decomposition."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in getattr(function, "__name__", "") for name in ("matmul", "linear", "einsum", "svd", "addmm")):
            self.seen.add(torch.get_float32_matmul_precision())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_a_measurement_is_taken_in_full_precision(name: str):
    model = MODEL.model(torch.float32)
    trace = tlc.trace(model, TOKENS)
    with Spy() as spy:
        CALLS[name](model, trace)
    assert spy.seen == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


def test_the_rate_of_an_estimate_is_that_of_full_precision():
    with Spy() as spy:
        measured_rates.__wrapped__(torch.device("cpu"))  # not what was measured before
    assert spy.seen == {"highest"} and torch.get_float32_matmul_precision() == "high"


def test_the_setting_comes_back_after_an_error(monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        assert torch.get_float32_matmul_precision() == "highest"
        raise TLCouplingError

    trace = tlc.trace(MODEL.model(torch.float32), TOKENS)
    monkeypatch.setattr(JacobianEngine, "operator", fail)
    with pytest.raises(TLCouplingError):
        tlc.depth_coupling(trace, 2)
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older torch has one setting")
def test_settings_by_the_newer_names_come_back():
    """The older getter refuses a setting that was made by backend."""
    torch.set_float32_matmul_precision("highest")
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    backends[0].fp32_precision = "tf32"
    try:
        with full_precision():
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert backends[0].fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
