"""Token trajectories: how straight they are (``linearity``), how their norms grow (``growth``), by head (``heads``).

``recorder`` measures the first two in a run of the user's own, without a cache.
"""

from tlcoupling.trajectory.growth import Growth, growth
from tlcoupling.trajectory.heads import HeadSteps, head_steps
from tlcoupling.trajectory.linearity import Linearity, line_shape_score, linearity
from tlcoupling.trajectory.recorder import TrajectoryRecorder

__all__ = [
    "Growth",
    "HeadSteps",
    "Linearity",
    "TrajectoryRecorder",
    "growth",
    "head_steps",
    "line_shape_score",
    "linearity",
]
