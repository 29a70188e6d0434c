"""Where models come from.

``load`` gives a model by name, ``smollm2`` the one whose weights a package carries, ``offline`` tokenizers and models
without a network. ``baseline`` is a model's untrained twin, whose weights ``generators`` draw.
"""
