"""What ``analyze`` measures on request beside coupling, linearity and growth: measures of ``dynamics``, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tlcoupling.arguments import as_list
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.dynamics.depth_profile import depth_profile
from tlcoupling.dynamics.geometry import eigen_geometry
from tlcoupling.dynamics.lyapunov import lyapunov_spectrum
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.trace import Trace
from tlcoupling.models.baseline import baseline_model
from tlcoupling.results.base import Result

MEASURES = ("geometry", "lyapunov", "profile")


def resolve_measures(value: str | Sequence[str], hooked: bool = False) -> tuple[str, ...]:
    """Return the names of the measures in their order.

    Args:
        value: ``"all"``, a name or several.
        hooked: whether hooks were passed with the prompt: a profile runs the model itself, without them.

    Raises:
        ArgumentError: an unknown name; ``profile`` with hooks.
    """
    names = MEASURES if value == "all" else tuple(as_list(value))
    if unknown := [name for name in names if name not in MEASURES]:
        raise ArgumentError("measures", unknown[0], f"'all', or some of {', '.join(MEASURES)}")
    if hooked and "profile" in names:
        raise ArgumentError("measures", value, "without 'profile' where fwd_hooks are given: attach them to the model")
    return tuple(name for name in MEASURES if name in names)


def measures_of(
    names: Sequence[str],
    traced: Trace,
    prompt: Any,
    coupling: DepthCoupling,
    *,
    baseline: Any | None = None,
    prepend_bos: bool | None = None,
    attention_mask: Any | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Return the measures by name, of the sublayers whose coupling was measured, at the last of its tokens.

    Args:
        names: of ``MEASURES``.
        traced: the trace.
        prompt: the prompt of the trace.
        coupling: depth-wise coupling of the trace.
        baseline: as in ``analyze``.
        prepend_bos: as in ``trace``.
        attention_mask: as in ``trace``.
        progress: as in ``analyze``.
    """
    other = None if baseline is None or not names else baseline_model(baseline, traced.model)
    engine = coupling.provenance.settings["engine"]
    how: dict[str, Any] = {"baseline": other, "engine": engine}
    parts = {"sublayers": coupling.sublayers, "progress": progress}
    masks = None if attention_mask is None else {"prompt": attention_mask}
    pos = coupling.positions[-1]
    calls: Mapping[str, Callable[[], Result]] = {
        "geometry": lambda: eigen_geometry(traced, tokens=pos, **parts, **how),
        "lyapunov": lambda: lyapunov_spectrum(traced, pos=pos, **how),
        "profile": lambda: depth_profile(
            traced.model,
            {"prompt": prompt},
            coupling.ks[0],
            prepend_bos=prepend_bos,
            attention_mask=masks,
            **parts,
            **how,
        ),
    }
    return {name: calls[name]() for name in names}
