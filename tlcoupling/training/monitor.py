"""TrainingMonitor: coupling, linearity and growth of a model while it is being trained.

The training run must not notice: its loss is bit-identical with and without the monitor.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcoupling.analysis.analyze import analyze
from tlcoupling.arguments import check_int
from tlcoupling.errors import ArgumentError, TLCouplingError, UnsupportedModelError
from tlcoupling.forward.hooked import model_name_of
from tlcoupling.forward.prompt import named_prompts, to_tokens
from tlcoupling.models.generators import generators_kept
from tlcoupling.sweeps.cells import Cell, ModelFacts, Settings
from tlcoupling.sweeps.store import SweepStore, describe
from tlcoupling.sweeps.table import rows_of_cell
from tlcoupling.training.in_training import evaluated
from tlcoupling.training.loops import steps_counted, trainer_callback
from tlcoupling.training.means import check_loggers, line_of, log_to, means_of
from tlcoupling.training.record import TrainingRecord

if TYPE_CHECKING:
    import pandas
    from transformers import TrainerCallback

    from tlcoupling.analysis.analyze import Analysis


class TrainingMonitor:
    """Measures a model every N steps of its training, and leaves the training as it is.

    Call it in a loop, with the number of the step: ``monitor(step)``. In a HuggingFace ``Trainer`` it is a callback,
    ``Trainer(..., callbacks=[monitor.as_trainer_callback()])``. Around a training tool that has no callbacks, such as
    TransformerLens's ``train``, it counts the steps of the model's optimiser: ``with monitor.attached(): train(...)``.

    The model is measured in eval mode. Each module's mode, gradients, random generators and hooks are afterwards what
    they were before; nothing of a measurement stays in memory but its numbers. What cannot be measured at some step
    (NaN activations of a run that diverges, memory) is recorded as that, with a warning: training goes on.

    Args:
        model: what is being trained: a ``HookedTransformer``, a ``TransformerBridge``, or (from transformer-lens 3 on)
            a HuggingFace decoder itself, which is seen through a bridge on its own weights. Whole on this process:
            parameters that are sharded (FSDP, ZeRO 3) cannot be measured.
        prompts: prompts, or names and prompts: token ids, or strings where the model has a tokenizer or one is given.
        every: measure at steps that are multiples of it.
        store: a ``SweepStore``, or its folder, made where it is missing; each prompt at each step is a cell of it, with
            its ``step``, so that ``tlcoupling.correlate`` and the table of a sweep read it. None keeps the numbers in
            memory.
        name: of the run in the store, where each run needs a name of its own. By default the model's.
        resume: the run goes on with what the store has under its name, after a checkpoint: what it measures again takes
            the place of what was there. Where there is nothing yet it begins.
        loggers: where means over prompts go besides: anything with ``log(dict, step=...)`` (a Weights & Biases run) or
            ``add_scalar(name, value, step)`` (TensorBoard's ``SummaryWriter``).
        tokenizer: a HuggingFace tokenizer for strings, where the model has none.
        verbose: print a line for each measurement, with what it cost, on stderr.
        **settings: what is measured, as in ``tlc.analyze``: ``k``, ``tokens``, ``sublayers``, ``normalizer``,
            ``bases``, ``absolute``, ``prepend_bos``, ``engine``, ``solver``.

    Attributes:
        calls: number of steps measured.
        seconds: what that took in all.

    Raises:
        ArgumentError: an argument out of range; of settings that the model does not allow, at the first measurement.
        UnsupportedModelError: a model that cannot be measured.
        StoreError: the store cannot be written to, or has a run of that name and this one does not ``resume`` it.

    Example:
        >>> monitor = tlc.TrainingMonitor(model, prompts, every=100, store="run", k=10)  # doctest: +SKIP
        >>> for step, batch in enumerate(batches):  # doctest: +SKIP
        ...     monitor(step)
        ...     train_on(batch)
        >>> monitor.table()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        prompts: Mapping[str, Any] | Sequence[Any],
        *,
        every: int = 100,
        store: SweepStore | str | Path | None = None,
        name: str | None = None,
        resume: bool = False,
        loggers: Sequence[Any] = (),
        tokenizer: Any | None = None,
        verbose: bool = True,
        **settings: Any,
    ) -> None:
        every = check_int("every", every, 1)
        check_loggers(loggers)
        self.model, self.every, self.verbose = model, every, verbose
        self.calls, self.seconds = 0, 0.0
        self._loggers, self._settings = tuple(loggers), _settings(settings)
        with evaluated(model) as measured:
            self.name = model_name_of(measured) if name is None else name
            self._facts = ModelFacts.of(measured)
            encoded = {key: _encoded(prompt, tokenizer) for key, prompt in named_prompts(prompts).items()}
            self._prompts = {
                key: to_tokens(measured, prompt, self._settings.prepend_bos)[0].cpu() for key, prompt in encoded.items()
            }
        self._record = TrainingRecord(self.name, store, resume)
        self._started = time.perf_counter()

    def __repr__(self) -> str:
        """One line."""
        return (
            f"TrainingMonitor({self.name}: {len(self._prompts)} prompts every {self.every} steps; {self.calls} steps "
            f"measured in {self.seconds:.1f} s)"
        )

    def __call__(self, step: int) -> dict[str, float] | None:
        """Measure, if it is the turn of this step.

        Args:
            step: number of the training step.

        Returns:
            As ``measure``; None between the turns.

        Raises:
            ArgumentError: no step, or a setting that the model does not allow.
        """
        return None if check_int("step", step, 0) % self.every else self.measure(step)

    def measure(self, step: int) -> dict[str, float]:
        """Measure now.

        Args:
            step: number of the training step that it is recorded under.

        Returns:
            What the loggers get, means over the prompts by name: ``coupling/block/k10``, ``null/...``, ``excess/...``
            of each sublayer and K, ``lss/block`` ..., ``ed``, ``rate``, and the ``seconds`` that it took.

        Raises:
            ArgumentError: no step, or a setting that the model does not allow.

        Warns:
            UserWarning: a prompt could not be measured, the store not be written to, or a logger failed.
        """
        step = check_int("step", step, 0)
        with generators_kept():  # loggers draw from them too
            return self._measured(step)

    def _measured(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        left, rows, measured = dict(self._prompts), [], 0
        try:
            with evaluated(self.model) as model:
                for key in self._prompts:
                    found = self._prompt(model, key, step)
                    rows += found
                    measured += bool(found)
                    del left[key]
        except (ArgumentError, UnsupportedModelError):
            raise
        except Exception as error:  # training is worth more than its measurement
            warnings.warn(f"step {step} could not be measured: {describe(error)}", stacklevel=3)
            for key in left:
                self._keep(key, step, error, 0.0)
        seconds = time.perf_counter() - started
        self.seconds, self.calls = self.seconds + seconds, self.calls + 1
        means = {**means_of(rows), "seconds": seconds}
        log_to(self._loggers, step, means)
        if self.verbose:
            from tqdm.auto import tqdm

            share = self.seconds / (time.perf_counter() - self._started)
            failed = len(self._prompts) - measured
            tqdm.write(line_of(step, means, share, failed, len(self._prompts)), file=sys.stderr)
        return means

    def _prompt(self, model: Any, key: str, step: int) -> list[dict[str, Any]]:
        """Measure one prompt, keep the result or the error, and give the result's rows: none where it failed."""
        started = time.perf_counter()
        try:
            outcome: Analysis | Exception = analyze(
                model, self._prompts[key], **{**self._settings.arguments(), "prepend_bos": None}, attention=False
            )
        except (ArgumentError, UnsupportedModelError):
            raise
        except Exception as error:  # a run that diverges, or one that leaves no memory
            outcome = error
            warnings.warn(f"step {step}: prompt {key!r} could not be measured: {describe(error)}", stacklevel=4)
        cell = self._keep(key, step, outcome, time.perf_counter() - started)
        return [] if isinstance(outcome, Exception) else list(rows_of_cell(cell, outcome, self._facts))

    def _keep(self, key: str, step: int, outcome: Analysis | Exception, seconds: float) -> Cell:
        """Keep what became of a prompt at a step, and give the cell that it is kept as."""
        tokens = tuple(self._prompts[key].tolist())
        cell = Cell(self.name, tokens, self._settings, revision=f"step{step}", step=step)
        try:
            self._record.keep(cell, outcome, self._facts, seconds)
        except TLCouplingError as error:
            warnings.warn(f"step {step}: prompt {key!r} is not in the store: {error}", stacklevel=5)
        return cell

    def table(self) -> pandas.DataFrame:
        """All that is measured of this run, as the table of a sweep: one row per step, prompt, sublayer and K.

        What could not be measured is in it, with its error; with a store, what a resumed run had before as well.
        """
        return self._record.table()

    def as_trainer_callback(self) -> TrainerCallback:
        """A callback for a HuggingFace ``Trainer``; in distributed training its first process measures."""
        return trainer_callback(self.model, self)

    @contextmanager
    def attached(self, start: int = 0) -> Iterator[TrainingMonitor]:
        """Call the monitor after every step of an optimiser that holds the model's parameters, for a while.

        For training tools that have no callbacks, such as TransformerLens's (``transformer_lens.train`` below 4,
        ``transformer_lens.tools.training`` from there on). The model before its first step is measured on entry.

        Args:
            start: number of steps that the model has been trained for.

        Warns:
            UserWarning: no such optimiser has made a step.
        """
        with steps_counted(self.model, self, start):
            yield self


def _settings(given: Mapping[str, Any]) -> Settings:
    """The settings of a cell, whose several values are tuples.

    Raises:
        ArgumentError: a name that is no setting, or a value that none allows.
    """
    allowed = [each.name for each in fields(Settings)]
    if unknown := [name for name in given if name not in allowed]:
        raise ArgumentError("settings", unknown[0], f"one of {', '.join(allowed)}")
    return Settings.of(**given)


def _encoded(prompt: Any, tokenizer: Any | None) -> Any:
    """A string as token ids, by a tokenizer that was given; anything else as it is."""
    return prompt if tokenizer is None or not isinstance(prompt, str) else tokenizer(prompt)["input_ids"]
