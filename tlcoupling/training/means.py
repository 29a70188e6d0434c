"""One step's measurements as means over prompts: their names, the loggers they go to, and the line that is printed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tlcoupling.errors import ArgumentError
from tlcoupling.sweeps.store import describe


def check_loggers(loggers: Sequence[Any]) -> None:
    """Refuse what ``log_to`` cannot hand numbers to.

    Raises:
        ArgumentError: one has neither method.
    """
    for logger in loggers:
        if not (hasattr(logger, "add_scalar") or hasattr(logger, "log")):
            raise ArgumentError("loggers", logger, "objects with log(dict, step=) or add_scalar(name, value, step)")


def means_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over prompts by name, from rows of a sweep's table; of prompts where a number is undefined, NaN."""
    values: dict[str, list[float]] = {}
    for row in rows:
        names = {f"{name}/{row['sublayer']}/k{row['k_asked']}": name for name in ("coupling", "null", "excess")}
        names |= {f"lss/{row['sublayer']}": "lss", "ed": "ed", "rate": "rate"}
        for name, column in names.items():
            values.setdefault(name, []).append(row[column])
    return {name: sum(found) / len(found) for name, found in values.items()}


def log_to(loggers: Sequence[Any], step: int, means: Mapping[str, float]) -> None:
    """Hand numbers to the loggers; a training run does not end for the failure of one."""
    shown = {f"tlcoupling/{name}": value for name, value in means.items()}
    for logger in loggers:
        try:
            if hasattr(logger, "add_scalar"):
                for name, value in shown.items():
                    logger.add_scalar(name, value, step)
            else:
                logger.log(shown, step=step)
        except Exception as error:  # of whatever kind a logger has
            warnings.warn(f"step {step} is not in {type(logger).__name__}: {describe(error)}", stacklevel=4)


def line_of(step: int, means: Mapping[str, float], share: float, failed: int, prompts: int) -> str:
    """One line for a person: coupling with its null and excess, linearity, growth, failures, and the cost.

    Args:
        step: of the training.
        means: as ``means_of`` has them, and ``seconds``.
        share: of the run's time so far that measuring took.
        failed: prompts that could not be measured.
        prompts: how many there are.
    """
    shown = [
        f"{what} {value:.4f} (null {means[f'null/{what}']:.4f}, excess {means[f'excess/{what}']:+.4f})"
        for name, value in means.items()
        for quantity, _, what in [name.partition("/")]
        if quantity == "coupling"
    ]
    shown += [f"{label} {means[name]:.3g}" for label, name in (("LSS", "lss/block"), ("ED", "ed")) if name in means]
    if failed:
        shown.append(f"{failed} of {prompts} prompts failed")
    return f"step {step}: {', '.join(shown)}; {means['seconds']:.2f} s, {share:.1%} of the run so far"
