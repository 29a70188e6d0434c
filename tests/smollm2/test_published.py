"""The main job on a real language model: parity with the published procedure, and the design's reference numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tlcoupling as tlc
from tlcoupling.models.load import _hooked_transformer, _transformer_bridge

pytestmark = pytest.mark.slow

PUBLISHED = load_file(Path(__file__).parents[1] / "data" / "parity_landmarks.safetensors")


@pytest.fixture(scope="module")
def trace(smollm2: torch.nn.Module, prompts: dict[str, str]) -> tlc.Trace:
    return tlc.trace(smollm2, prompts["landmarks"])


@pytest.mark.parametrize("solver", ["auto", "dense"])
def test_parity_with_the_published_procedure(trace: tlc.Trace, solver: Any):
    """Misalignment of blocks 0 .. 28 within 1e-4 (block 29 of the published procedure has the final norm in it)."""
    assert trace.n_tokens == 28
    hows: list[Any] = [("uv", "frobenius"), ("uv", "trace"), ("vu", "frobenius"), ("vu", "trace")]
    for bases, normalizer in hows if solver == "auto" else hows[:1]:  # the solvers do not know of either
        found = tlc.depth_coupling(
            trace, [10, 30, 50], sublayers="block", bases=bases, normalizer=normalizer, solver=solver
        )
        for index, k in enumerate(found.ks):
            misalignment = 1 - found.values[0, 0, index, :29, :29]
            torch.testing.assert_close(misalignment, PUBLISHED[f"K{k}.{bases}.{normalizer}"], rtol=0, atol=1e-4)
        assert found.provenance.engine == {"block": "analytic"}
        torch.testing.assert_close(
            found.singular_values[0, 0, :29], PUBLISHED["singular_values"][:, :50], rtol=1e-4, atol=0
        )


def test_parity_as_a_hooked_transformer(
    request: pytest.FixtureRequest, smollm2: torch.nn.Module, prompts: dict[str, str]
):
    """The other class gives the published procedure's numbers too, where TransformerLens has both."""
    if _hooked_transformer() is None or _transformer_bridge() is None:
        pytest.skip("this transformer-lens has only one of the two classes")
    hooked = request.getfixturevalue("smollm2_hooked")
    found = tlc.depth_coupling(tlc.trace(hooked, prompts["landmarks"]), 10, sublayers="block")
    misalignment = 1 - found.values[0, 0, 0, :29, :29]
    torch.testing.assert_close(misalignment, PUBLISHED["K10.uv.frobenius"], rtol=0, atol=1e-4)
    assert found.provenance.engine == {"block": "analytic"}


def test_the_reference_numbers_of_the_design(trace: tlc.Trace):
    score = tlc.linearity(trace).path("block")
    assert score.mean().item() == pytest.approx(4.379, abs=5e-4)
    assert score.min().item() == pytest.approx(2.624, abs=5e-4)
    assert score.max().item() == pytest.approx(5.265, abs=5e-4)
    growth = tlc.growth(trace)
    # the design's number is the lower of the two in the middle of 28; the median is between them
    low, high = growth.expodistance.sort().values[13:15].tolist()
    assert low == pytest.approx(8.177, abs=5e-4)
    assert f"median ED {(low + high) / 2:.3f}" in repr(growth)
    coupling = tlc.depth_coupling(trace, 10, sublayers="block")
    assert coupling.mean().item() == pytest.approx(0.0391, abs=5e-5)
    assert coupling.mean("null").item() == pytest.approx(0.0085, abs=5e-5)


def test_the_engines_agree_on_the_real_model(trace: tlc.Trace):
    for layer in (0, 15, 29):
        for sublayer in ("block", "attn", "mlp"):
            x = torch.randn(trace.d_model, 4)
            found = tlc.residual_jacobian(trace, layer, sublayer, engine="analytic").mm(x)
            truth = tlc.residual_jacobian(trace, layer, sublayer, engine="autograd").mm(x)
            # float32 rounding
            assert (found - truth).norm() < 1e-4 * truth.norm()


@pytest.fixture(scope="module")
def random_model(smollm2: torch.nn.Module) -> torch.nn.Module:
    """SmolLM2's shape with fresh weights."""
    return tlc.random_baseline(smollm2)


def test_a_random_model_of_the_same_shape_has_no_excess(
    smollm2: torch.nn.Module, random_model: torch.nn.Module, prompts: dict[str, str]
):
    """Weights drawn as the architecture's own library draws them: coupling is chance, for block, attn and mlp."""
    tokens = smollm2.to_tokens(prompts["landmarks"])
    trace = tlc.trace(random_model, tokens)
    for normalizer in ("frobenius", "trace"):
        found = tlc.depth_coupling(trace, 10, normalizer=normalizer)
        assert found.sublayers == ("block", "attn", "mlp")
        assert found.mean("excess").abs().max() < 1e-3
    trained = tlc.depth_coupling(tlc.trace(smollm2, tokens), 10)
    assert (trained.mean("excess") > 0.02).all()
