"""Checkpoints of training series: which steps exist, and which are chosen."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from small_sweeps import GOOD, read

from tlcoupling.errors import ArgumentError
from tlcoupling.sweeps.checkpoints import pick_steps, published_steps


def test_the_published_steps_of_pythia_and_stanford():
    steps, pattern = published_steps("EleutherAI/pythia-1.4b-deduped")
    assert steps == [0, *(2**i for i in range(10)), *range(1000, 143001, 1000)]
    assert pattern.format(steps[-1]) == "step143000"
    assert published_steps("pythia-70m")[0] == steps
    assert 1 not in published_steps("EleutherAI/pythia-70m-v0")[0]
    steps, pattern = published_steps("stanford-crfm/alias-gpt2-small-x21")
    assert (steps[0], steps[-1], pattern.format(10)) == (0, 400000, "checkpoint-10")
    assert published_steps("gpt2") is None and published_steps("someone/pythia-70m") is None


@pytest.mark.parametrize("count", [2, 3, 7, 12, 40, 154])
def test_log_spaced_steps(count: int):
    steps = published_steps("pythia-70m")[0]
    picked = pick_steps(f"log:{count}", steps)
    assert len(picked) == count and picked == sorted(set(picked)) and set(picked) <= set(steps)
    assert picked[0] == 0 and picked[-1] == 143000
    if 3 < count < 20:
        ratios = [math.log(b / a) for a, b in pairwise(picked[1:])]
        # Pythia's steps double at the start, which is the coarsest that its series has: half of that is the error
        assert max(ratios) - min(ratios) <= 2 * math.log(2)
    assert pick_steps("all", steps) == steps and pick_steps([1000, 0], steps) == [0, 1000]


@pytest.mark.parametrize("wrong", ["log:1", "log:155", "log:x", "some", [], [0.5], 3])
def test_checkpoints_that_are_none(wrong):
    with pytest.raises(ArgumentError, match="^checkpoints="):
        pick_steps(wrong, published_steps("pythia-70m")[0])


def test_a_series_gives_its_revisions(tmp_path: Path):
    plan = read(tmp_path, GOOD.replace('"gpt2"', '{ name = "EleutherAI/pythia-70m", checkpoints = "log:3" }'))
    assert [(one.revision, one.step) for one in plan.cells[::2]] == [("step0", 0), ("step1", 1), ("step143000", 143000)]
    assert plan.groups[1].source.arguments in ({"revision": "step1"}, {"checkpoint_value": 1})
