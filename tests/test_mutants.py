"""The breaks that ``make mutants`` tries are of texts in the sources, and name tests."""

from __future__ import annotations

from pathlib import Path

from breaks import BREAKS


def test_each_break_fits_the_sources_and_the_tests():
    assert [reason for one in BREAKS if (reason := one.stale(Path(__file__).parents[1])) is not None] == []
    assert all(one.old != one.new for one in BREAKS)
