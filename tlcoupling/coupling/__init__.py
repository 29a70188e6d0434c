"""Coupling: how far the top singular vectors of residual Jacobians agree.

``metric`` has the formulas (misalignment, null, overlap) and knows nothing of models; ``depth`` applies them across
layers.
"""

from tlcoupling.coupling.depth import DepthCoupling, depth_coupling

__all__ = ["DepthCoupling", "depth_coupling"]
