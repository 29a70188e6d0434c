"""The forward pass as a discrete dynamical system, x <- x + f^l(x).

``linearized`` carries a perturbation through the system's linearisation and compares it with the same perturbation in
the real model; ``spectrum`` follows the singular values of the linearised steps along depth; ``components`` looks at
the trajectories themselves in the plane or space that holds most of them.
"""
