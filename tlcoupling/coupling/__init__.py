"""Coupling: how far the top singular vectors of residual Jacobians agree.

``metric`` has the formulas (misalignment, null, overlap) and knows nothing of models; ``groups`` says which Jacobians
are compared with each other, ``plan`` how within the memory there is, ``pairs`` does it and ``result`` holds what comes
out. The kinds of coupling are groups: ``depth`` across layers, ``token`` across tokens, ``context`` across what one
token sees or is seen by, ``heads`` across the heads of a layer. ``alignment`` asks which heads serve a block's
directions; ``loss`` is coupling across layers, differentiable; ``projected`` gives the matrices themselves.
"""
