"""Coupling: how far the top singular vectors of residual Jacobians agree.

``metric`` holds the formulas (misalignment, null, overlap) and knows nothing of models. ``groups`` says which Jacobians
are compared, ``plan`` fits the computation into memory, ``pairs`` carries it out and ``result`` holds the results.
Each kind of coupling is a list of groups: ``depth`` across layers, ``token`` across tokens, ``context`` across the
positions that one token reaches or is reached from, ``heads`` across the heads of a layer. ``alignment`` measures which
heads serve a block's top directions, ``loss`` is a differentiable coupling across layers, and ``projected`` returns the
projected matrices.
"""
