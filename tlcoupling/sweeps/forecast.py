"""Forecasts of what a plan would measure and cost, without loading a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from tlcoupling.errors import ArgumentError, PlanError, StoreError
from tlcoupling.linalg.work import Rates, measured_rates
from tlcoupling.sweeps.cells import Cell
from tlcoupling.sweeps.plan import Plan
from tlcoupling.sweeps.shapes import CellCost, Shape, cell_costs
from tlcoupling.sweeps.source import CellGroup
from tlcoupling.sweeps.store import SweepStore


@dataclass(frozen=True)
class ModelForecast:
    """What is to be measured of one model.

    Attributes:
        model: the model.
        n_revisions: how many of its revisions.
        n_cells: cells of the plan.
        n_kept: of these, measured already.
        flops: floating-point operations of what is left; None where the model's shape is not known here.
        seconds: estimated time of what is left, without loading the model; None likewise.
        file_bytes: size of the files of what is left; None likewise.
        memory_bytes: memory of one cell beyond the model, at most; None likewise.
    """

    model: str
    n_revisions: int
    n_cells: int
    n_kept: int
    flops: float | None
    seconds: float | None
    file_bytes: float | None
    memory_bytes: float | None


@dataclass(frozen=True)
class Forecast:
    """What a plan would measure and cost.

    Attributes:
        groups: by model.
        rate: floating-point operations per second of matrix products.
        measured: whether the rate is this machine's, measured; otherwise it was given.
    """

    groups: tuple[ModelForecast, ...]
    rate: float
    measured: bool

    @property
    def known(self) -> list[ModelForecast]:
        """The groups whose cost is known."""
        return [group for group in self.groups if group.flops is not None]

    @property
    def flops(self) -> float:
        """Sum over the groups whose cost is known."""
        return math.fsum(group.flops or 0.0 for group in self.groups)

    @property
    def seconds(self) -> float:
        """Estimated time of all groups whose cost is known."""
        return math.fsum(group.seconds or 0.0 for group in self.groups)

    @property
    def file_bytes(self) -> float:
        """Sum over the groups whose cost is known."""
        return math.fsum(group.file_bytes or 0.0 for group in self.groups)


def forecast(plan: Plan, store: str | Path | None = None, rate: float | None = None) -> Forecast:
    """Forecast what a plan would measure and cost.

    Args:
        plan: the plan.
        store: a store's folder, whose cells are already done; it need not exist.
        rate: floating-point operations per second of matrix products. Other rates are then those of a typical machine.
            By default all rates are measured on this machine's CPU or GPU, in a fraction of a second.

    Raises:
        ArgumentError: a rate that is not above zero.
        PlanError: settings that do not fit the shape of a model.
    """
    if rate is not None and not rate > 0:
        raise ArgumentError("rate", rate, "a number above 0")
    kept: set[str] = set()
    if store is not None:
        try:
            found = SweepStore(store)
            kept = {cell.key for cell in plan.cells if found.has(cell)}
        except StoreError:
            pass  # nothing is measured yet
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    by_model: dict[str, list[CellGroup]] = {}
    for group in plan.groups:
        by_model.setdefault(group.source.model, []).append(group)
    rates = measured_rates(device) if rate is None else Rates.typical(rate)
    groups = tuple(_of_model(model, found, kept, plan.name, rates) for model, found in by_model.items())
    return Forecast(groups, rates.matmul, rate is None)


def _of_model(model: str, groups: list[CellGroup], kept: set[str], plan: str, rates: Rates) -> ModelForecast:
    cells = [cell for group in groups for cell in group.cells]
    counts = {
        "model": model,
        "n_revisions": len({group.source.revision for group in groups}),
        "n_cells": len(cells),
        "n_kept": sum(cell.key in kept for cell in cells),
    }
    costs: list[CellCost] = []
    left: dict[Shape | None, list[Cell]] = {}  # revisions are of one shape: each kind of cell is counted once
    for group in groups:
        left.setdefault(group.shape, []).extend(cell for cell in group.cells if cell.key not in kept)
    for shape, missing in left.items():
        if shape is None:
            return ModelForecast(**counts, flops=None, seconds=None, file_bytes=None, memory_bytes=None)
        try:
            costs += cell_costs(shape, missing, rates)
        except ArgumentError as error:
            raise PlanError(f"{plan}: {model}: {error}") from error
    return ModelForecast(
        **counts,
        flops=math.fsum(cost.flops for cost in costs),
        seconds=math.fsum(cost.seconds for cost in costs),
        file_bytes=math.fsum(cost.file_bytes for cost in costs),
        memory_bytes=max((cost.memory_bytes for cost in costs), default=0.0),
    )
