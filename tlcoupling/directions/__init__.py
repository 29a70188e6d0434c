"""What the top singular directions mean and cause.

``readout`` decodes them as tokens, ``intervention`` makes hooks that remove or keep them, and ``causal`` measures the
effect of removing them on the loss, compared with random directions.
"""
