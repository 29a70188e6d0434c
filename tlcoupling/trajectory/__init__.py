"""Token trajectories: how straight they are (``linearity``), how their norms grow (``growth``), by head (``heads``)."""

from tlcoupling.trajectory.growth import Growth, growth
from tlcoupling.trajectory.heads import HeadSteps, head_steps
from tlcoupling.trajectory.linearity import Linearity, line_shape_score, linearity

__all__ = ["Growth", "HeadSteps", "Linearity", "growth", "head_steps", "line_shape_score", "linearity"]
