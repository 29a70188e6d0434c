"""Booting a model that is already in hand, without asking a model hub anything."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def answered_locally(hf_model: Any, tokenizer: Any) -> Iterator[None]:
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
def offline() -> Iterator[None]:
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
