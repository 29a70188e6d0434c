"""Compare two results of one cell, ignoring rounding and machine-dependent fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from tlcoupling.results.base import Result

# Relative to a tensor's root mean square. On SmolLM2 in float32 (the dtype of all measurements), another solver or
# engine changes a tensor by 1e-6 to 1e-5 of it. Weights rounded to bfloat16 change it by 1e-3.
TOLERANCE = 1e-4
_SMALL = 0.01  # scale floor: values near zero are compared absolutely, since rounding can be all of them
# Fields that depend on time, machine and solver convergence
_OF_THE_MACHINE = (
    *("seconds", "versions", "verified", "engine", "commit", "residual"),
    *("gaps", "uncertainty", "subspace_uncertainty", "basis_subspace_uncertainty"),  # files of version 0.1 lack these
)


def differences(first: tuple[Result, Mapping[str, Any]], second: tuple[Result, Mapping[str, Any]]) -> list[str]:
    """Return the fields in which two results with their notes differ, with the size of numeric differences.

    Numbers agree if they differ by rounding alone (``TOLERANCE``). Times, package versions, checksums, the chosen
    engine, the hub's commit, the solver's residual and the uncertainty that follows from it are ignored.
    """
    one, two = (dict(zip(("result", "note"), whole, strict=True)) for whole in (first, second))
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
    """Return the difference's root mean square, relative to the larger tensor's; infinite if only one is finite."""
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
