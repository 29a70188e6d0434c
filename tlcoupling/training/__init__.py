"""Coupling, linearity and growth while a model trains.

``monitor`` measures a model at chosen steps, and ``loops`` attaches it to training loops of other libraries.
``in_training`` prepares the model for a measurement and restores it, ``means`` averages over prompts, and ``record``
keeps the results.
"""
