"""Many models, checkpoints and prompts: a plan says what is measured, a store keeps it.

- ``plan``, read by ``reading``, with ``prompts``, ``checkpoints`` and ``source`` (where a model comes from);
- ``cells``: one measurement and the key that its contents give it;
- ``store``: a folder of measured cells, and merging;
- ``table``: all of them as one table;
- ``run``: what is missing is measured, in this process or by one of ``executors``;
- ``cost``: what that would take, before anything is loaded;
- ``statistics``: measurements against scores of the models, with ``scores`` and ``partial``.
"""

from tlcoupling.sweep.cells import Cell, ModelFacts, Settings
from tlcoupling.sweep.executors import JobLostError, SlurmExecutor
from tlcoupling.sweep.plan import Plan
from tlcoupling.sweep.run import SweepReport, sweep
from tlcoupling.sweep.store import Failure, SweepStore

__all__ = [
    "Cell",
    "Failure",
    "JobLostError",
    "ModelFacts",
    "Plan",
    "Settings",
    "SlurmExecutor",
    "SweepReport",
    "SweepStore",
    "sweep",
]
