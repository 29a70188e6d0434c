"""Loading models and building untrained baselines.

``load`` loads a model by name, ``smollm2`` the model whose weights come from a Python package, and ``offline`` keeps
loaders off the network. ``baseline`` builds a model's untrained twin; ``generators`` protects the random state.
"""
