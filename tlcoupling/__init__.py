"""Transformer models as dynamical systems: coupling, linearity and growth from a hooked forward pass."""

from tlcoupling import viz
from tlcoupling.analysis import Analysis, analyze
from tlcoupling.causal import CausalEffect, causal_effect
from tlcoupling.checking import Check, check
from tlcoupling.coupling import (
    ContextCoupling,
    DepthCoupling,
    HeadAlignment,
    HeadCoupling,
    TokenCoupling,
    context_coupling,
    coupling_loss,
    depth_coupling,
    head_alignment,
    head_coupling,
    token_coupling,
)
from tlcoupling.errors import TLCouplingError
from tlcoupling.estimate import Estimate, estimate
from tlcoupling.intervention import keep_only, project_out, random_directions
from tlcoupling.jacobian import JacobianOperator, residual_jacobian
from tlcoupling.models import load_model
from tlcoupling.results import load
from tlcoupling.svd import Triplets, truncated_svd
from tlcoupling.trace import Trace, trace
from tlcoupling.trajectory import Growth, HeadSteps, Linearity, TrajectoryRecorder, growth, head_steps, linearity

__all__ = [
    "Analysis",
    "CausalEffect",
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
    "causal_effect",
    "check",
    "context_coupling",
    "coupling_loss",
    "depth_coupling",
    "estimate",
    "growth",
    "head_alignment",
    "head_coupling",
    "head_steps",
    "keep_only",
    "linearity",
    "load",
    "load_model",
    "project_out",
    "random_directions",
    "residual_jacobian",
    "token_coupling",
    "trace",
    "truncated_svd",
    "viz",
]
