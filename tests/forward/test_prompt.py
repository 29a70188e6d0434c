"""Prompts: what goes in is what was meant, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError

PAD = 5  # of the tokenizer with a pad token of its own


@contextmanager
def _special(**tokens: str) -> Iterator[Any]:
    """The first bridge, whose tokenizer has other special tokens for a while."""
    if not CASES[0].name.startswith("bridge"):
        pytest.skip("the small HookedTransformers have no tokenizer")
    model = CASES[0].model()
    tokenizer, before = model.tokenizer, dict(model.tokenizer.special_tokens_map)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model.cfg, "default_prepend_bos", False)
        patched.setattr(model.cfg, "tokenizer_prepends_bos", False)
        for name, word in tokens.items():
            setattr(tokenizer, name, word)
        yield model
        for name in tokens:
            setattr(tokenizer, name, before.get(name))


@pytest.fixture
def own_pad() -> Iterator[Any]:
    """A model whose token 5 does nothing but pad."""
    with _special(pad_token=f"w{PAD}", bos_token="w0") as model:
        yield model


@pytest.fixture
def shared_pad() -> Iterator[Any]:
    """A model whose token 49 begins, ends and pads, as GPT-2's does."""
    with _special(pad_token="<end>", bos_token="<end>") as model:
        yield model


_words = st.integers(6, 47)


@pytest.mark.filterwarnings("ignore:pads")
@settings(max_examples=25)
@given(
    ids=st.lists(_words, min_size=1, max_size=8), left=st.integers(0, 6), right=st.integers(0, 6), masked=st.booleans()
)
def test_a_padded_row_is_measured_as_its_prompt(ids: list[int], left: int, right: int, masked: bool):
    with _special(pad_token=f"w{PAD}", bos_token="w0") as model:
        row, mask = [PAD] * left + ids + [PAD] * right, [0] * left + [1] * len(ids) + [0] * right
        padded = tlc.trace(model, [row], attention_mask=torch.tensor([mask]) if masked else None)
        plain = tlc.trace(model, ids)
    assert padded.tokens.tolist() == ids
    assert torch.equal(padded.resid, plain.resid)


def test_pads_removed_without_a_mask_are_told(own_pad: Any):
    with pytest.warns(UserWarning, match=r"pads \(token 5 \('w5'\)\) were removed"):
        tlc.trace(own_pad, [7, 23, PAD, PAD])


def test_a_padded_batch_gives_the_numbers_of_its_prompts(shared_pad: Any):
    texts = ["w7 w23 w3 w11", "w41 w2"]
    truth = tlc.analyze_many(shared_pad, texts, k=4)
    batch = shared_pad.tokenizer(texts, return_tensors="pt", padding=True)
    for prompts, mask in ((batch["input_ids"], batch["attention_mask"]), (batch, None)):
        found = tlc.analyze_many(shared_pad, prompts, k=4, attention_mask=mask)
        assert torch.equal(found.coupling, truth.coupling)
        assert torch.equal(found.lss, truth.lss)
        assert found.tokens == truth.tokens
    # the pad may be the end of the text here: without a mask the shorter row is refused, not measured with its pads
    with pytest.warns(UserWarning, match="prompt '1' could not be measured: .*this pad token is the BOS token too"):
        found = tlc.analyze_many(shared_pad, batch["input_ids"], k=4)
    assert found.errors[0] is None and found.errors[1] is not None
    assert torch.equal(found.coupling, truth.coupling[:1])


def _measured(model: Any, prompt: Any, **mask: Any) -> list[torch.Tensor]:
    """By all that take one prompt and a model."""
    return [
        tlc.analyze(model, prompt, k=2, **mask).coupling.values,
        tlc.parity.published(model, prompt, k=2, **mask).misalignment,
        tlc.coupling_loss(model, prompt, 2, **mask).detach(),
        torch.tensor([hash(one) for one in tlc.check(model, prompt, layers=[1], **mask).findings]),
    ]


def _effect(model: Any, prompts: Any, **mask: Any) -> torch.Tensor:
    return tlc.causal_effect(model, prompts, 2, layers=[1], draws=1, **mask).effect


def test_all_that_take_a_prompt_honour_its_mask_or_refuse_pads(shared_pad: Any):
    """Also in what a tokenizer returns. Without a mask these pads may be text."""
    ids, mask = torch.tensor([49, 49, 7, 23, 3, 49]), torch.tensor([0, 0, 1, 1, 1, 0])
    truth, effect = _measured(shared_pad, [7, 23, 3]), _effect(shared_pad, [[7, 23, 3]])
    encoded = {"input_ids": ids, "attention_mask": mask}
    for found in (_measured(shared_pad, ids, attention_mask=mask), _measured(shared_pad, encoded)):
        assert all(torch.equal(one, other) for one, other in zip(found, truth, strict=True))
    assert torch.equal(_effect(shared_pad, [ids], attention_mask=[mask]), effect)
    assert torch.equal(_effect(shared_pad, [encoded]), effect)
    for call in (tlc.trace, tlc.analyze, tlc.parity.published, tlc.coupling_loss, _effect):
        with pytest.raises(ArgumentError, match="ids whose pads cannot be text"):
            call(shared_pad, [ids] if call is _effect else ids)
    (finding,) = tlc.check(shared_pad, ids).findings
    assert finding.outcome == "refused" and "ids whose pads cannot be text" in finding.detail


def test_one_text_of_a_tokenizer_is_one_prompt(shared_pad: Any):
    encoded = shared_pad.tokenizer("w7 w23 w3", return_tensors="pt")
    assert tlc.trace(shared_pad, encoded).tokens.tolist() == [7, 23, 3]
    assert tlc.estimate(shared_pad, encoded, k=4).n_tokens == 3
    with pytest.raises(ArgumentError, match="pixel_values.*text alone"):
        tlc.trace(shared_pad, {**encoded, "pixel_values": torch.zeros(1)})


@pytest.mark.parametrize("ids", [[49, 49, 7], [7, 49], [7, 3, 49, 49], [49, 7, 49]])
def test_pads_that_may_be_text_are_refused(shared_pad: Any, ids: list[int]):
    with pytest.raises(ArgumentError, match="ids whose pads cannot be text.*attention_mask="):
        tlc.trace(shared_pad, ids)
    assert tlc.trace(shared_pad, ids, attention_mask=[1] * len(ids)).tokens.tolist() == ids


def test_one_bos_token_that_pads_too_is_text(shared_pad: Any):
    for ids in ([49, 7, 3], [49], [7, 49, 3]):
        assert tlc.trace(shared_pad, ids).tokens.tolist() == ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [([7, PAD, 3], "between tokens of text"), ([PAD, PAD], "2 times the pad token")],
)
def test_pads_that_are_no_padding_are_refused(own_pad: Any, ids: list[int], message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.trace(own_pad, ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 0, 1], "tokens within a prompt cannot be masked"),
        ([0, 0, 0], "at least one token"),
        ([1, 1], r"shape \(2,\).*\(1, 3\), as the token ids"),
        ([1, 2, 1], "zeros and ones"),
        ("111", "zeros and ones"),
    ],
)
def test_bad_masks(mask: Any, message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.trace(CASES[0].model(), TOKENS[:3], attention_mask=mask)


def test_masks_are_counted_against_prompts_and_not_given_with_text(own_pad: Any):
    with pytest.raises(ArgumentError, match="one mask for each prompt: 0, 1"):
        tlc.analyze_many(own_pad, [[7], [8]], attention_mask=[[1]])
    with pytest.raises(ArgumentError, match="a string has no pads"):
        tlc.trace(own_pad, "w7 w8", attention_mask=[1, 1])
    with pytest.raises(ArgumentError, match="prompt holds one"):
        tlc.trace(own_pad, {"input_ids": [7], "attention_mask": [1]}, attention_mask=[1])


def test_a_long_text_is_refused_with_both_lengths(own_pad: Any):
    with pytest.raises(ArgumentError, match="40 tokens.*at most 32, the model's context length"):
        tlc.trace(own_pad, " ".join(["w7"] * 40))


def test_a_text_that_begins_with_bos_gets_a_second_one_and_a_warning(own_pad: Any):
    with pytest.warns(UserWarning, match="BOS token 'w0' twice.*prepend_bos=False"):
        twice = tlc.trace(own_pad, " w0 w7", prepend_bos=True)
    assert twice.tokens.tolist() == [0, 0, 7]
    assert tlc.trace(own_pad, " w0 w7", prepend_bos=False).tokens.tolist() == [0, 7]


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index", "video_token_id"])
def test_placeholders_of_images_are_refused(own_pad: Any, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(own_pad.original_model.config, name, 41, raising=False)
    with pytest.raises(ArgumentError, match="41, the placeholder of .*no (image|video) is passed"):
        tlc.trace(own_pad, [7, 41])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prompt", [["w7", "w8"], [[7, 3], [8, 2]], [[7], [8, 2]]])
def test_a_batch_names_analyze_many(prompt: Any):
    with pytest.raises(ArgumentError, match="tlc.analyze_many measures several"):
        tlc.trace(CASES[0].model(), prompt)


@pytest.mark.usefixtures("unchecked")
def test_mixed_up_arguments_say_what_is_due():
    model = CASES[0].model()
    trace = tlc.trace(model, TOKENS)
    measurements = [
        tlc.depth_coupling,
        tlc.token_coupling,
        tlc.head_coupling,
        tlc.head_alignment,
        tlc.head_steps,
        lambda value: tlc.context_coupling(value, "src"),
        lambda value: tlc.projected_jacobians(value, [0, 1]),
        lambda value: tlc.residual_jacobian(value, 0),
        lambda value: tlc.read_directions(value, 0),
        lambda value: tlc.linearized(value, torch.zeros(32)),
        tlc.linearity,
        tlc.growth,
        tlc.trajectory_components,
    ]
    for measure in measurements:
        for value in (model, "w7 w8"):
            with pytest.raises(ArgumentError, match=r"a trace, which tlc.trace\(model, prompt\) returns"):
                measure(value)
    calls = [
        lambda value: tlc.trace(value, TOKENS),
        lambda value: tlc.analyze(value, TOKENS),
        lambda value: tlc.estimate(value, TOKENS),
        tlc.random_baseline,
        tlc.TrajectoryRecorder,
        lambda value: tlc.coupling_loss(value, TOKENS),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="tlc.load_model.*loads one by name"):
            call("gpt2")
        with pytest.raises(ArgumentError, match="this is a trace, whose model is trace.model"):
            call(trace)
