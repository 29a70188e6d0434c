"""Steering: the vectors move their target most, the hook adds them, and the effect is that of running the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FEW, TOKENS, Case, built_here

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError

PROMPTS = {"one": TOKENS, "two": torch.tensor([3, 17, 28, 9, 40])}


def logits_of(model: Any, tokens: torch.Tensor, hooks: Any = ()) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens[None], return_type="logits", fwd_hooks=list(hooks))[0].double()


@pytest.mark.parametrize("case", FEW[:2], ids=str)
def test_a_steering_vector_moves_the_target_by_its_singular_value(case: Case):
    """A small step along v moves the mean of the target along u by s, in the model itself."""
    model = case.model()
    trace = tlc.trace(model, TOKENS)
    vectors = tlc.steering_vector(trace, 0, ("resid_post", -1), k=2)
    step = 1e-3 * trace.resid[1].norm(dim=-1).median()
    ends = []
    for sign in (1.0, -1.0):
        steer = tlc.add_direction(vectors.v[:, 0], 0, scale=float(sign * step))
        ends.append(tlc.trace(model, TOKENS, fwd_hooks=[steer]).resid[-1].mean(0))
    moved = (ends[0] - ends[1]) / (2 * step)
    # curvature over a step of a thousandth, and float32 inside some modules over that step
    torch.testing.assert_close(moved, vectors.s[0] * vectors.u[:, 0], rtol=1e-3, atol=1e-3 * float(vectors.s[0]))


def test_the_hook_adds_at_the_chosen_positions():
    model, vector = FEW[0].model(), torch.randn(32, dtype=torch.float64)
    name, _ = hook = tlc.add_direction(vector, 1, "attn_out", positions=[0, -1], scale=2.0)
    assert name == "blocks.1.hook_attn_out"
    plain, steered = tlc.trace(model, TOKENS), tlc.trace(model, TOKENS, fwd_hooks=[hook])
    added = steered.attn_out[1] - plain.attn_out[1]
    torch.testing.assert_close(added[[0, -1]], 2 * vector.expand(2, -1))
    assert (added[1:-1] == 0).all()


def test_the_effect_is_that_of_running_the_model(tmp_path: Path):
    model = FEW[0].model()
    vector = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    effect = tlc.steering_effect(model, PROMPTS, vector, 1, [0.5, -2.0], tokens=[4, 5], draws=3, positions=[-1])
    for row, tokens in enumerate(PROMPTS.values()):
        plain = logits_of(model, tokens)
        for column, scale in enumerate(effect.scales):
            steered = logits_of(model, tokens, [tlc.add_direction(vector, 1, positions=[-1], scale=scale)])
            p, q = (torch.distributions.Categorical(logits=each[-1]) for each in (plain, steered))
            torch.testing.assert_close(effect.kl[row, column], torch.distributions.kl_divergence(p, q))
            change = steered[-1] - plain[-1]
            torch.testing.assert_close(effect.logits[row, column], change[[4, 5]] - change.mean())
            losses = [torch.nn.functional.cross_entropy(each[:-1], tokens[1:]) for each in (steered, plain)]
            torch.testing.assert_close(effect.loss[row, column], losses[0] - losses[1])
    assert effect.control_kl.shape == (2, 2, 2, 3) and (effect.control_kl > 0).all()
    again = tlc.load(effect.save(tmp_path / "effect"))
    assert torch.equal(again.kl, effect.kl) and "2 prompts" in repr(again)
    assert set(again.to_dataframe()["control"].dropna()) == {"length", "share"}
    with pytest.warns(UserWarning, match="6 or more"):
        assert effect.excess()["estimate"].shape == (2, 2)


def test_the_linear_prediction_is_better_for_smaller_steps():
    """Order 1: a tenth of the scale, a tenth of the gap; ``reach`` is the last scale within what is allowed."""
    vector = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    effect = tlc.steering_effect(FEW[0].model(), PROMPTS, vector, 0, [1e-4, 1e-3, 1e3], draws=1)
    ratio = effect.linear_gap[:, 1] / effect.linear_gap[:, 0]
    assert ((ratio - 10).abs() < 0.5).all()
    assert effect.reach(0.1).tolist() == [1e-3, 1e-3]
    assert effect.reach(0.0).isnan().all()


def test_generated_texts_are_those_of_the_steered_model(tmp_path: Path):
    """Greedily, token by token, with the hook that a user would add; a text without steering is the model's own."""
    model = FEW[0].model()
    vector = 3 * torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    effect = tlc.steering_effect(model, PROMPTS, vector, 1, [1e-6, -4.0], draws=1, new_tokens=3)
    table = effect.generated()
    assert len(table) == 2 * 2 * 3 and set(table["direction"]) == {"the direction", "random"}
    for name, tokens in PROMPTS.items():
        rows = table[(table["prompt"] == name) & (table["direction"] == "the direction")]
        for scale, text in zip(rows["scale"], rows["text"], strict=True):
            longer = tokens
            for _ in range(3):
                steered = logits_of(model, longer, [tlc.add_direction(vector, 1, scale=scale)])
                longer = torch.cat([longer, steered[-1:].argmax(-1)])
            assert text == model.tokenizer.decode(longer[len(tokens) :].tolist())
    within = table.groupby("scale")["within_reach"]
    assert within.all().to_dict() == within.any().to_dict() == {-4.0: False, 0.0: True, 1e-6: True}
    assert tlc.load(effect.save(tmp_path / "effect")).texts == effect.texts
    with pytest.raises(ArgumentError, match="new_tokens=0 "):
        tlc.steering_effect(model, PROMPTS, vector, 1, [1.0], draws=1).generated()


def test_controls_have_the_vectors_length_and_share():
    """A vector along the mean stream has a share of 1: its only control with that share is itself."""
    model = FEW[0].model()
    trace = tlc.trace(model, TOKENS)
    along = trace.resid[2].mean(0)
    effect = tlc.steering_effect(model, {"one": TOKENS}, -along, 1, [0.1], draws=2)
    shared = effect.control_kl[0, 0, 1]
    torch.testing.assert_close(shared, effect.kl[0, 0].expand(2), rtol=1e-6, atol=0)
    assert (effect.control_kl[0, 0, 0] - effect.kl[0, 0]).abs().min() > 1e-3 * effect.kl[0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": torch.zeros(32)}, "vector=.*of length 0"),
        ({"vector": torch.ones(5)}, "vector=.*d_model = 32"),
        ({"scales": []}, "scales="),
        ({"scales": [0.0]}, "scales=.*not 0"),
        ({"layer": 3}, "layer=3 "),
        ({"tokens": [99]}, "tokens=99 "),
        ({"draws": 0}, "draws=0 "),
        ({"new_tokens": -1}, "new_tokens=-1 "),
        ({"positions": [9]}, "positions=9 "),
        ({"prompts": [torch.tensor([3])]}, "at least two tokens"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str):
    arguments = {"prompts": PROMPTS, "vector": torch.ones(32), "layer": 1, "scales": [1.0], **change}
    with pytest.raises(ArgumentError, match=message):
        tlc.steering_effect(built_here({}), **arguments)


def test_bad_directions(unchecked: None):
    with pytest.raises(ArgumentError, match="site='resid_mid'"):
        tlc.add_direction(torch.ones(32), 0, "resid_mid")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="layer=-1 "):
        tlc.add_direction(torch.ones(32), -1)
    with pytest.raises(ArgumentError, match="finite"):
        tlc.add_direction(torch.full((32,), torch.nan), 0)
    _, act = tlc.add_direction(torch.ones(5), 0)
    with pytest.raises(ArgumentError, match="of width 32"):
        act(torch.zeros(1, 3, 32), hook=None)
