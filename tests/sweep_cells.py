"""What the tests of a store share: cells of a tiny model, and their measurement."""

from __future__ import annotations

import torch
from cases import CASES, TOKENS

import tlcoupling as tlc
from tlcoupling.sweeps.cells import Cell, ModelFacts, Settings

SETTINGS = Settings(k=(2, 0.25), tokens=(0, -1))  # of an even number of tokens, a median is the mean of the middle two


def cell_of(prompt: tuple[int, ...] = tuple(TOKENS.tolist()), **more) -> Cell:
    return Cell(model="tiny", prompt=prompt, settings=SETTINGS, **more)


def measured(cell: Cell) -> tuple[tlc.Analysis, ModelFacts]:
    model = CASES[0].model(torch.float32)
    return tlc.analyze(model, list(cell.prompt), attention=False, **SETTINGS.arguments()), ModelFacts.of(model)
