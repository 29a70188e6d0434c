"""The public names of ``tlcoupling``, which loads this module when the first of them is used."""

from tlcoupling import parity, viz
from tlcoupling.analysis.analyze import Analysis, analyze
from tlcoupling.analysis.checking import Check, check
from tlcoupling.analysis.estimate import Estimate, estimate
from tlcoupling.analysis.estimate_slices import estimate_atlas, estimate_slice
from tlcoupling.analysis.many import ManyAnalyses, analyze_many
from tlcoupling.coupling.alignment import HeadAlignment, head_alignment
from tlcoupling.coupling.chance import CouplingTest
from tlcoupling.coupling.context import ContextCoupling, context_coupling
from tlcoupling.coupling.depth import DepthCoupling, depth_coupling
from tlcoupling.coupling.heads import HeadCoupling, head_coupling
from tlcoupling.coupling.loss import coupling_loss
from tlcoupling.coupling.projected import ProjectedJacobians, projected_jacobians
from tlcoupling.coupling.token import TokenCoupling, token_coupling
from tlcoupling.directions.causal import CausalEffect, causal_effect
from tlcoupling.directions.intervention import add_direction, keep_only, project_out, random_directions
from tlcoupling.directions.readout import DirectionReadout, read_directions
from tlcoupling.dynamics.components import TrajectoryComponents, trajectory_components
from tlcoupling.dynamics.depth_profile import DepthProfile, depth_profile
from tlcoupling.dynamics.geometry import EigenGeometry, eigen_geometry
from tlcoupling.dynamics.linearized import LinearizationGap, linearization_gap, linearized
from tlcoupling.dynamics.lyapunov import LyapunovSpectrum, lyapunov_spectrum
from tlcoupling.dynamics.spectrum import SingularValueProfile, singular_value_profile
from tlcoupling.errors import TLCouplingError
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.jacobian.engine import residual_jacobian
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.linalg.svd import truncated_svd
from tlcoupling.linalg.triplets import Triplets
from tlcoupling.models.baseline import random_baseline
from tlcoupling.models.load import load_model
from tlcoupling.results.base import load
from tlcoupling.results.intervals import Interval
from tlcoupling.scores.correlate import Correlations, correlate
from tlcoupling.slices.atlas import SensitivityAtlas, sensitivity_atlas
from tlcoupling.slices.detached import DetachedComparison, DetachedMap, compare_detached, detached_map
from tlcoupling.slices.features import FeatureMap, feature_map
from tlcoupling.slices.lens import JacobianLens, jacobian_lens
from tlcoupling.slices.lens_coupling import LensCoupling, lens_coupling
from tlcoupling.slices.relations import SliceRelations, slice_relations
from tlcoupling.slices.slice import SliceJacobian, slice_jacobian
from tlcoupling.slices.steering import SteeringEffect, steering_effect, steering_vector
from tlcoupling.sweeps.executors import SlurmExecutor
from tlcoupling.sweeps.lenses import lens_sweep
from tlcoupling.sweeps.plan import Plan
from tlcoupling.sweeps.run import SweepReport, sweep
from tlcoupling.sweeps.store import SweepStore
from tlcoupling.training.monitor import TrainingMonitor
from tlcoupling.trajectory.growth import Growth, growth
from tlcoupling.trajectory.head_steps import HeadSteps, head_steps
from tlcoupling.trajectory.linearity import Linearity, linearity
from tlcoupling.trajectory.recorder import TrajectoryRecorder

__all__ = [
    "Analysis",
    "CausalEffect",
    "Check",
    "ContextCoupling",
    "Correlations",
    "CouplingTest",
    "DepthCoupling",
    "DepthProfile",
    "DetachedComparison",
    "DetachedMap",
    "DirectionReadout",
    "EigenGeometry",
    "Estimate",
    "FeatureMap",
    "Growth",
    "HeadAlignment",
    "HeadCoupling",
    "HeadSteps",
    "Interval",
    "JacobianLens",
    "JacobianOperator",
    "LensCoupling",
    "Linearity",
    "LinearizationGap",
    "LyapunovSpectrum",
    "ManyAnalyses",
    "Plan",
    "ProjectedJacobians",
    "SensitivityAtlas",
    "SingularValueProfile",
    "SliceJacobian",
    "SliceRelations",
    "SlurmExecutor",
    "SteeringEffect",
    "SweepReport",
    "SweepStore",
    "TLCouplingError",
    "TokenCoupling",
    "Trace",
    "TrainingMonitor",
    "TrajectoryComponents",
    "TrajectoryRecorder",
    "Triplets",
    "add_direction",
    "analyze",
    "analyze_many",
    "causal_effect",
    "check",
    "compare_detached",
    "context_coupling",
    "correlate",
    "coupling_loss",
    "depth_coupling",
    "depth_profile",
    "detached_map",
    "eigen_geometry",
    "estimate",
    "estimate_atlas",
    "estimate_slice",
    "feature_map",
    "growth",
    "head_alignment",
    "head_coupling",
    "head_steps",
    "jacobian_lens",
    "keep_only",
    "lens_coupling",
    "lens_sweep",
    "linearity",
    "linearization_gap",
    "linearized",
    "load",
    "load_model",
    "lyapunov_spectrum",
    "parity",
    "project_out",
    "projected_jacobians",
    "random_baseline",
    "random_directions",
    "read_directions",
    "residual_jacobian",
    "sensitivity_atlas",
    "singular_value_profile",
    "slice_jacobian",
    "slice_relations",
    "steering_effect",
    "steering_vector",
    "sweep",
    "token_coupling",
    "trace",
    "trajectory_components",
    "truncated_svd",
    "viz",
]
