"""Token trajectories: how straight they are (``linearity``), how their norms grow (``growth``).

``head_steps`` splits attention's steps by head. ``recorder`` measures linearity and growth during your own forward
pass, without a cache.
"""
