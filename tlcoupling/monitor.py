"""TrainingMonitor: coupling, linearity and growth of a model while it is being trained.

The training run must not notice: its loss is bit-identical with and without the monitor.
"""

from __future__ import annotations

import operator
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcoupling.analysis import analyze
from tlcoupling.errors import ArgumentError, TLCouplingError, UnsupportedModelError
from tlcoupling.generators import generators_kept
from tlcoupling.hooked import model_name_of
from tlcoupling.in_training import evaluated, unwrapped
from tlcoupling.prompt import named_prompts, to_tokens
from tlcoupling.sweep.cells import Cell, ModelFacts, Settings
from tlcoupling.sweep.store import SweepStore, as_store, describe
from tlcoupling.sweep.table import frame, rows_of_cell

if TYPE_CHECKING:
    import pandas
    from torch.optim import Optimizer
    from transformers import TrainerCallback

    from tlcoupling.analysis import Analysis


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
        name: of the run in the store; runs of different weights in one store need different names. By default the
            model's.
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
        StoreError: the store cannot be written to.

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
        loggers: Sequence[Any] = (),
        tokenizer: Any | None = None,
        verbose: bool = True,
        **settings: Any,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError("every", every, "an int from 1")
        for logger in loggers:
            if not (hasattr(logger, "add_scalar") or hasattr(logger, "log")):
                raise ArgumentError("loggers", logger, "objects with log(dict, step=) or add_scalar(name, value, step)")
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
        self._store = None if store is None else as_store(store, create=True)
        self._rows: list[dict[str, Any]] = []  # without a store
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
        return None if _checked_step(step) % self.every else self.measure(step)

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
        step = _checked_step(step)
        with generators_kept():  # loggers draw from them too
            return self._measured(step)

    def _measured(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        rows: list[dict[str, Any]] = []
        failed = 0
        try:
            with evaluated(self.model) as measured:
                for key, tokens in self._prompts.items():
                    rows += self._prompt(measured, key, tokens, step)
                    failed += not rows or rows[-1]["status"] != "measured"
        except (ArgumentError, UnsupportedModelError):
            raise
        except Exception as error:  # training is worth more than its measurement
            warnings.warn(f"step {step} could not be measured: {describe(error)}", stacklevel=3)
            failed = len(self._prompts)
        seconds = time.perf_counter() - started
        self.seconds, self.calls = self.seconds + seconds, self.calls + 1
        means = {**_means(rows), "seconds": seconds}
        self._log(step, means)
        if self.verbose:
            self._print(step, means, failed)
        return means

    def _prompt(self, model: Any, key: str, tokens: Any, step: int) -> list[dict[str, Any]]:
        """Measure one prompt, keep the result or the error, and give its rows."""
        ids = tuple(tokens.tolist())
        cell = Cell(self.name, ids, self._settings, revision=f"step{step}", step=step)
        started = time.perf_counter()
        try:
            analysis: Analysis | Exception = analyze(
                model, tokens, **{**self._settings.arguments(), "prepend_bos": None}, attention=False
            )
        except (ArgumentError, UnsupportedModelError):
            raise
        except Exception as error:  # a run that diverges, or one that leaves no memory
            analysis = error
            warnings.warn(f"step {step}: prompt {key!r} could not be measured: {describe(error)}", stacklevel=4)
        failed = isinstance(analysis, Exception)
        rows = [] if failed else list(rows_of_cell(cell, analysis, self._facts))
        try:
            if self._store is None:
                self._rows += rows
            elif failed:
                self._store.fail(cell, analysis, time.perf_counter() - started)
            else:
                self._store.save(cell, analysis, self._facts)
        except TLCouplingError as error:
            warnings.warn(f"step {step}: prompt {key!r} is not in the store: {error}", stacklevel=4)
        return rows

    def _log(self, step: int, means: Mapping[str, float]) -> None:
        """Hand numbers to the loggers; a training run does not end for the failure of one."""
        shown = {f"tlcoupling/{name}": value for name, value in means.items()}
        for logger in self._loggers:
            try:
                if hasattr(logger, "add_scalar"):
                    for name, value in shown.items():
                        logger.add_scalar(name, value, step)
                else:
                    logger.log(shown, step=step)
            except Exception as error:  # of whatever kind a logger has
                warnings.warn(f"step {step} is not in {type(logger).__name__}: {describe(error)}", stacklevel=4)

    def _print(self, step: int, means: Mapping[str, float], failed: int) -> None:
        """One line for a person: coupling with its null and excess, linearity, growth, and the cost."""
        from tqdm.auto import tqdm

        shown = [
            f"{what} {value:.4f} (null {means[f'null/{what}']:.4f}, excess {means[f'excess/{what}']:+.4f})"
            for name, value in means.items()
            for quantity, _, what in [name.partition("/")]
            if quantity == "coupling"
        ]
        shown += [f"{label} {means[name]:.3g}" for label, name in (("LSS", "lss/block"), ("ED", "ed")) if name in means]
        if failed:
            shown.append(f"{failed} of {len(self._prompts)} prompts failed")
        share = self.seconds / (time.perf_counter() - self._started)
        cost = f"{means['seconds']:.2f} s, {share:.1%} of the run so far"
        tqdm.write(f"step {step}: {', '.join(shown)}; {cost}", file=sys.stderr)

    def table(self) -> pandas.DataFrame:
        """All that is measured of this run, as the table of a sweep: one row per step, prompt, sublayer and K.

        With a store, steps of earlier calls under the same name are in it.
        """
        if self._store is None:
            return frame(self._rows)
        table = self._store.table().sort_values(["step", "prompt_id"])
        return table.loc[table["model"] == self.name].reset_index(drop=True)

    def as_trainer_callback(self) -> TrainerCallback:
        """A callback for a HuggingFace ``Trainer``; in distributed training its first process measures."""
        from transformers import TrainerCallback

        monitor = self

        class MonitorCallback(TrainerCallback):
            """Calls the monitor at the beginning and after every optimiser step."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                trained = unwrapped(kwargs.get("model", monitor.model))
                if trained is not unwrapped(monitor.model):
                    raise ArgumentError("model", type(trained).__name__, "the model that the Trainer trains")
                self.on_step_end(args, state, control)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    monitor(state.global_step)

        return MonitorCallback()

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
        from torch.optim.optimizer import register_optimizer_step_post_hook

        step = start

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal step
            own = {id(parameter) for parameter in unwrapped(self.model).parameters()}
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                step += 1
                self(step)

        self(start)
        handle = register_optimizer_step_post_hook(after)
        try:
            yield self
        finally:
            handle.remove()
        if step == start:
            warnings.warn("no optimiser of the monitored model's parameters made a step", stacklevel=3)


def _checked_step(step: Any) -> int:
    """A step as an int.

    Raises:
        ArgumentError: it is none, or below zero.
    """
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0 or isinstance(step, bool):
        raise ArgumentError("step", step, "an int from 0")
    return number


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


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over prompts by name; of prompts where a number is undefined, NaN."""
    values: dict[str, list[float]] = {}
    for row in rows:
        names = {f"{name}/{row['sublayer']}/k{row['k_asked']}": name for name in ("coupling", "null", "excess")}
        names |= {f"lss/{row['sublayer']}": "lss", "ed": "ed", "rate": "rate"}
        for name, column in names.items():
            values.setdefault(name, []).append(row[column])
    return {name: sum(found) / len(found) for name, found in values.items()}
