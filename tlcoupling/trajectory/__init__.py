"""Token trajectories: how straight they are (``linearity``) and how their norms grow (``growth``)."""

from tlcoupling.trajectory.growth import Growth, growth
from tlcoupling.trajectory.linearity import Linearity, line_shape_score, linearity

__all__ = ["Growth", "Linearity", "growth", "line_shape_score", "linearity"]
