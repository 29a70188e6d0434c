"""The check of a user's own model: what it finds, and what it finds out about a wrong closed form."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, TOKENS, Case, built_here

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.jacobian.parts import NormMap


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_covered_model_holds(case: Case):
    found = tlc.check(case.model(), TOKENS)
    assert found.passed
    assert [one.outcome for one in found.findings] == ["holds"] * 5
    assert len(found.to_dataframe()) == 5
    assert repr(found).endswith("5 holds, 0 falls back, 0 refused)")


def test_a_wrong_closed_form_falls_back_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(NormMap, "mm", lambda self, x, right=NormMap.mm: 2 * right(self, x))
    found = tlc.check(CASES[0].model(), TOKENS, layers=[1])
    assert [one.outcome for one in found.findings] == ["holds"] * 2 + ["falls back"] * 3
    assert all("misses the module's own derivative" in one.detail for one in found.findings[2:])


def test_a_gap_that_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch):
    """In one of several comparisons: the larger of a number and NaN may be either."""
    gaps = iter([[1e-9, 1e-9], [float("nan"), 1e-9]] + 10 * [[1e-9, 1e-9]])
    monkeypatch.setattr("tlcoupling.analysis.checking._gaps", lambda found, truth: next(gaps))
    found = tlc.check(CASES[0].model(), TOKENS, layers=[1])
    assert [one.outcome for one in found.findings] == ["holds", "holds", "refused", "holds", "holds"]
    assert "nan from autograd" in found.findings[2].detail


def test_layers_are_resolved():
    model = CASES[0].model()
    for layers in ([], [3], [-4], [1, 1]):
        with pytest.raises(ArgumentError, match="layers="):
            tlc.check(model, TOKENS, layers=layers)
    assert tlc.check(model, TOKENS, layers=[-1]).findings[2].what == "block Jacobians of layers 2"


def test_what_cannot_be_measured_is_refused_with_the_reason():
    found = tlc.check(torch.nn.Linear(2, 2))
    assert not found.passed
    assert "not a hooked model" in found.findings[0].detail


@pytest.mark.parametrize("context", [1, 3, 32])
def test_the_default_prompt_fits_the_context(context: int):
    result = tlc.check(built_here({"n_ctx": context}))
    assert result.passed and result.findings[0].what == "residual identity"
