"""Coupling, linearity and growth while a model trains.

``monitor`` measures a model at chosen steps, ``loops`` attaches it to training loops of other libraries,
``in_training`` holds the model still while it is measured, ``means`` averages over prompts, and ``record`` keeps the
results.
"""
