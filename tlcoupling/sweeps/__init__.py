"""Many models, checkpoints and prompts: a plan says what is measured, a store keeps it.

- ``plan``, read by ``plan_file``, with ``prompts``, ``checkpoints`` and ``source`` (where a model comes from);
- ``cells``: one measurement and the key that its contents give it;
- ``store``: a folder of measured cells, and merging;
- ``table``: all of them as one table;
- ``run``: what is missing is measured, in this process or by one of ``executors``;
- ``cost`` and ``forecast``: what that would take, before anything is loaded;
- ``agreement``: whether two measurements of the same cell agree.
"""

from tlcoupling.sweeps.cells import Cell, ModelFacts, Settings
from tlcoupling.sweeps.executors import JobLostError, SlurmExecutor
from tlcoupling.sweeps.plan import Plan
from tlcoupling.sweeps.run import SweepReport, sweep
from tlcoupling.sweeps.store import Failure, SweepStore

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
