"""Sweeps over many models, checkpoints and prompts: a plan says what to measure, a store keeps the results.

- ``plan``, read by ``plan_file``, with ``prompts``, ``checkpoints`` and ``source`` (where a model comes from);
- ``cells``: one measurement, and the key computed from its contents;
- ``store``: a folder of measured cells, and merging;
- ``table``: all results as one table;
- ``run``: measure missing cells, in this process or with one of ``executors``;
- ``lenses``: the Jacobian lens of a corpus, kept by prompt;
- ``cost`` and ``forecast``: the expected cost, before any model is loaded;
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
