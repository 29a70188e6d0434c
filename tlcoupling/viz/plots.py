"""``plot()`` and the notebook's view of results: what ``results.display`` asks for."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.analysis.many import ManyAnalyses
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.projected import ProjectedJacobians
from tlcoupling.dynamics.components import TrajectoryComponents
from tlcoupling.dynamics.spectrum import SingularValueProfile
from tlcoupling.errors import ArgumentError
from tlcoupling.results.base import Result
from tlcoupling.results.display import draw, markup
from tlcoupling.scores.correlate import Correlations
from tlcoupling.slices.atlas import SensitivityAtlas
from tlcoupling.viz.thumbnail import html_of

# The figures of results that have one of their own; the others are drawn as their pictures.
_FIGURES: dict[type[Result], str] = {
    Analysis: "depth_coupling",
    Correlations: "coupling_against_score",
    DepthCoupling: "depth_coupling",
    ManyAnalyses: "distributions",
    ProjectedJacobians: "projected_jacobians",
    SensitivityAtlas: "sensitivity_atlas",
    SingularValueProfile: "singular_values",
    TrajectoryComponents: "trajectories",
}


def figures() -> Any:
    """Import the figures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return with_remedy("figures", "figures need matplotlib: pip install matplotlib", "matplotlib")


def with_remedy(module: str, remedy: str, *packages: str) -> Any:
    """Import a module of ``tlcoupling.viz`` that needs packages which may be missing.

    Raises:
        ImportError: one of the packages is not installed; the message is ``remedy``.
    """
    try:
        return import_module(f"tlcoupling.viz.{module}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in packages:
            raise
        raise ImportError(remedy) from error


def _draw(result: Result, **options: Any) -> Any:
    """Draw a result with the figure of its kind."""
    function = getattr(figures(), _FIGURES.get(type(result), "pictures"))
    allowed = [name for name, one in inspect.signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in allowed:
            raise ArgumentError(name, value, f"an option of this figure: {', '.join(allowed) or 'it has none'}")
    return function(result, **options)


draw.register(Result, _draw)
markup.register(Result, html_of)
