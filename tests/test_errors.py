"""The errors: one base class, and messages that name the argument, the value and what is allowed."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from cases import TOKENS, fresh

import tlcoupling as tlc
from tlcoupling import errors
from tlcoupling.errors import ArgumentError


def test_every_error_is_a_tlcoupling_error():
    own = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(own) > 5
    assert all(issubclass(error, tlc.TLCouplingError) for error in own)


def test_argument_error_names_argument_value_and_what_is_allowed():
    error = ArgumentError("layer", 40, "an int from -30 to 29")
    assert isinstance(error, ValueError)
    assert str(error) == "layer=40 is not allowed; allowed: an int from -30 to 29"
    assert len(str(ArgumentError("tokens", list(range(1000)), "fewer"))) < 300


@functools.cache
def model() -> Any:
    return fresh(0)


@functools.cache
def analysis() -> tlc.Analysis:
    return tlc.analyze(model(), TOKENS, k=2, attention=False)


# What people get wrong first, and what the message tells them to write instead.
MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "a list of prompts": (lambda: tlc.trace(model(), ["one", "two"]), "tlc.analyze_many measures several"),
    "a list of one prompt": (lambda: tlc.analyze(model(), ["one"]), "a string .*tlc.analyze_many measures several"),
    "a batch": (lambda: tlc.trace(model(), TOKENS.expand(2, -1)), "tlc.analyze_many measures several"),
    "a batch of a tokenizer": (lambda: tlc.trace(model(), {"input_ids": TOKENS.expand(2, -1)}), "tlc.analyze_many"),
    "pixels": (lambda: tlc.trace(model(), {"pixel_values": TOKENS}), "input_ids, or text"),
    "a name": (lambda: tlc.analyze("gpt2", "text"), r"tlc.load_model\('gpt2'\) loads one by name"),
    "a name to train": (lambda: tlc.TrainingMonitor("gpt2", ["text"]), r"tlc.load_model\('gpt2'\)"),
    "a trace as a model": (lambda: tlc.analyze(analysis().trace, TOKENS), "whose model is trace.model"),
    "a model as a trace": (lambda: tlc.depth_coupling(model()), r"tlc.trace\(model, prompt\)"),
    "a fraction of the tokens": (
        lambda: tlc.analyze(model(), TOKENS, tokens=1.0),
        "an int from -7 to 6, several .*'all'",
    ),
    "singular values of a trace": (
        lambda: tlc.singular_value_profile(analysis().trace),
        r"tlc.depth_coupling\(trace\)",
    ),
    "singular values of all": (lambda: tlc.singular_value_profile(analysis()), "an analysis's coupling"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("unchecked")
def test_the_commonest_mistakes_name_the_remedy(mistake: str):
    make, remedy = MISTAKES[mistake]
    with pytest.raises(ArgumentError, match=remedy) as raised:
        make()
    assert len(str(raised.value)) < 250, "a message that is read aloud ends"


def test_argument_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(ArgumentError("k", 0, "an int of at least 1")))
    assert (error.name, error.value, error.allowed) == ("k", 0, "an int of at least 1")
