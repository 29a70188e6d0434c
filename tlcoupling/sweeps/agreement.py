"""Whether two results of one cell say the same, but for rounding and for what is the machine's alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcoupling.results.base import read_result

# Of a tensor's root mean square. On SmolLM2 in float32, which all models are measured in, another solver or engine
# moves a tensor by 1e-6 to 1e-5 of it; the weights rounded to bfloat16, by 1e-3.
TOLERANCE = 1e-4
_SMALL = 0.01  # what is smaller is compared as if it were this large: a slope of zero is zero but for rounding
# When and with what it was measured, and how far the solver had to go
_OF_THE_MACHINE = ("seconds", "versions", "engine", "commit", "residual")


def differences(first: Path, second: Path) -> list[str]:
    """What two result files say differently: the names of it, with the size where it is numbers.

    Numbers of two machines agree where they differ by rounding alone (``TOLERANCE``); times, versions of packages, the
    engine that was chosen, the hub's commit and the solver's residual are left out.

    Raises:
        ResultFileError: one of them is damaged.
    """
    one, two = (dict(zip(("result", "note"), read_result(path), strict=True)) for path in (first, second))
    return list(_differences(one, two, ""))


def _differences(first: Any, second: Any, name: str) -> Iterator[str]:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if (gap := _gap(first, second)) > TOLERANCE:
            yield f"{name} (by {gap:.1g} of its size)"
    elif type(first) is not type(second):
        yield name
    elif is_dataclass(first) or isinstance(first, Mapping):
        ours, theirs = _parts(first), _parts(second)
        for part in dict.fromkeys((*ours, *theirs)):
            if part not in _OF_THE_MACHINE:
                yield from _differences(ours.get(part), theirs.get(part), f"{name}.{part}" if name else part)
    elif first != second:
        yield name


def _parts(whole: Any) -> Mapping[str, Any]:
    return {spec.name: getattr(whole, spec.name) for spec in fields(whole)} if is_dataclass(whole) else whole


def _gap(first: Tensor, second: Tensor) -> float:
    """Root mean square of the difference, relative to that of the larger; infinite where one alone has a number."""
    one, two = first.double(), second.double()
    if one.shape != two.shape or not torch.equal(one.isfinite(), two.isfinite()):
        return float("inf")
    one, two = one[one.isfinite()], two[two.isfinite()]
    if not one.numel():
        return 0.0
    size = max(_root_mean_square(one), _root_mean_square(two), _SMALL)
    return _root_mean_square(one - two) / size


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
