"""The dynamical view, the readout and many prompts on a real language model."""

from __future__ import annotations

import pytest
import torch

import tlcoupling as tlc
from tlcoupling.directions.readout import readout_jacobian

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trace(smollm2: torch.nn.Module, prompts: dict[str, str]) -> tlc.Trace:
    return tlc.trace(smollm2, prompts["induction"])


@pytest.mark.parametrize("tokens", ["same", "all"])
def test_small_perturbations_are_carried_linearly(trace: tlc.Trace, tokens: str):
    """From the middle of the model to its end: order 1 between two sizes above float32's rounding."""
    found = tlc.linearization_gap(trace, layer=15, sizes=(4e-3, 2e-3, 1.0), tokens=tokens)
    ratio = found.gap[0, 1:] / found.gap[1, 1:]
    assert (found.gap[:2, -1] < 0.1).all()
    assert ((ratio > 1.6) & (ratio < 2.4)).all()
    assert found.gap[2, -1] > 10 * found.gap[1, -1]


def test_the_readout_is_the_models_own(trace: tlc.Trace):
    """Against a finite difference of the logits, through RMSNorm and the tied unembedding."""
    found = tlc.read_directions(trace, 25, k=2, top=5)
    assert found.provenance.engine == {"block": "analytic"}
    along = readout_jacobian(trace, trace.n_tokens - 1).mv(found.left[:, 0])
    name, step = f"blocks.{trace.n_layers - 1}.hook_resid_post", 1e-2 * float(trace.resid[-1, -1].norm())

    def logits(distance: float) -> torch.Tensor:
        def move(tensor: torch.Tensor, hook: object) -> torch.Tensor:
            moved = tensor.clone()
            moved[0, -1] += distance * found.left[:, 0]
            return moved

        with torch.no_grad():
            return trace.model.run_with_hooks(trace.tokens[None], fwd_hooks=[(name, move)])[0, -1]

    truth = (logits(step) - logits(-step)) / (2 * step)
    assert (along - truth).norm() < 1e-2 * truth.norm()  # second order in the step
    top = along.topk(5)
    torch.testing.assert_close(found.scores[0, 0, 0], top.values)
    assert all(isinstance(text, str) for text in found.texts[0][0][0])


def test_intervals_over_the_shared_prompts(smollm2: torch.nn.Module, prompts: dict[str, str]):
    """The trained model's excess lies above 0 over prompts, the random one's about 0; last tokens."""
    many = tlc.analyze_many(smollm2, prompts, sublayers=("attn", "mlp"), baseline=tlc.random_baseline(smollm2))
    assert many.names == tuple(prompts) and many.errors == (None,) * 6 and many.baseline is not None
    trained, random = many.interval("excess"), many.baseline.interval("excess")
    assert (trained.low > 0.01).all()
    assert (random.estimate.abs() < 1e-3).all() and (random.high < trained.low).all()
    # over prompts within three standard errors of what the closed form's O(1 / d) leaves
    assert (random.estimate.abs() < 3 * random.standard_error + 3e-4).all()
