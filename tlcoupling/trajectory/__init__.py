"""Token trajectories: how straight they are (``linearity``), how their norms grow (``growth``).

``head_steps`` splits attention's steps by head, and ``recorder`` measures linearity and growth in a run of your own,
without a cache.
"""
