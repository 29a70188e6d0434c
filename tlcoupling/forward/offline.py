"""Boot a model without requests to a model hub, and without installing a package."""

from __future__ import annotations

import copy
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from tlcoupling.forward.context import in_eval_mode
from tlcoupling.forward.offload import device_of


def booted(
    bridge_class: Any, name: str, hf_model: Any, tokenizer: Any, processor: Any | None = None, **options: Any
) -> Any:
    """Return a bridge around a HuggingFace model on its own device and dtype, in eval mode, without a network.

    Args:
        bridge_class: TransformerLens's ``TransformerBridge``, or a class derived from it.
        name: the model's name on a hub, or that of its architecture.
        hf_model: the model.
        tokenizer: its tokenizer.
        processor: of a model of images or sound.
        **options: passed on to ``boot_transformers``.
    """
    first = next(hf_model.parameters())
    with offline(), answered_locally(hf_model, tokenizer, processor):
        bridge = bridge_class.boot_transformers(
            name, hf_model=hf_model, tokenizer=tokenizer, device=device_of(hf_model), dtype=first.dtype, **options
        )
    return in_eval_mode(bridge)


@contextmanager
def answered_locally(hf_model: Any, tokenizer: Any, processor: Any | None = None) -> Iterator[None]:
    """Answer TransformerLens's hub requests from the given model, tokenizer and processor.

    - Early 3.x releases look up the config by name: they get a copy of the model's own.
    - TransformerLens wants a tokenizer that adds BOS, and would otherwise load one by name. A temporary entry in
      ``init_kwargs`` declares that this one does. TransformerLens then finds by encoding that none is added, and
      ``to_tokens(prepend_bos=True)`` prepends the BOS token itself.
    - A model of images gets the given processor, None included. TransformerLens would look one up by name, and run pip
      to install torchvision if that fails.
    """
    from transformers import AutoConfig, AutoProcessor

    def own_config(*args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(hf_model.config)

    with (
        patch.object(AutoConfig, "from_pretrained", own_config),
        patch.object(AutoProcessor, "from_pretrained", lambda *args, **kwargs: processor),
        patch.dict(tokenizer.init_kwargs, add_bos_token=True),
    ):
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Make every request to the hub fail at once, without retries.

    huggingface_hub reads ``HF_HUB_OFFLINE`` at import, so setting the environment variable would be too late. This
    patches the constant, and the copy that transformers 4 keeps.
    """
    import huggingface_hub.constants
    import transformers.utils.hub

    with ExitStack() as stack:
        stack.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        if hasattr(transformers.utils.hub, "_is_offline_mode"):
            stack.enter_context(patch.object(transformers.utils.hub, "_is_offline_mode", True))
        yield


@contextmanager
def nothing_installed() -> Iterator[None]:
    """Refuse the ``pip install torchvision`` that TransformerLens runs if an image model's processor does not load.

    That command can replace torch by another build. TransformerLens takes the refusal for an installation that failed,
    and boots the model without its processor.
    """
    run = subprocess.check_call

    def refusing(command: Any, *args: Any, **kwargs: Any) -> int:
        if "install" not in command:
            return run(command, *args, **kwargs)
        warnings.warn(
            f"the model's image processor did not load. TransformerLens would run {' '.join(command)!r}, which can "
            "replace torch; tlcoupling does not let it. Text prompts need no processor; for images, install "
            "torchvision yourself",
            stacklevel=2,
        )
        raise subprocess.CalledProcessError(1, command)

    with patch.object(subprocess, "check_call", refusing):
        yield
