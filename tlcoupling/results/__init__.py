"""What every result is, and how it is kept.

``base`` is the result itself with its provenance, ``files`` its format on disk, ``atomic`` writes a file whole or not
at all, and ``intervals`` are the confidence intervals of results over prompts.
"""
