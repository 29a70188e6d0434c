"""Many models, checkpoints and prompts: a plan says what is measured, a store keeps it.

- ``cells``: one measurement and the key that its contents give it;
- ``store``: a folder of measured cells, and merging;
- ``table``: all of them as one table.
"""

from tlcoupling.sweep.cells import Cell, ModelFacts, Settings
from tlcoupling.sweep.store import Failure, SweepStore

__all__ = ["Cell", "Failure", "ModelFacts", "Settings", "SweepStore"]
