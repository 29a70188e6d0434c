"""A random model of the same architecture: coupling, linearity and growth before any training.

The architecture's own library initialises the weights. Shuffling trained weights would keep their outliers and norms,
which are themselves a result of training.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from tlcoupling.arguments import check_int
from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.block import Block, norms_are_folded, weight_of
from tlcoupling.forward.context import in_eval_mode, measured
from tlcoupling.forward.hooked import model_name_of, require_supported
from tlcoupling.forward.offline import booted
from tlcoupling.forward.offload import is_offloaded
from tlcoupling.forward.stacks import Stack
from tlcoupling.models.generators import generators_kept

_CENTERED = 1e-3  # largest |mean| / std of centred weights in half precision; random weights have 1 / sqrt(d)
_SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


def baseline_model(baseline: Any, model: Any) -> Any:
    """Return the model that stands beside another one: fresh weights of the same architecture for ``"fresh"``."""
    return random_baseline(model) if isinstance(baseline, str) and baseline == "fresh" else baseline


@measured
def random_baseline(model: Any, seed: int = 0) -> Any:
    """Return a model of the same architecture with freshly initialised weights.

    - A ``TransformerBridge`` of a HuggingFace model: the HuggingFace class on the same configuration (its
      ``_init_weights``), booted with the same tokenizer.
    - A native ``TransformerBridge``: ``boot_native`` on the same configuration.
    - A ``HookedTransformer``: a new one on a copy of the configuration (``init_mode``, ``initializer_range``).

    Device, dtype and attention implementation are copied. So is the weight processing that changes residual Jacobians:
    folded norms, centred writing weights, centred unembedding. The model and the global random state stay unchanged.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``, in eval mode; of a bare HuggingFace model, the bridge
            ``trace.model`` of a trace that was given its tokenizer.
        seed: seed of the weights.

    Returns:
        A model of the same class, in eval mode, whose name says that its weights are fresh.

    Raises:
        ArgumentError: ``seed`` is not an int from 0 on.
        UnsupportedModelError: the model cannot be measured, is spread over several devices, or was made by another
            loader than these three.

    Warns:
        UserWarning: the weights were processed, but the writing weights cannot be read.

    Example:
        >>> random = tlc.random_baseline(model)  # doctest: +SKIP
        >>> tlc.analyze(random, prompt).coupling.mean("excess")  # about 0  # doctest: +SKIP
    """
    require_supported(model)
    seed = check_int("seed", seed, 0)
    first = next(each for each in model.blocks.parameters() if each.is_floating_point())  # 4-bit weights are not
    if is_offloaded(model):
        raise UnsupportedModelError(
            "weights not in memory: accelerate offloads them, and those of a random baseline would all be in memory. "
            "Build one with the model's own code, and offload it the same way"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model is spread over {len(devices)} devices, which a random baseline would not reproduce: build one "
            "with the model's own code"
        )
    original = getattr(model, "original_model", None)
    with generators_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loaders gave the same warnings when the model was loaded
        torch.manual_seed(seed)
        if original is None:
            fresh = _hooked(model, seed, first)
        elif hasattr(getattr(original, "config", None), "to_dict"):
            fresh = _huggingface(model, original, first)
        else:
            fresh = _native(model, seed, first)
        whole: Any = fresh
        if isinstance(model, Stack):
            fresh = Stack(whole, model.name, model.other)
        _process_alike(model, fresh)
    fresh.cfg.model_name = f"{model_name_of(model)} (fresh weights, seed {seed})"
    fresh.cfg.default_prepend_bos = getattr(model.cfg, "default_prepend_bos", None)
    for switch in _SWITCHES:
        if getattr(model.cfg, switch, False) and not getattr(fresh.cfg, switch, False):
            getattr(fresh, f"set_{switch}")(True)
    if _processed(model) and _writing_weights(model) is None:
        warnings.warn(
            "the model's weights were processed, but its writing weights cannot be read: those of the random model "
            "are not centred, which shifts residual streams by their mean",
            stacklevel=3,
        )
    in_eval_mode(whole)
    return fresh


def _hooked(model: Any, seed: int, like: Tensor) -> Any:
    """Build a ``HookedTransformer`` of the same configuration that shares the tokenizer; none is loaded."""
    cfg = copy.deepcopy(model.cfg)
    cfg.init_weights, cfg.seed, cfg.tokenizer_name = True, seed, None
    cfg.device, cfg.dtype = str(like.device), like.dtype
    fresh = type(model)(cfg, tokenizer=None)
    fresh.tokenizer = model.tokenizer
    cfg.tokenizer_name = model.cfg.tokenizer_name
    cfg.seed, cfg.init_weights = model.cfg.seed, model.cfg.init_weights
    return fresh


def _huggingface(model: Any, original: Any, like: Tensor) -> Any:
    """Boot a bridge of a new HuggingFace model of the same class and configuration."""
    if getattr(model, "tokenizer", None) is None:
        raise UnsupportedModelError(
            "the model has no tokenizer: TransformerLens needs one to boot a HuggingFace model offline. Of a bare "
            "model, take trace.model of tlc.trace(model, prompt, tokenizer=tokenizer)"
        )
    fresh = type(original)(copy.deepcopy(original.config)).to(device=like.device, dtype=like.dtype).eval()
    tokenizer = copy.deepcopy(model.tokenizer)
    bridge = type(model.model if isinstance(model, Stack) else model)
    return booted(bridge, model.cfg.model_name, fresh, tokenizer, getattr(model, "processor", None))


def _native(model: Any, seed: int, like: Tensor) -> Any:
    """Boot a native bridge of the same configuration."""
    boot = getattr(type(model), "boot_native", None)
    if boot is None or getattr(model.cfg, "architecture", None) not in (None, "TransformerLensNative"):
        raise UnsupportedModelError(
            f"{type(model).__name__} wraps a {type(model.original_model).__name__}, which neither HuggingFace nor "
            "TransformerLens initialises: build a random one with the model's own code"
        )
    cfg = copy.deepcopy(model.cfg)
    cfg.init_weights, cfg.seed = True, seed
    fresh = boot(cfg, tokenizer=model.tokenizer, device=like.device, dtype=like.dtype, model_name=model.cfg.model_name)
    fresh.cfg.init_weights, fresh.cfg.seed = model.cfg.init_weights, model.cfg.seed
    return fresh


def _process_alike(model: Any, fresh: Any) -> None:
    """Apply the model's weight processing to the new weights."""
    writes = _writing_weights(model)
    center = writes is not None and all(_is_centered(weight) for weight in writes)
    unembed = weight_of(model, "W_U")  # None where a model ends without one (ViT)
    center_unembed = unembed is not None and _is_centered(unembed)
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
        # the gains of a new model's norms are 1, so there is nothing to fold
        fresh.process_weights_(fold_ln=False, center_writing_weights=center, center_unembed=center_unembed)


def _processed(model: Any) -> bool:
    """Return whether a bridge records that its weights were processed."""
    return bool(getattr(model, "_weights_processed", False))


def _writing_weights(model: Any) -> list[Tensor] | None:
    """Return the weights by which sublayers write, ``[..., d_model]``; None if a model does not expose them."""
    weights = []
    for layer in range(len(model.blocks)):
        for sublayer in Block.read(model, layer).sublayers.values():
            weight = sublayer.write_weight()
            if weight is None or weight.shape[-1] != model.cfg.d_model:
                return None
            weights.append(weight)
    return weights


def _is_centered(weight: Tensor) -> bool:
    weight = weight.detach().float()
    return bool(weight.mean(-1).abs().max() <= _CENTERED * weight.std())
