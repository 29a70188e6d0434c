"""Results: their base class, file format and confidence intervals.

``base`` holds the base class and its provenance, ``files`` the file format, ``typed`` checks the types of what is read,
``atomic`` writes files atomically, and ``intervals`` computes confidence intervals over prompts.
"""
