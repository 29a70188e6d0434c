"""The forward pass as a discrete dynamical system, x <- x + f^l(x).

``linearized`` carries a perturbation through the system's linearisation and compares it with the same perturbation in
the real model; ``spectrum`` follows the singular values of the linearised steps along depth; ``components`` looks at
the trajectories themselves in the plane or space that holds most of them.
"""

from tlcoupling.dynamics.components import TrajectoryComponents, trajectory_components
from tlcoupling.dynamics.linearized import LinearizationGap, linearization_gap, linearized
from tlcoupling.dynamics.spectrum import SingularValueProfile, singular_value_profile

__all__ = [
    "LinearizationGap",
    "SingularValueProfile",
    "TrajectoryComponents",
    "linearization_gap",
    "linearized",
    "singular_value_profile",
    "trajectory_components",
]
