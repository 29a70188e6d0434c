"""TrainingMonitor: coupling, linearity and growth of a model during its training.

The monitor does not change the training: the loss is bit-identical with and without it.
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
    """Measures a model every N steps of its training, without changing the training.

    - In a loop, call it with the step: ``monitor(step)``.
    - In a HuggingFace ``Trainer``, use a callback: ``Trainer(..., callbacks=[monitor.as_trainer_callback()])``.
    - For a training tool without callbacks, such as TransformerLens's ``train``, let it count the optimiser's steps:
      ``with monitor.attached(): train(...)``.

    The model is measured in eval mode. Module modes, gradients, random generators and hooks are restored afterwards,
    and only the numbers stay in memory. A failed measurement (NaN activations, lack of memory) is recorded with a
    warning, and training continues.

    Args:
        model: the trained model: a ``HookedTransformer``, a ``TransformerBridge``, or (from transformer-lens 3 on) a
            HuggingFace decoder, which is measured through a bridge on its own weights. All parameters must be on this
            process: sharded models (FSDP, ZeRO 3) cannot be measured.
        prompts: prompts, or a mapping from names to prompts: token ids, or strings if there is a tokenizer.
        every: measure at steps that are multiples of this.
        store: a ``SweepStore``, or its folder, created if missing. Each prompt at each step is a cell with its
            ``step``, so ``tlcoupling.correlate`` and a sweep's table can read it. None keeps the numbers in memory.
        name: the run's name, unique in its store. By default the model's name.
        resume: continue the run of that name in the store, after a checkpoint. Repeated measurements replace the old
            ones. If there is no such run, it starts.
        loggers: loggers for means over prompts: objects with ``log(dict, step=...)`` (a Weights & Biases run) or
            ``add_scalar(name, value, step)`` (TensorBoard's ``SummaryWriter``).
        tokenizer: a HuggingFace tokenizer for strings, if the model has none.
        verbose: print a line for each measurement, with its cost, on stderr.
        **settings: settings of ``tlc.analyze``: ``k``, ``tokens``, ``sublayers``, ``normalizer``, ``bases``,
            ``absolute``, ``prepend_bos``, ``engine``, ``solver``.

    Attributes:
        calls: number of steps measured.
        seconds: total time of the measurements.

    Raises:
        ArgumentError: an argument out of range. Settings that the model does not allow fail at the first measurement.
        UnsupportedModelError: a model that cannot be measured.
        StoreError: the store cannot be written to, or already holds a run of this name, and ``resume`` is False.

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
        self.model: Any = model
        self.every: int = every
        self.verbose: bool = verbose
        self.calls: int = 0
        self.seconds: float = 0.0
        self._loggers, self._settings = tuple(loggers), _settings(settings)
        with evaluated(model) as measured:
            self.name: str = model_name_of(measured) if name is None else name
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
        """Measure if the step is a multiple of ``every``.

        Args:
            step: number of the training step.

        Returns:
            As ``measure``; None at other steps.

        Raises:
            ArgumentError: an invalid step, or a setting that the model does not allow.
        """
        return None if check_int("step", step, 0) % self.every else self.measure(step)

    def measure(self, step: int) -> dict[str, float]:
        """Measure now.

        Args:
            step: number of the training step, for the record.

        Returns:
            The means over prompts that the loggers get, by name: ``coupling/block/k10``, ``null/...``, ``excess/...``
            of each sublayer and K, ``lss/block`` ..., ``ed``, ``rate``, and ``seconds``, the time of the measurement.

        Raises:
            ArgumentError: an invalid step, or a setting that the model does not allow.

        Warns:
            UserWarning: a prompt could not be measured, the store could not be written to, or a logger failed.
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
                    prompt_rows = self._prompt(model, key, step)
                    rows += prompt_rows
                    measured += bool(prompt_rows)
                    del left[key]
        except (ArgumentError, UnsupportedModelError):
            raise
        except Exception as error:  # a failed measurement must not end the training
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
        """Measure one prompt, record the result or error, and return the result's rows; none if it failed."""
        started = time.perf_counter()
        try:
            outcome: Analysis | Exception = analyze(
                model,
                self._prompts[key],
                **{**self._settings.arguments(), "prepend_bos": None},
                attention_mask=[1] * len(self._prompts[key]),  # pads are removed already
                attention=False,
            )
        except (ArgumentError, UnsupportedModelError):
            raise
        except Exception as error:  # such as a diverged run, or lack of memory
            outcome = error
            warnings.warn(f"step {step}: prompt {key!r} could not be measured: {describe(error)}", stacklevel=4)
        cell = self._keep(key, step, outcome, time.perf_counter() - started)
        return [] if isinstance(outcome, Exception) else list(rows_of_cell(cell, outcome, self._facts))

    def _keep(self, key: str, step: int, outcome: Analysis | Exception, seconds: float) -> Cell:
        """Record the outcome for a prompt at a step, and return its cell."""
        tokens = tuple(self._prompts[key].tolist())
        cell = Cell(self.name, tokens, self._settings, revision=f"step{step}", step=step)
        try:
            self._record.keep(cell, outcome, self._facts, seconds)
        except TLCouplingError as error:
            warnings.warn(f"step {step}: prompt {key!r} was not stored: {error}", stacklevel=5)
        return cell

    def table(self) -> pandas.DataFrame:
        """Return all measurements of this run as a sweep's table: one row per step, prompt, sublayer and K.

        Failures are included with their errors. For a resumed run with a store, earlier measurements are included.
        """
        return self._record.table()

    def as_trainer_callback(self) -> TrainerCallback:
        """Return a callback for a HuggingFace ``Trainer``; in distributed training its first process measures."""
        return trainer_callback(self.model, self)

    @contextmanager
    def attached(self, start: int = 0) -> Iterator[TrainingMonitor]:
        """Call the monitor on entry, and inside after every step of an optimiser with the model's parameters.

        For training tools without callbacks, such as TransformerLens's (``transformer_lens.train`` before 4,
        ``transformer_lens.tools.training`` from 4 on). The call on entry measures the model before its first step.

        Args:
            start: number of steps that the model has been trained for.

        Warns:
            UserWarning: no such optimiser made a step.
        """
        with steps_counted(self.model, self, start):
            yield self


def _settings(given: Mapping[str, Any]) -> Settings:
    """Build a cell's settings.

    Raises:
        ArgumentError: an unknown setting, or a value that is not allowed.
    """
    allowed = [each.name for each in fields(Settings)]
    if unknown := [name for name in given if name not in allowed]:
        raise ArgumentError("settings", unknown[0], f"one of {', '.join(allowed)}")
    return Settings.of(**given)


def _encoded(prompt: Any, tokenizer: Any | None) -> Any:
    """Return a string's token ids and mask if a tokenizer is given; return anything else unchanged."""
    return prompt if tokenizer is None or not isinstance(prompt, str) else tokenizer(prompt)
