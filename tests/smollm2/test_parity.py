"""Parity with the published procedure on a real language model, the last block's final norm included."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tlcoupling as tlc
from tlcoupling.parity import published

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from published import block_jacobians

pytestmark = pytest.mark.slow

LANDMARKS = load_file(Path(__file__).parents[1] / "data" / "parity_landmarks.safetensors")
LAST = 29


def test_the_landmarks(smollm2: torch.nn.Module, prompts: dict[str, str]):
    """Blocks 0 .. 28 of published tables with each normaliser and order of the bases, to 1e-4 (float32)."""
    for bases, normalizer in (("uv", "frobenius"), ("vu", "trace")):
        found = published(
            smollm2,
            prompts["landmarks"],
            [10, 30, 50],
            bases=bases,
            normalizer=normalizer,
            final_norm_in_last_block=True,
        )
        for index, k in enumerate(found.ks):
            expected = LANDMARKS[f"K{k}.{bases}.{normalizer}"]
            torch.testing.assert_close(found.misalignment[index, :LAST, :LAST], expected, rtol=0, atol=1e-4)
        singular_values = LANDMARKS["singular_values"][:, :50]
        torch.testing.assert_close(found.singular_values[:LAST], singular_values, rtol=1e-4, atol=0)


def test_the_last_block_with_the_final_norm_is_huggingfaces(
    smollm2: torch.nn.Module, smollm2_huggingface: torch.nn.Module, prompts: dict[str, str]
):
    """Block 29 as the published code sees it: from hidden_states[-2] to hidden_states[-1], on the plain model."""
    ids = smollm2.to_tokens(prompts["landmarks"])
    others = (5, 28)
    jacobians = {
        layer: one for layer, one in enumerate(block_jacobians(smollm2_huggingface, ids)) if layer in (*others, LAST)
    }
    decompositions = {layer: torch.linalg.svd(jacobian) for layer, jacobian in jacobians.items()}
    found = published(smollm2, ids, 10, final_norm_in_last_block=True)
    plain = published(smollm2, ids, 10)
    torch.testing.assert_close(found.singular_values[LAST], decompositions[LAST].S[:10], rtol=1e-3, atol=0)
    for row, column in ((LAST, 5), (LAST, 28), (5, LAST), (28, LAST)):
        u2, _, vh2 = decompositions[column]
        s1 = decompositions[row].S[:10]
        aligned = (u2[:, :10].T @ jacobians[row] @ vh2[:10].T).abs()
        expected = (aligned - s1.diag()).norm() / s1.norm()
        assert float(found.misalignment[0, row, column]) == pytest.approx(float(expected), abs=1e-4)
        assert abs(float(plain.misalignment[0, row, column]) - float(expected)) > 1e-4  # the defect moves it
    # the numbers that DEFECTS states
    assert float(plain.singular_values[LAST, 0]) == pytest.approx(5.06, abs=0.005)
    assert float(found.singular_values[LAST, 0]) == pytest.approx(1.22, abs=0.005)
    for result, inside, outside in ((plain, 0.0712, 0.0391), (found, 0.0777, 0.0459)):
        assert float(result.mean_coupling()) == pytest.approx(inside, abs=5e-5)
        assert float(result.mean_coupling(include_diagonal=False)) == pytest.approx(outside, abs=5e-5)


def test_published_means_hide_chance_and_depth(smollm2: torch.nn.Module, prompts: dict[str, str]):
    """The trained model's published mean by trace, 0.69, is what a random model of the shape gives."""
    random = tlc.random_baseline(smollm2)
    trained, chance = (
        float(published(model, prompts["landmarks"], 10, normalizer="trace").mean_coupling()[0])
        for model in (smollm2, random)
    )
    assert abs(trained - chance) < 0.02
    assert trained > 0.65
