"""Training series: the published or stored checkpoints of a model, and a choice among them.

No hub request is made: TransformerLens lists the published steps of Pythia and of Stanford CRFM's GPT-2, and the folder
of a training run has one subfolder per step.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlcoupling.errors import ArgumentError

_LISTS = ("transformer_lens.tools.model_registry.checkpoints", "transformer_lens.loading_from_pretrained")
_FOLDER = re.compile(r"(?:step|checkpoint)[-_]?(\d+)")
_ALLOWED = "'all', 'log:N' (N of them, evenly spaced in the logarithm), or a list of training steps"


def published_steps(name: str) -> tuple[list[int], str] | None:
    """Return a model's published training steps and the format of its revisions; None if there is no series."""
    short = name.rpartition("/")[2].lower()
    for module in _LISTS:
        try:
            lists: Any = importlib.import_module(module)
            crfm, pythia = lists.STANFORD_CRFM_CHECKPOINTS, lists.PYTHIA_CHECKPOINTS
            early_pythia = lists.PYTHIA_V0_CHECKPOINTS
        except (ImportError, AttributeError):
            continue
        if name.startswith("stanford-crfm/") or short.startswith("stanford-gpt2"):
            return list(crfm), "checkpoint-{}"
        if short.startswith("pythia-") and name in (short, f"EleutherAI/{short}"):
            return list(early_pythia if "-v0" in short else pythia), "step{}"
    return None


def steps_in_folder(folder: Path) -> dict[int, Path]:
    """Return model folders by step, named ``step100``, ``step-100`` or, as by a ``Trainer``, ``checkpoint-100``."""
    folders = {}
    for path in sorted(folder.iterdir()):
        match = _FOLDER.fullmatch(path.name)
        if match and (path / "config.json").is_file():
            folders[int(match[1])] = path
    return dict(sorted(folders.items()))


def pick_steps(wanted: Any, steps: Sequence[int]) -> list[int]:
    """Choose steps of a series, in ascending order.

    Args:
        wanted: ``"all"``; a list of steps; or ``"log:N"``: N steps including first and last, the others nearest to
            even spacing in the logarithm (a step 0 comes before these).
        steps: the available steps.

    Raises:
        ArgumentError: another value, or unavailable steps.
    """
    if wanted == "all":
        return list(steps)
    if isinstance(wanted, str) and re.fullmatch(r"log:\d+", wanted):
        return _log_spaced(int(wanted[4:]), steps)
    if isinstance(wanted, list) and wanted and all(type(step) is int for step in wanted):
        missing = sorted(set(wanted) - set(steps))
        if missing:
            raise ArgumentError("checkpoints", missing, f"steps of the series: {_shown(steps)}")
        return sorted(set(wanted))
    raise ArgumentError("checkpoints", wanted, _ALLOWED)


def _log_spaced(count: int, steps: Sequence[int]) -> list[int]:
    if not 2 <= count <= len(steps):
        raise ArgumentError("checkpoints", f"log:{count}", f"log:2 to log:{len(steps)}, the number of available steps")
    zero, later = [step for step in steps if step == 0], [step for step in steps if step > 0]
    inner = count - len(zero)
    if inner == 1:
        return [*zero, later[-1]]
    low, high = math.log(later[0]), math.log(later[-1])
    left, chosen = set(later), []
    # both ends first, so that no inner target takes them
    for index in (0, inner - 1, *range(1, inner - 1)):
        target = low + (high - low) * index / (inner - 1)
        nearest = min(left, key=lambda step: (abs(math.log(step) - target), step))
        left.remove(nearest)
        chosen.append(nearest)
    return zero + sorted(chosen)


def _shown(steps: Sequence[int]) -> str:
    if len(steps) <= 12:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:8]))}, ... {steps[-1]} ({len(steps)} of them)"
