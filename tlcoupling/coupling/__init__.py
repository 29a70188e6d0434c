"""Coupling: how far the top singular vectors of residual Jacobians agree.

``metric`` has the formulas (misalignment, null, overlap) and knows nothing of models; ``depth`` applies them across
layers. ``loss`` is the same, differentiable.
"""

from tlcoupling.coupling.depth import DepthCoupling, depth_coupling
from tlcoupling.coupling.loss import coupling_loss

__all__ = ["DepthCoupling", "coupling_loss", "depth_coupling"]
