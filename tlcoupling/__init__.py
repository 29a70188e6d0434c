"""Transformer models as dynamical systems: coupling, linearity and growth from a hooked forward pass."""

from tlcoupling import viz
from tlcoupling.analysis import Analysis, analyze
from tlcoupling.checking import Check, check
from tlcoupling.coupling import (
    ContextCoupling,
    DepthCoupling,
    HeadAlignment,
    HeadCoupling,
    TokenCoupling,
    context_coupling,
    depth_coupling,
    head_alignment,
    head_coupling,
    token_coupling,
)
from tlcoupling.errors import TLCouplingError
from tlcoupling.estimate import Estimate, estimate
from tlcoupling.jacobian import JacobianOperator, residual_jacobian
from tlcoupling.models import load_model
from tlcoupling.results import load
from tlcoupling.svd import Triplets, truncated_svd
from tlcoupling.trace import Trace, trace
from tlcoupling.trajectory import Growth, HeadSteps, Linearity, TrajectoryRecorder, growth, head_steps, linearity

__all__ = [
    "Analysis",
    "Check",
    "ContextCoupling",
    "DepthCoupling",
    "Estimate",
    "Growth",
    "HeadAlignment",
    "HeadCoupling",
    "HeadSteps",
    "JacobianOperator",
    "Linearity",
    "TLCouplingError",
    "TokenCoupling",
    "Trace",
    "TrajectoryRecorder",
    "Triplets",
    "analyze",
    "check",
    "context_coupling",
    "depth_coupling",
    "estimate",
    "growth",
    "head_alignment",
    "head_coupling",
    "head_steps",
    "linearity",
    "load",
    "load_model",
    "residual_jacobian",
    "token_coupling",
    "trace",
    "truncated_svd",
    "viz",
]
