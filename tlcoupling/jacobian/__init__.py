"""Residual Jacobians as linear operators.

``operator`` is the interface and ``maps`` the small linear maps that compose under it; ``autograd`` and ``analytic``
are the two engines, and ``engine`` chooses between them and certifies the second against the real modules.
"""

from tlcoupling.jacobian.engine import JacobianEngine, residual_jacobian
from tlcoupling.jacobian.operator import JacobianOperator

__all__ = ["JacobianEngine", "JacobianOperator", "residual_jacobian"]
