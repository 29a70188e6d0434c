"""Measurements against scores of the models, such as benchmarks.

``tables`` reads scores, ``correlate`` correlates them with what was measured, and ``partial_correlation`` does so with
other quantities held fixed.
"""
