"""What the top singular directions say and do.

``readout`` reads them as tokens, ``intervention`` makes hooks that remove or keep them, and ``causal`` measures what
removing them costs, beside random directions.
"""
