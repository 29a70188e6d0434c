"""An empty store, for the tests of sweeps."""

from __future__ import annotations

from pathlib import Path

import pytest

import tlcoupling as tlc


@pytest.fixture
def store(tmp_path: Path) -> tlc.SweepStore:
    return tlc.SweepStore(tmp_path / "store", create=True)
