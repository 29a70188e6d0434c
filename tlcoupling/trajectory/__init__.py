"""Token trajectories: how straight they are (``linearity``) and how their norms grow (``growth``).

``recorder`` measures both in a run of the user's own, without a cache.
"""

from tlcoupling.trajectory.growth import Growth, growth
from tlcoupling.trajectory.linearity import Linearity, line_shape_score, linearity
from tlcoupling.trajectory.recorder import TrajectoryRecorder

__all__ = ["Growth", "Linearity", "TrajectoryRecorder", "growth", "line_shape_score", "linearity"]
