"""Results: their base class, file format and confidence intervals.

``base`` holds the base class and its provenance, ``files`` the file format, ``atomic`` writes files atomically, and
``intervals`` computes confidence intervals over prompts.
"""
