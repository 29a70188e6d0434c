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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tlcoupling.coupling.arguments import KSpec
from tlcoupling.coupling.metric import Normalizer
from tlcoupling.errors import ArgumentError, EveryPromptFailedError, TLCouplingError, UnsupportedModelError
from tlcoupling.in_training import evaluated, unwrapped
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.journal import Journal, Snapshot
from tlcoupling.many import ManyAnalyses, analyze_many
from tlcoupling.prompt import named_prompts, to_tokens

if TYPE_CHECKING:
    import pandas
    from transformers import TrainerCallback


class TrainingMonitor:
    """Measures a model every N steps of its training, and leaves the training as it is.

    Call it in a loop, with the number of the step: ``monitor(step)``. In a HuggingFace ``Trainer`` it is a callback,
    ``Trainer(..., callbacks=[monitor.as_trainer_callback()])``. Around a training tool that has no callback, such as
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
        store: a file that each measurement is appended to, one line of JSON each; a later run with the same file goes
            on in it. None keeps them in memory.
        loggers: where means over prompts go besides: anything with ``log(dict, step=...)`` (a Weights & Biases run) or
            ``add_scalar(name, value, step)`` (TensorBoard's ``SummaryWriter``).
        k: as in ``depth_coupling``.
        tokens: positions that are measured.
        sublayers: as in ``depth_coupling``.
        normalizer: as in ``depth_coupling``.
        engine: as in ``depth_coupling``.
        tokenizer: a HuggingFace tokenizer for strings, where the model has none.
        verbose: print a line for each measurement, with what it cost, on stderr.

    Raises:
        ArgumentError: an argument out of range; of settings (``k``, ``tokens``, ...), at the first measurement.
        UnsupportedModelError: a model that cannot be measured.
        ResultFileError: ``store`` is not a file of a monitor.

    Example:
        >>> monitor = tlc.TrainingMonitor(model, prompts, every=100, store="run.jsonl")  # doctest: +SKIP
        >>> for step, batch in enumerate(batches):  # doctest: +SKIP
        ...     monitor(step)
        ...     train_on(batch)
        >>> monitor.to_dataframe()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        prompts: Mapping[str, Any] | Sequence[Any],
        *,
        every: int = 100,
        store: str | Path | None = None,
        loggers: Sequence[Any] = (),
        k: KSpec = 10,
        tokens: int | Sequence[int] | Literal["all"] = -1,
        sublayers: str | Sequence[str] | None = None,
        normalizer: Normalizer = "frobenius",
        engine: EngineName = "auto",
        tokenizer: Any | None = None,
        verbose: bool = True,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError("every", every, "an int from 1")
        for logger in loggers:
            if not (hasattr(logger, "add_scalar") or hasattr(logger, "log")):
                raise ArgumentError("loggers", logger, "objects with log(dict, step=) or add_scalar(name, value, step)")
        self.model, self.every, self.verbose = model, every, verbose
        self.seconds = 0.0
        self.calls = 0
        self._loggers = tuple(loggers)
        self._settings: dict[str, Any] = {
            "k": k,
            "tokens": tokens,
            "sublayers": sublayers,
            "normalizer": normalizer,
            "engine": engine,
        }
        with evaluated(model) as measured:
            self._prompts = {
                name: to_tokens(measured, _encoded(prompt, measured, tokenizer), None)[0].cpu()
                for name, prompt in named_prompts(prompts).items()
            }
        self._journal = Journal(store)
        self._started = time.perf_counter()

    def __repr__(self) -> str:
        """One line."""
        return (
            f"TrainingMonitor({type(unwrapped(self.model)).__name__}, {len(self._prompts)} prompts, every {self.every} "
            f"steps: {self.calls} measured, {self.seconds:.1f} s)"
        )

    def __call__(self, step: int) -> Snapshot | None:
        """Measure, if it is the turn of this step.

        Args:
            step: number of the training step.

        Returns:
            What was measured, None between the turns.

        Raises:
            ArgumentError: no step, or a setting that the model does not allow.
        """
        return None if _checked_step(step) % self.every else self.measure(step)

    def measure(self, step: int) -> Snapshot:
        """Measure now.

        Args:
            step: number of the training step that it is recorded under.

        Raises:
            ArgumentError: no step, or a setting that the model does not allow.

        Warns:
            A prompt could not be measured, a file not be written, or a logger failed.
        """
        step, started = _checked_step(step), time.perf_counter()
        values: dict[str, dict[str, float]] = {}
        try:
            with evaluated(self.model) as measured:
                runs = analyze_many(measured, self._prompts, **self._settings)
            values = _values(runs)
            errors = {name: why for name, why in zip(runs.names, runs.errors, strict=True) if why is not None}
        except Exception as error:  # training is worth more than its measurement
            cause = error.__cause__ if isinstance(error, EveryPromptFailedError) else error
            if isinstance(cause, (ArgumentError, UnsupportedModelError)):
                raise cause from None
            errors = dict.fromkeys(self._prompts, f"{type(cause).__name__}: {cause}")
            if cause is error:  # otherwise analyze_many has warned already
                warnings.warn(f"step {step} could not be measured: {error!r}", stacklevel=2)
        seconds = time.perf_counter() - started
        self.seconds, self.calls = self.seconds + seconds, self.calls + 1
        snapshot = Snapshot(step, seconds, values, errors)
        self._hand_out(snapshot)
        return snapshot

    def _hand_out(self, snapshot: Snapshot) -> None:
        """Write, log and print a measurement; a training run does not end for the failure of one of these."""
        try:
            self._journal.append(snapshot)
        except TLCouplingError as error:
            warnings.warn(f"step {snapshot.step} is not in the store: {error}", stacklevel=3)
        means = {f"tlcoupling/{name}": value for name, value in {**snapshot.mean(), "seconds": snapshot.seconds}.items()}
        for logger in self._loggers:
            try:
                if hasattr(logger, "add_scalar"):
                    for name, value in means.items():
                        logger.add_scalar(name, value, snapshot.step)
                else:
                    logger.log(means, step=snapshot.step)
            except Exception as error:  # of whatever kind a logger has
                warnings.warn(f"step {snapshot.step} is not in {type(logger).__name__}: {error!r}", stacklevel=3)
        if self.verbose:
            from tqdm.auto import tqdm

            elapsed = time.perf_counter() - self._started
            tqdm.write(f"{snapshot.line()}; {self.seconds / elapsed:.1%} of the run so far", file=sys.stderr)

    def snapshots(self) -> list[Snapshot]:
        """All measurements in the order of their steps, those of earlier runs in the same store included.

        Of a step that was measured again (a run taken up from a checkpoint) the last one counts.
        """
        return self._journal.read()

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per step and prompt: ``step``, ``prompt``, ``seconds``, and a column for each number measured."""
        import pandas as pd

        rows = [
            {"step": one.step, "prompt": prompt, "seconds": one.seconds, **values}
            for one in self.snapshots()
            for prompt, values in one.values.items()
        ]
        return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["step", "prompt", "seconds"])

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
            No such optimiser has made a step.
        """
        from torch.optim.optimizer import register_optimizer_step_post_hook

        step = start

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
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


def _encoded(prompt: Any, model: Any, tokenizer: Any | None) -> Any:
    """A string as token ids, by a tokenizer that was given; anything else as it is."""
    if not isinstance(prompt, str) or tokenizer is None:
        return prompt
    return tokenizer(prompt)["input_ids"]


def _values(runs: ManyAnalyses) -> dict[str, dict[str, float]]:
    """Of each prompt that was measured, the mean over its tokens of every number, by name."""
    found = {}
    for index in runs.prompt.unique().tolist():
        rows = runs.prompt == index

        def mean(values: Tensor, rows: Tensor = rows) -> Any:
            return values[rows].double().mean(0).tolist()

        values: dict[str, float] = {}
        for name in ("coupling", "null", "excess"):
            for sublayer, by_k in zip(runs.sublayers, mean(getattr(runs, name)), strict=True):
                values |= {f"{name}/{sublayer}/k{k}": value for k, value in zip(runs.ks, by_k, strict=True)}
        values |= {f"lss/{path}": value for path, value in zip(runs.paths, mean(runs.lss), strict=True)}
        values |= {"expodistance": mean(runs.expodistance), "rate": mean(runs.rate)}
        found[runs.names[index]] = values
    return found
