"""Measure a model in training: in eval mode, through TransformerLens, and restored afterwards.

A ``HookedTransformer`` or ``TransformerBridge`` is measured directly. A HuggingFace model is measured through a bridge
around a copy of its modules that shares the weights' memory, so its own modules are not touched. The bridge is rebuilt
each time: for some architectures (GPT-NeoX) it copies weights that it splits, and would show those of an earlier step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from tlcoupling.forward.bare import bridge_around, is_bare
from tlcoupling.forward.context import measuring, modules_of, set_training
from tlcoupling.forward.hooked import require_supported
from tlcoupling.models.generators import generators_kept


@contextmanager
def evaluated(model: Any) -> Iterator[Any]:
    """Yield the model in a state that can be measured, and restore it on exit.

    Module modes, gradients and random generators are restored. Inside, PyTorch is in its own state; see ``measuring``.

    Args:
        model: a ``HookedTransformer``, a ``TransformerBridge`` or a HuggingFace model; also in the wrappers of
            ``torch.compile`` and ``DistributedDataParallel``.

    Raises:
        UnsupportedModelError: another type, or a model that cannot be measured; see ``trace``.
        ArgumentError: the name of a model.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        require_supported(model)  # says what it is instead
    with generators_kept(), measuring(model), ExitStack() as stack:
        if is_bare(model):
            model = bridge_around(model)
        else:
            stack.enter_context(_eval_mode(model))
        require_supported(model)
        yield model


def unwrapped(model: Any) -> Any:
    """Return the model without the wrappers of data parallelism and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and restore each module's own mode on exit.

    Flags are set one by one. ``model.eval()`` would lose which parts were frozen in eval mode, and some libraries
    override it to change weights.
    """
    modes = [(module, module.training) for _, module in modules_of(model)]
    try:
        for module, _ in modes:
            set_training(module, False)
        yield
    finally:
        for module, mode in modes:
            set_training(module, mode)
