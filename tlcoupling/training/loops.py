"""Hooks into training loops that you do not control: a HuggingFace Trainer, or any optimiser's steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tlcoupling.errors import ArgumentError
from tlcoupling.training.in_training import unwrapped

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainerCallback


def trainer_callback(model: Any, call: Callable[[int], object]) -> TrainerCallback:
    """Return a callback for a HuggingFace ``Trainer`` of this model; in distributed training its first process calls.

    Args:
        model: the model that the Trainer trains.
        call: function of the step, called at the beginning and after every optimiser step.
    """
    from transformers import TrainerCallback

    class MonitorCallback(TrainerCallback):
        """Calls at the beginning and after every optimiser step."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained = unwrapped(kwargs.get("model", model))
            if trained is not unwrapped(model):
                raise ArgumentError("model", type(trained).__name__, "the model that the Trainer trains")
            self.on_step_end(args, state, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                call(state.global_step)

    return MonitorCallback()


@contextmanager
def steps_counted(model: Any, call: Callable[[int], object], start: int) -> Iterator[None]:
    """Call a function on entry, and inside after every step of an optimiser with the model's parameters.

    Args:
        model: the trained model.
        call: function of the step.
        start: the step on entry.

    Warns:
        UserWarning: no such optimiser made a step.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    step = start

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal step
        own = {id(parameter) for parameter in unwrapped(model).parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            step += 1
            call(step)

    call(start)
    handle = register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        handle.remove()
    if step == start:
        warnings.warn("no optimiser of the monitored model's parameters made a step", stacklevel=5)
