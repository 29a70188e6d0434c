"""Jacobians between any two hook points: chains of the blocks' derivatives at all positions.

``flows`` holds each block's derivative, certified against the model. ``slice`` chains them between two ``sites``.
``atlas`` measures all pairs of layers, ``lens`` averages the way to the last layer over prompts, and ``lens_coupling``
compares that with the blocks. ``detached`` is the chain with frozen factors, ``features`` what lies between two
dictionaries, ``relations`` what of a slice follows from the blocks.
"""
