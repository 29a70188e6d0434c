"""Coupling: how far the top singular vectors of residual Jacobians agree.

``metric`` has the formulas (misalignment, null, overlap) and knows nothing of models; ``pairs`` applies them to sets of
Jacobians and ``result`` holds what comes out. The kinds of coupling are sets: ``depth`` across layers, ``token`` across
tokens, ``context`` across what one token sees or is seen by, ``heads`` across the heads of a layer.
"""

from tlcoupling.coupling.context import ContextCoupling, context_coupling
from tlcoupling.coupling.depth import DepthCoupling, depth_coupling
from tlcoupling.coupling.heads import HeadAlignment, HeadCoupling, head_alignment, head_coupling
from tlcoupling.coupling.token import TokenCoupling, token_coupling

__all__ = [
    "ContextCoupling",
    "DepthCoupling",
    "HeadAlignment",
    "HeadCoupling",
    "TokenCoupling",
    "context_coupling",
    "depth_coupling",
    "head_alignment",
    "head_coupling",
    "token_coupling",
]
