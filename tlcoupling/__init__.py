"""Transformer models as dynamical systems: coupling, linearity and growth from a hooked forward pass."""

from tlcoupling import parity, viz
from tlcoupling.analysis import Analysis, analyze
from tlcoupling.baseline import random_baseline
from tlcoupling.checking import Check, check
from tlcoupling.coupling import DepthCoupling, depth_coupling
from tlcoupling.dynamics import (
    LinearizationGap,
    SingularValueProfile,
    TrajectoryComponents,
    linearization_gap,
    linearized,
    singular_value_profile,
    trajectory_components,
)
from tlcoupling.errors import TLCouplingError
from tlcoupling.intervals import Interval
from tlcoupling.jacobian import JacobianOperator, residual_jacobian
from tlcoupling.many import ManyAnalyses, analyze_many
from tlcoupling.models import load_model
from tlcoupling.readout import DirectionReadout, read_directions
from tlcoupling.results import load
from tlcoupling.svd import Triplets, truncated_svd
from tlcoupling.trace import Trace, trace
from tlcoupling.trajectory import Growth, Linearity, growth, linearity

__all__ = [
    "Analysis",
    "Check",
    "DepthCoupling",
    "DirectionReadout",
    "Growth",
    "Interval",
    "JacobianOperator",
    "Linearity",
    "LinearizationGap",
    "ManyAnalyses",
    "SingularValueProfile",
    "TLCouplingError",
    "Trace",
    "TrajectoryComponents",
    "Triplets",
    "analyze",
    "analyze_many",
    "check",
    "depth_coupling",
    "growth",
    "linearity",
    "linearization_gap",
    "linearized",
    "load",
    "load_model",
    "parity",
    "random_baseline",
    "read_directions",
    "residual_jacobian",
    "singular_value_profile",
    "trace",
    "trajectory_components",
    "truncated_svd",
    "viz",
]
