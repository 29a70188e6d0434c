"""One hooked forward pass.

``trace`` runs a model once and keeps its residual stream; ``stream`` is that stream, checked to add up. ``prompt``
makes tokens of what the user gave, ``cache`` reads activations that were cached elsewhere, ``hooked`` knows how
TransformerLens runs a block, ``user_hooks`` finds and keeps the user's hooks, ``weights`` reads weights in
TransformerLens's orientation, and ``lifting`` holds half-precision weights in float32 while they are used.
"""
