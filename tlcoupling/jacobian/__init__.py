"""Residual Jacobians as linear operators.

``autograd`` and ``analytic`` are the two engines, and ``engine`` chooses between them and certifies the second against
the real modules. ``attention``, ``scores`` and ``norms`` are the parts of the closed form and ``runs`` runs a block's
own sublayers for it; ``differences`` holds autograd against the function itself, and ``cost`` counts the work.
"""
