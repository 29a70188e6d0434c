"""A random model of the same architecture: what coupling, linearity and growth are before any training.

Weights are drawn anew as the architecture's own library draws them, not shuffled: a shuffle keeps the trained
weights' outliers and norms, which are themselves a result of training.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tlcoupling.arguments import check_int
from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import norms_are_folded, require_supported
from tlcoupling.forward.weights import weight_of
from tlcoupling.models.generators import generators_kept
from tlcoupling.models.offline import answered_locally, offline

_CENTERED = 1e-3  # mean over standard deviation of what is centred in half precision; random weights have 1 / sqrt(d)
_SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@measured
def random_baseline(model: Any, seed: int = 0) -> Any:
    """The same architecture with fresh weights, drawn as its own library draws them.

    - a ``TransformerBridge`` of a HuggingFace model: the HuggingFace class on the same configuration (its
      ``_init_weights``), booted with the same tokenizer;
    - a native ``TransformerBridge``: ``boot_native`` on the same configuration;
    - a ``HookedTransformer``: a new one on a copy of the configuration (``init_mode``, ``initializer_range``).

    Device, dtype and attention implementation are the model's. So is the weight processing, as far as it changes a
    residual Jacobian: norms folded, writing weights centred, unembedding centred. Neither the model nor the state of
    any random generator is touched.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge`` of a decoder, in eval mode.
        seed: of the weights.

    Returns:
        A model of the same class, in eval mode.

    Raises:
        ArgumentError: a seed that is no int above or equal to zero.
        UnsupportedModelError: a model that cannot be measured, is spread over several devices, or was made by a
            loader that is not one of the three.

    Warns:
        UserWarning: weights were processed in a way that cannot be read off them.

    Example:
        >>> random = tlc.random_baseline(model)  # doctest: +SKIP
        >>> tlc.analyze(random, prompt).coupling.mean("excess")  # about 0  # doctest: +SKIP
    """
    require_supported(model)
    seed = check_int("seed", seed, 0)
    first = next(model.blocks.parameters())
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model is spread over {len(devices)} devices, and a random one would not be placed alike: build it "
            "by hand, as the model was built"
        )
    original = getattr(model, "original_model", None)
    with generators_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the loaders say of the model, they said when it was loaded
        torch.manual_seed(seed)
        if original is None:
            fresh = _hooked(model, seed, first)
        elif hasattr(getattr(original, "config", None), "to_dict"):
            fresh = _huggingface(model, original, first)
        else:
            fresh = _native(model, seed, first)
        _process_alike(model, fresh)
    fresh.cfg.default_prepend_bos = getattr(model.cfg, "default_prepend_bos", None)
    for switch in _SWITCHES:
        if getattr(model.cfg, switch, False) and not getattr(fresh.cfg, switch, False):
            getattr(fresh, f"set_{switch}")(True)
    if _processed(model) and _writing_weights(model) is None:
        warnings.warn(
            "the model's weights were processed, but its writing weights cannot be read: the random model's are not "
            "centred, which shifts residual streams by their mean",
            stacklevel=3,
        )
    return fresh.eval()


def _hooked(model: Any, seed: int, like: Tensor) -> Any:
    """A ``HookedTransformer`` of the same configuration; the tokenizer is shared, and none is looked for."""
    cfg = copy.deepcopy(model.cfg)
    cfg.init_weights, cfg.seed, cfg.tokenizer_name = True, seed, None
    cfg.device, cfg.dtype = str(like.device), like.dtype
    fresh = type(model)(cfg, tokenizer=None)
    fresh.tokenizer = model.tokenizer
    cfg.tokenizer_name = model.cfg.tokenizer_name
    cfg.seed, cfg.init_weights = model.cfg.seed, model.cfg.init_weights
    return fresh


def _huggingface(model: Any, original: Any, like: Tensor) -> Any:
    """A bridge of a new HuggingFace model of the same class and configuration."""
    if getattr(model, "tokenizer", None) is None:
        raise UnsupportedModelError(
            "the model has no tokenizer, without which TransformerLens boots no HuggingFace model offline"
        )
    fresh = type(original)(copy.deepcopy(original.config)).to(device=like.device, dtype=like.dtype).eval()
    tokenizer = copy.deepcopy(model.tokenizer)
    with offline(), answered_locally(fresh, tokenizer):
        return type(model).boot_transformers(
            model.cfg.model_name, hf_model=fresh, tokenizer=tokenizer, device=like.device, dtype=like.dtype
        )


def _native(model: Any, seed: int, like: Tensor) -> Any:
    """A native bridge of the same configuration."""
    boot = getattr(type(model), "boot_native", None)
    if boot is None or getattr(model.cfg, "architecture", None) not in (None, "TransformerLensNative"):
        raise UnsupportedModelError(
            f"{type(model).__name__} wraps a {type(model.original_model).__name__}, which neither HuggingFace nor "
            "TransformerLens initialises: build a random one as the model was built"
        )
    cfg = copy.deepcopy(model.cfg)
    cfg.init_weights, cfg.seed = True, seed
    fresh = boot(cfg, tokenizer=model.tokenizer, device=like.device, dtype=like.dtype, model_name=model.cfg.model_name)
    fresh.cfg.init_weights, fresh.cfg.seed = model.cfg.init_weights, model.cfg.seed
    return fresh


def _process_alike(model: Any, fresh: Any) -> None:
    """Do to the fresh weights what was done to the model's."""
    writes = _writing_weights(model)
    center = writes is not None and all(_is_centered(weight) for weight in writes)
    center_unembed = _is_centered(model.W_U)
    if hasattr(fresh, "enable_compatibility_mode"):
        if not getattr(model, "compatibility_mode", False):
            return
        processed = _processed(model)
        fresh.enable_compatibility_mode(
            disable_warnings=True,
            no_processing=not processed,
            fold_ln=norms_are_folded(model),
            center_writing_weights=center,
            center_unembed=center_unembed,
        )
    elif center or center_unembed:
        # a fresh model's norms have gains of 1, and are folded as they are where the configuration says so
        fresh.process_weights_(fold_ln=False, center_writing_weights=center, center_unembed=center_unembed)


def _processed(model: Any) -> bool:
    """Whether a bridge says that its weights were processed."""
    return bool(getattr(model, "_weights_processed", False))


def _writing_weights(model: Any) -> list[Tensor] | None:
    """What the sublayers write by, ``[..., d_model]``; None where a model has no such names for them."""
    found = []
    for block in model.blocks:
        for part, name in (("attn", "W_O"), ("mlp", "W_out")):
            module = getattr(block, part, None)
            if not isinstance(module, nn.Module):
                continue
            weight = weight_of(module, name)
            if weight is None or weight.shape[-1] != model.cfg.d_model:
                return None
            found.append(weight)
    return found


def _is_centered(weight: Tensor) -> bool:
    weight = weight.detach().float()
    return bool(weight.mean(-1).abs().max() <= _CENTERED * weight.std())
