"""Bare HuggingFace models: a bridge around a copy of their modules that shares the weights' memory.

The model's own modules are not touched. The bridge is rebuilt each time: for some architectures (GPT-NeoX) it copies
weights that it splits, and would show those of an earlier training step.
"""

from __future__ import annotations

import copy
import warnings
from importlib.metadata import version
from typing import Any

from torch import nn

from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.forward.context import require_own_state
from tlcoupling.forward.offline import booted
from tlcoupling.forward.offload import hooks_of
from tlcoupling.forward.quantised import quantisation_of


def hooked_model(model: Any, tokenizer: Any = None) -> Any:
    """Return a model that can be hooked: the model itself, or a bridge around a bare HuggingFace model.

    Args:
        model: a ``HookedTransformer``, a ``TransformerBridge``, a HuggingFace model, or one that PEFT has wrapped, in
            eval mode.
        tokenizer: of a bare model, for prompts that are text.

    Raises:
        ArgumentError: a tokenizer for a model that has its own.
        UnsupportedModelError: TransformerLens cannot wrap the model, or it is in training mode.
    """
    if not is_bare(model):
        if tokenizer is not None:
            raise ArgumentError("tokenizer", type(tokenizer).__name__, "None: this model has its own, model.tokenizer")
        return model
    require_own_state(model)
    return bridge_around(model, tokenizer)


def is_bare(model: Any) -> bool:
    """Return whether a model is one of HuggingFace's, or PEFT's, which TransformerLens has not wrapped."""
    return not hasattr(model, "hook_dict") and hasattr(getattr(model, "config", None), "to_dict")


def bridge_around(model: Any, tokenizer: Any = None) -> Any:
    """Return a bridge on the weights of a bare model, in eval mode, with eager attention.

    Raises:
        UnsupportedModelError: TransformerLens cannot wrap the model, as where its weights are packed; PEFT has learned
            a prompt, which is no module.
    """
    model = _without_peft(model)
    name = type(model).__name__
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise UnsupportedModelError(
            f"not a hooked model: {name} is a HuggingFace model, which is measured through a TransformerBridge. "
            f"transformer-lens has it from 3.0 on; installed is {version('transformer-lens')}. Pass a "
            "HookedTransformer, or pip install 'transformer-lens>=3,<5'"
        ) from error
    memo: dict[int, Any] = {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()}
    memo.update({id(one): one.detach() for one in model.buffers()})
    # accelerate's hooks hold, or know, all weights that they bring
    memo.update({id(hook): copy.copy(hook) for part in model.modules() for hook in hooks_of(part)})
    own = _no_tokenizer() if tokenizer is None else copy.deepcopy(tokenizer)
    try:
        same = copy.deepcopy(model, memo).eval()
        same.__dict__.pop("forward", None)  # accelerate's mixed-precision wrapper
        same.config.architectures = [name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bridge = booted(TransformerBridge, name, same, own)
    except Exception as error:  # of any type: TransformerLens raises many for unknown architectures
        quantisation_of(model, "")
        raise UnsupportedModelError(
            f"not a hooked model: TransformerLens cannot wrap this {name} ({type(error).__name__}: {error}); allowed: "
            "a HuggingFace model of an architecture that it supports, with all weights on this process"
        ) from error
    if tokenizer is None:
        bridge.tokenizer = None
    return bridge


def _without_peft(model: Any) -> Any:
    """Return the HuggingFace model inside PEFT's wrapper, its adapters in place.

    Raises:
        UnsupportedModelError: what was learned is no part of its modules.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(
            f"not a hooked model: {type(model).__name__} has learned a prompt, which its base model does not hold. "
            "Adapters within modules (LoRA) can be measured"
        )
    return model.get_base_model()


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
