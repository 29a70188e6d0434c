"""Measure a model in training: in eval mode, through TransformerLens, and restored afterwards.

A ``HookedTransformer`` or ``TransformerBridge`` is measured directly. A HuggingFace model is measured through a bridge
around a copy of its modules that shares the weights' memory, so its own modules are not touched. The bridge is rebuilt
each time: for some architectures (GPT-NeoX) it copies weights that it splits, and would show those of an earlier step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

from torch import nn

from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.context import measuring, modules_of
from tlcoupling.forward.hooked import require_supported
from tlcoupling.models.generators import generators_kept
from tlcoupling.models.load import _transformer_bridge
from tlcoupling.models.offline import answered_locally, offline


@contextmanager
def evaluated(model: Any) -> Iterator[Any]:
    """Yield the model in a state that can be measured, and restore it on exit.

    Module modes, gradients and random generators are restored. Inside, PyTorch is in its own state; see ``measuring``.

    Args:
        model: a ``HookedTransformer``, a ``TransformerBridge`` or a HuggingFace model; also in the wrappers of
            ``torch.compile`` and ``DistributedDataParallel``.

    Raises:
        UnsupportedModelError: another type, or a model that cannot be measured; see ``trace``.
    """
    model = unwrapped(model)
    with generators_kept(), measuring(model), ExitStack() as stack:
        if _is_huggingface(model):
            model = _bridge_around(model)
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
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _is_huggingface(model: Any) -> bool:
    return not hasattr(model, "hook_dict") and hasattr(getattr(model, "config", None), "to_dict")


def _bridge_around(model: Any) -> Any:
    """Return a bridge on the weights of a HuggingFace model, in eval mode."""
    bridge_class = _transformer_bridge()
    name = type(model).__name__
    if bridge_class is None:
        raise UnsupportedModelError(
            f"{name} is a HuggingFace model: it is measured through a TransformerBridge, which transformer-lens has "
            f"from 3.0 on; installed is {version('transformer-lens')}. Train a HookedTransformer, or "
            "pip install 'transformer-lens>=3,<5'"
        )
    memo: dict[int, Any] = {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()}
    memo.update({id(one): one.detach() for one in model.buffers()})
    first, tokenizer = next(model.parameters()), _no_tokenizer()
    try:
        same = copy.deepcopy(model, memo).eval()
        same.__dict__.pop("forward", None)  # accelerate's mixed-precision wrapper
        same.config.architectures = [name]
        with warnings.catch_warnings(), offline(), answered_locally(same, tokenizer):
            warnings.simplefilter("ignore")
            bridge = bridge_class.boot_transformers(
                name, hf_model=same, tokenizer=tokenizer, device=first.device, dtype=first.dtype
            )
    except Exception as error:  # of any type: TransformerLens raises many for unknown architectures
        raise UnsupportedModelError(
            f"TransformerLens cannot wrap this {name} ({type(error).__name__}: {error}); allowed: a HuggingFace "
            "decoder that it supports, with all weights on this process"
        ) from error
    bridge.tokenizer = None
    return bridge.eval()


def _no_tokenizer() -> Any:
    """Return a placeholder tokenizer: without one, TransformerLens would look on a hub while booting."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>")),
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<end>",
        name_or_path="none",
    )
