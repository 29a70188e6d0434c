"""Residual Jacobians as linear operators.

``autograd`` and ``analytic`` are the two engines, and ``engine`` chooses between them. ``attention``, ``scores`` and
``norms`` are the parts of the closed form, and ``runs`` runs the block itself for it. ``evidence`` tests every
pair (src, dest): the closed form against the modules' own derivative (``certificate``), and either engine's Jacobian
against differences of the function (``differences``). ``cost`` counts the work.
"""
