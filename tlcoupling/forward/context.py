"""The one context in which the library touches a model.

Everything that runs a model, or differentiates what it ran, does so within ``measuring(model)``: in PyTorch's own state
(``full_precision``), and alone among the threads that measure this model. ``require_own_state`` refuses a model whose
own state makes its passes something else than a function that can be differentiated.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, TypeVar, cast

from torch import nn

from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.offload import offloading
from tlcoupling.precision import full_precision

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
ModelT = TypeVar("ModelT", bound=nn.Module)

_locks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def measuring(source: Any) -> Iterator[None]:
    """Compute with a model for a while, and leave every setting as it was, also after an error.

    Within, PyTorch is in its own state (see ``full_precision``). Other threads that measure the same model, or another
    bridge around the same HuggingFace model, wait; those that measure other models do not. Entering it again within
    costs a few microseconds.

    Args:
        source: a model, or a ``Trace`` (or anything else with a ``model``) of it.

    Raises:
        UnsupportedModelError: a tensor made under ``torch.inference_mode`` takes part in a derivative.
    """
    with _lock_of(source), full_precision():
        try:
            yield
        except RuntimeError as error:
            if "Inference tensor" not in str(error):
                raise
            raise UnsupportedModelError(
                "a tensor that was made under torch.inference_mode() takes part in a derivative, which PyTorch does "
                "not allow: a hook brought it in, or the model keeps it from an earlier pass. Clone it outside of "
                "inference mode"
            ) from error


def measured(function: FunctionT) -> FunctionT:
    """Run a function within ``measuring`` its argument ``model`` or ``trace``, or its trace, for a trace's methods."""
    names = list(inspect.signature(function).parameters)
    index = next(index for index, name in enumerate(names) if name in ("self", "model", "trace"))

    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        with measuring(args[index] if len(args) > index else kwargs.get(names[index])):
            return function(*args, **kwargs)

    return cast(FunctionT, within)


def _lock_of(source: Any) -> AbstractContextManager[Any]:
    """The lock of a model; of the HuggingFace model where bridges share one."""
    model = source if isinstance(source, nn.Module) else getattr(source, "model", None)
    owner = getattr(model, "original_model", None) or model
    if not isinstance(owner, nn.Module):
        return threading.RLock()  # nothing to share: the call is going to refuse it
    with _locks_lock:
        return _locks.setdefault(owner, threading.RLock())


def modules_of(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Go through all modules of a model by name, once each: a bridge does not list those of the model it wraps."""
    seen: set[nn.Module] = set()
    yield from model.named_modules(seen)
    original = getattr(model, "original_model", None)
    if isinstance(original, nn.Module):
        yield from original.named_modules(seen, "original_model")


def in_eval_mode(model: ModelT) -> ModelT:
    """Put every module of a model into eval mode, and return the model.

    ``model.eval()`` alone leaves a bridge's own modules as they are on transformer-lens 3.0 to 3.6: there they pass the
    flag on to the module that they wrap, and do not set it themselves.
    """
    model.eval()
    for _, module in modules_of(model):
        set_training(module, False)
    return model


def set_training(module: nn.Module, training: bool) -> None:
    """Set the flag of one module itself (see ``in_eval_mode``)."""
    object.__setattr__(module, "training", training)


def in_training_mode(model: Any) -> bool:
    """Whether any module of a model is in training mode."""
    return any(module.training for _, module in modules_of(model))


def require_own_state(model: Any, in_training: bool = False) -> None:
    """Refuse a model whose forward pass is not a fixed function that can be differentiated.

    Args:
        model: the model.
        in_training: allow training mode.

    Raises:
        UnsupportedModelError: a module in training mode; weights that are not in memory, or were made under
            ``torch.inference_mode``; the message names the first.
    """
    for where, module in modules_of(model):
        # SAELens leaves fresh modules in the places of hook points, in training mode; it does nothing to them
        if module.training and not in_training and not where.rpartition(".")[2].startswith("hook_"):
            also = " and model.original_model.eval()" if hasattr(model, "original_model") else ""
            stuck = ""
            if not getattr(getattr(module, "original_component", None), "training", True):
                stuck = (
                    ". On transformer-lens 3.0 to 3.6 that does not reach a bridge's own modules: load the model with "
                    "tlc.load_model, pass the HuggingFace model itself, or pip install 'transformer-lens>=3.7'"
                )
            raise UnsupportedModelError(
                f"training mode: {where or 'the model'} is in training mode, where dropout makes every forward pass "
                f"another function: call model.eval(){also} first{stuck}"
            )
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is None:
                continue
            if hasattr(tensor, "device_mesh"):
                raise UnsupportedModelError(
                    f"sharded weights: {where}.{name} is a DTensor, of which this process holds a part. Load the whole "
                    "model in one process"
                )
            if not (tensor.is_meta or tensor.is_inference()):
                continue
            if tensor.is_meta:
                if offloading(module, name) is not None:
                    continue
                raise UnsupportedModelError(
                    f"weights not in memory: {where}.{name} lies on the device 'meta', so it has no numbers, and no "
                    "hook of accelerate on its module brings them: it was never loaded, or made of offloaded weights "
                    "(a bridge splits those of queries, keys and values), or brought by the hook of a module around "
                    "(preload_module_classes). Load the whole model onto devices, in bfloat16 where memory is short"
                )
            raise UnsupportedModelError(
                f"inference tensors: {where}.{name} was made under torch.inference_mode(), so nothing can be "
                "differentiated through it. Load the model outside of it, or take copy.deepcopy(model) there"
            )
