"""Correlation of measurements with model scores, such as benchmarks.

``tables`` reads scores and matches them with measurements, ``correlate`` correlates the two, and
``partial_correlation`` holds other quantities fixed.
"""
