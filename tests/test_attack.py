"""benchmarks/attack.py: a part of its edits, each with the expected verdict; and that a guard switched off shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cases import CASES

pytestmark = pytest.mark.skipif(
    not any(case.name == "native-layernorm" for case in CASES), reason="edits bridges of today"
)


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import attack

    yield attack
    for name in ("attack", "edits"):
        sys.modules.pop(name, None)


def test_each_guard_can_be_switched_off(attack):
    """Each names a part of the library that is still there, and stands in the table with the edits it is there for."""
    for switched_off in attack.GUARDS.values():
        with switched_off():
            pass
    assert attack.GUARDS.keys() == attack.AGAINST.keys()
    kinds = {edit.kind for edit in attack.draw(seed=0, count=attack.COUNT)}
    assert all(kinds.issuperset(each) for each in attack.AGAINST.values())


@pytest.mark.slow
def test_no_edit_gives_a_silently_wrong_number(attack):
    outcomes = attack.run(attack.draw(seed=1, count=40), seed=1)
    missed = [
        (one.edit.kind, one.edit.what, one.verdict, one.wrong, one.errors, one.crash)
        for one in outcomes
        if not one.passed
    ]
    assert not missed
    assert sum(one.edit.expected == "measured" for one in outcomes) >= 0.6 * len(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guard", "kind"),
    [("differences", "cut graph"), ("staleness", "stale"), ("zero MLP", "token shift")],
)
def test_an_edit_that_a_guard_holds_back_shows_without_it(attack, guard: str, kind: str):
    edits = [edit for edit in attack.draw(seed=0, count=attack.COUNT) if edit.kind == kind][:4]
    with attack.GUARDS[guard]():
        assert not all(one.passed for one in attack.run(edits, seed=0))
