"""The errors: one base class, and messages that name the argument, the value and what is allowed."""

from __future__ import annotations

import pickle

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


def test_argument_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(ArgumentError("k", 0, "an int of at least 1")))
    assert (error.name, error.value, error.allowed) == ("k", 0, "an int of at least 1")
