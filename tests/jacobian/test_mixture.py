"""Mixtures of experts: the router's derivative, and the choice of experts, which no derivative sees."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, TOKENS, Case, part, relative_error

import tlcoupling as tlc
from tlcoupling.forward.block import Uncovered
from tlcoupling.jacobian.mixture import Mixture

MIXTURES = ("mixtral", "deepseek-v2", "deepseek-v3", "gpt-oss", "qwen3-next", "afmoe")
EXPERTS = [case for case in CASES if case.name.removeprefix("bridge-") in MIXTURES]
pytestmark = pytest.mark.skipif(not EXPERTS, reason="no mixture on this TransformerLens")


@pytest.fixture
def mixtral() -> Iterator[tuple[Case, torch.nn.Module]]:
    """A mixture whose weights a test may change, and the module in layer 1; they are put back."""
    case = EXPERTS[0]
    module = part(case.model(), 1, "mlp")
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    yield case, module
    module.load_state_dict(kept)


@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_a_mixture_is_an_mlp_of_the_chosen_experts_with_a_router(case: Case):
    """The closed form against autograd at each position, where each chooses its own experts."""
    trace = tlc.trace(case.model(), TOKENS)
    for pos in range(len(TOKENS)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            closed = tlc.residual_jacobian(trace, 1, "mlp", pos, pos, engine="analytic").dense()
        truth = tlc.residual_jacobian(trace, 1, "mlp", pos, pos, engine="autograd").dense()
        assert relative_error(closed, truth) < case.tolerance


def test_the_router_is_differentiated(mixtral: tuple[Case, torch.nn.Module]):
    """With a router of equal rows, all weights are equal and constant; the router's term is what is left then."""
    case, module = mixtral
    trace = tlc.trace(case.model(), TOKENS)
    inputs = trace.resid_mid[1] / trace.resid_mid[1].square().mean(-1, keepdim=True).sqrt()
    moving = Mixture.read(module, inputs)
    assert moving.gradients.norm() > 1e-2
    module.gate.weight.data[:] = module.gate.weight.data[:1].clone()
    assert Mixture.read(module, inputs).gradients.norm() < 1e-6  # rounding of a float32 softmax


def test_a_choice_that_is_about_to_change_is_a_warning(mixtral: tuple[Case, torch.nn.Module]):
    case, module = mixtral
    model, pos = case.model(), 6
    trace = tlc.trace(model, TOKENS)
    read: list[torch.Tensor] = []
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_in", lambda tensor, hook: read.append(tensor[0, pos]))]):
        model(TOKENS[None])
    x, weight = read[0].detach(), module.gate.weight.data
    order = (weight @ x).argsort(descending=True)
    last, first_other = order[1], order[2]
    gap = (weight[last] - weight[first_other]) @ x
    weight[first_other] += (1 - 1e-6) * gap * x / x.square().sum()
    trace = tlc.trace(model, TOKENS)
    with pytest.warns(UserWarning, match=r"choice of experts of layer 1 at position 6 may change where .* moves by"):
        closed = tlc.residual_jacobian(trace, 1, "mlp", pos, pos, engine="analytic")
    truth = tlc.residual_jacobian(trace, 1, "mlp", pos, pos, engine="autograd")
    assert relative_error(closed.dense(), truth.dense()) < case.tolerance


def test_a_module_that_does_more_than_mix_its_experts_is_not_covered(mixtral: tuple[Case, torch.nn.Module]):
    _, module = mixtral
    handle = module.register_forward_hook(lambda module, args, out: out + 0.1 * args[0].sin())
    try:
        with pytest.raises(Uncovered, match="is not a sum of MLPs, weighted by a router"):
            Mixture.read(module, torch.randn(5, module.gate.weight.shape[1], dtype=torch.float64))
    finally:
        handle.remove()
