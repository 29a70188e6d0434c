"""Transformer models as dynamical systems: coupling, linearity and growth from a hooked forward pass."""

from tlcoupling import parity, viz
from tlcoupling.analysis import Analysis, analyze
from tlcoupling.baseline import random_baseline
from tlcoupling.causal import CausalEffect, causal_effect
from tlcoupling.checking import Check, check
from tlcoupling.coupling import (
    ContextCoupling,
    DepthCoupling,
    HeadAlignment,
    HeadCoupling,
    ProjectedJacobians,
    TokenCoupling,
    context_coupling,
    coupling_loss,
    depth_coupling,
    head_alignment,
    head_coupling,
    projected_jacobians,
    token_coupling,
)
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
from tlcoupling.estimate import Estimate, estimate
from tlcoupling.intervals import Interval
from tlcoupling.intervention import keep_only, project_out, random_directions
from tlcoupling.jacobian import JacobianOperator, residual_jacobian
from tlcoupling.many import ManyAnalyses, analyze_many
from tlcoupling.models import load_model
from tlcoupling.monitor import TrainingMonitor
from tlcoupling.readout import DirectionReadout, read_directions
from tlcoupling.result_files import load
from tlcoupling.svd import Triplets, truncated_svd
from tlcoupling.sweep import Plan, SlurmExecutor, SweepReport, SweepStore, sweep
from tlcoupling.sweep.statistics import Correlations, correlate
from tlcoupling.trace import Trace, trace
from tlcoupling.trajectory import Growth, HeadSteps, Linearity, TrajectoryRecorder, growth, head_steps, linearity

__all__ = [
    "Analysis",
    "CausalEffect",
    "Check",
    "ContextCoupling",
    "Correlations",
    "DepthCoupling",
    "DirectionReadout",
    "Estimate",
    "Growth",
    "HeadAlignment",
    "HeadCoupling",
    "HeadSteps",
    "Interval",
    "JacobianOperator",
    "Linearity",
    "LinearizationGap",
    "ManyAnalyses",
    "Plan",
    "ProjectedJacobians",
    "SingularValueProfile",
    "SlurmExecutor",
    "SweepReport",
    "SweepStore",
    "TLCouplingError",
    "TokenCoupling",
    "Trace",
    "TrainingMonitor",
    "TrajectoryComponents",
    "TrajectoryRecorder",
    "Triplets",
    "analyze",
    "analyze_many",
    "causal_effect",
    "check",
    "context_coupling",
    "correlate",
    "coupling_loss",
    "depth_coupling",
    "estimate",
    "growth",
    "head_alignment",
    "head_coupling",
    "head_steps",
    "keep_only",
    "linearity",
    "linearization_gap",
    "linearized",
    "load",
    "load_model",
    "parity",
    "project_out",
    "projected_jacobians",
    "random_baseline",
    "random_directions",
    "read_directions",
    "residual_jacobian",
    "singular_value_profile",
    "sweep",
    "token_coupling",
    "trace",
    "trajectory_components",
    "truncated_svd",
    "viz",
]
