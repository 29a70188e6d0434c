"""Coupling: how far the top singular vectors of residual Jacobians agree.

``metric`` has the formulas (misalignment, null, overlap) and knows nothing of models; ``groups`` says which Jacobians
are compared with each other, ``plan`` how within the memory there is, ``pairs`` does it and ``result`` holds what comes
out. The kinds of coupling are groups: ``depth`` across layers, ``token`` across tokens, ``context`` across what one
token sees or is seen by, ``heads`` across the heads of a layer. ``alignment`` asks which heads serve a block's
directions; ``loss`` is coupling across layers, differentiable; ``projected`` gives the matrices themselves.
"""

from tlcoupling.coupling.alignment import HeadAlignment, head_alignment
from tlcoupling.coupling.context import ContextCoupling, context_coupling
from tlcoupling.coupling.depth import DepthCoupling, depth_coupling
from tlcoupling.coupling.heads import HeadCoupling, head_coupling
from tlcoupling.coupling.loss import coupling_loss
from tlcoupling.coupling.projected import ProjectedJacobians, projected_jacobians
from tlcoupling.coupling.token import TokenCoupling, token_coupling

__all__ = [
    "ContextCoupling",
    "DepthCoupling",
    "HeadAlignment",
    "HeadCoupling",
    "ProjectedJacobians",
    "TokenCoupling",
    "context_coupling",
    "coupling_loss",
    "depth_coupling",
    "head_alignment",
    "head_coupling",
    "projected_jacobians",
    "token_coupling",
]
