"""One step's measurements as means over prompts, for loggers and for a printed line."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tlcoupling.errors import ArgumentError
from tlcoupling.sweeps.store import describe


def check_loggers(loggers: Sequence[Any]) -> None:
    """Check that ``log_to`` can write to the loggers.

    Raises:
        ArgumentError: a logger has neither method.
    """
    for logger in loggers:
        if not (hasattr(logger, "add_scalar") or hasattr(logger, "log")):
            raise ArgumentError("loggers", logger, "objects with log(dict, step=) or add_scalar(name, value, step)")


def means_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means over prompts by name, from rows of a sweep's table; NaN if a prompt's number is undefined."""
    values: dict[str, list[float]] = {}
    for row in rows:
        names = {f"{name}/{row['sublayer']}/k{row['k_asked']}": name for name in ("coupling", "null", "excess")}
        names |= {f"lss/{row['sublayer']}": "lss", "ed": "ed", "rate": "rate"}
        for name, column in names.items():
            values.setdefault(name, []).append(row[column])
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def log_to(loggers: Sequence[Any], step: int, means: Mapping[str, float]) -> None:
    """Write numbers to the loggers. A failing logger gives a warning and does not stop the training.

    A Weights & Biases run drops what comes with an earlier step than its own counter's. A Trainer that logs to the same
    run moves that counter with each of its logs, so the training's step is also a number of its own,
    ``tlcoupling/step``, and a run that is ahead of it gets the numbers at its own step.
    """
    shown = {f"tlcoupling/{name}": value for name, value in means.items()}
    for logger in loggers:
        try:
            if hasattr(logger, "add_scalar"):
                for name, value in shown.items():
                    logger.add_scalar(name, value, step)
            elif getattr(logger, "step", step) > step:
                logger.log({**shown, "tlcoupling/step": step})
            else:
                logger.log({**shown, "tlcoupling/step": step}, step=step)
        except Exception as error:  # of any type that a logger raises
            warnings.warn(f"{type(logger).__name__} did not log step {step}: {describe(error)}", stacklevel=4)


def line_of(step: int, means: Mapping[str, float], share: float, failed: int, prompts: int) -> str:
    """Return one line of text: coupling with null and excess, linearity, growth, failures, and the cost.

    Args:
        step: the training step.
        means: the result of ``means_of``, and ``seconds``.
        share: share of the run's time so far spent on measuring, 0 to 1.
        failed: number of prompts that could not be measured.
        prompts: number of all prompts.
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
