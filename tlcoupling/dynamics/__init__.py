"""The forward pass as a discrete dynamical system, x <- x + f^l(x).

``linearized`` carries a perturbation through the linearised system and compares it with the real model. ``spectrum``
follows the singular values of the linearised steps along depth. ``geometry`` measures their eigenvalues, normality,
symmetry and rank, and ``lyapunov`` what their product does to perturbations. ``depth_profile`` is a table of what each
layer does. ``components`` computes the principal components of the trajectories.
"""
