"""Transformer models as dynamical systems: coupling, linearity and growth from a hooked forward pass."""

from tlcoupling import viz
from tlcoupling.analysis import Analysis, analyze
from tlcoupling.causal import CausalEffect, causal_effect
from tlcoupling.checking import Check, check
from tlcoupling.coupling import DepthCoupling, coupling_loss, depth_coupling
from tlcoupling.errors import TLCouplingError
from tlcoupling.intervention import keep_only, project_out, random_directions
from tlcoupling.jacobian import JacobianOperator, residual_jacobian
from tlcoupling.models import load_model
from tlcoupling.results import load
from tlcoupling.svd import Triplets, truncated_svd
from tlcoupling.trace import Trace, trace
from tlcoupling.trajectory import Growth, Linearity, TrajectoryRecorder, growth, linearity

__all__ = [
    "Analysis",
    "CausalEffect",
    "Check",
    "DepthCoupling",
    "Growth",
    "JacobianOperator",
    "Linearity",
    "TLCouplingError",
    "Trace",
    "TrajectoryRecorder",
    "Triplets",
    "analyze",
    "causal_effect",
    "check",
    "coupling_loss",
    "depth_coupling",
    "growth",
    "keep_only",
    "linearity",
    "load",
    "load_model",
    "project_out",
    "random_directions",
    "residual_jacobian",
    "trace",
    "truncated_svd",
    "viz",
]
