"""The Jacobian lens of a corpus through a store: a file for each prompt, so that a killed run is resumed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcoupling.arguments import Indices, as_int, resolve_indices
from tlcoupling.errors import HookError, ResultFileError
from tlcoupling.forward.bare import hooked_model
from tlcoupling.forward.context import measured, modules_of
from tlcoupling.forward.inputs import read_inputs
from tlcoupling.forward.lifting import in_memory
from tlcoupling.forward.points import hook_points
from tlcoupling.forward.prompt import named_prompts
from tlcoupling.forward.trace import trace
from tlcoupling.forward.user_hooks import has_global_hooks, has_module_hooks, has_user_hooks
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.progress import ticking
from tlcoupling.slices.lens import JacobianLens, jacobian_lens
from tlcoupling.sweeps.cells import digest_of
from tlcoupling.sweeps.entries import read_lens
from tlcoupling.sweeps.store import SweepStore, as_store

LENS = 1  # increased when a change of the library changes a lens's numbers


def lens_sweep(
    model: Any,
    prompts: Mapping[str, Any] | Sequence[Any] | Tensor,
    store: SweepStore | str | Path,
    *,
    layers: Indices | None = None,
    skip_first_positions: int = 16,
    sketch: int | None = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    engine: EngineName = "auto",
    progress: bool | None = None,
) -> JacobianLens:
    """Return the Jacobian lens of a corpus, and keep that of each prompt in a store.

    A prompt's lens is written as soon as it is measured, atomically. A second run measures only the prompts that the
    store lacks. Several processes may share a store: give each its own prompts, then call this with all of them.
    ``SweepStore.add`` and ``tlcoupling merge`` join stores. A prompt is kept under the digest of its tokens, the
    settings, and the model's name and weights. Its file holds ``len(layers) * d_model ** 2`` numbers.

    Args:
        model: as in ``jacobian_lens``, without hooks of yours: a store cannot tell what they do.
        prompts: as in ``jacobian_lens``.
        store: a store, or its folder, created if missing. It may hold a sweep's cells too.
        layers: as in ``jacobian_lens``.
        skip_first_positions: as in ``jacobian_lens``.
        sketch: as in ``jacobian_lens``.
        seed: as in ``jacobian_lens``.
        prepend_bos: as in ``jacobian_lens``.
        engine: as in ``jacobian_lens``.
        progress: show a progress bar; None: on a terminal or in a notebook, once it takes two seconds.

    Raises:
        HookError: hooks act on the model.
        StoreError, ResultFileError: the store cannot be written to (such as a full disk); what it holds is kept.
        ArgumentError, UnsupportedModelError, DerivativeError: see ``jacobian_lens``; the prompts before are kept.

    Warns:
        UserWarning: a prompt's file was damaged, and the prompt measured again; the warning names both.

    Example:
        >>> lens = tlc.lens_sweep(model, texts, "results")  # doctest: +SKIP
    """
    named, store, model = named_prompts(prompts), as_store(store, create=True), hooked_model(model)
    if has_user_hooks(hook_points(model).values()) or has_module_hooks(model.modules()) or has_global_hooks():
        raise HookError("hooks act on this model, and a store cannot tell what they do: remove them")
    traced = trace(model, next(iter(named.values())), prepend_bos=prepend_bos)
    given = {"skip_first_positions": skip_first_positions, "sketch": sketch, "seed": seed, "engine": engine}
    settings = {
        "layers": resolve_indices("layers", range(traced.n_layers - 1) if layers is None else layers, traced.n_layers),
        **{name: value if (number := as_int(value)) is None else number for name, value in given.items()},
    }
    kept_under = {**settings, "seed": None if sketch is None else settings["seed"]}
    of_model = {"name": traced.model_name, "processing": traced.weight_processing, "weights": _weights(model)}

    def lenses() -> Iterator[JacobianLens]:
        for name in ticking(list(named), "prompts", progress):
            inputs = read_inputs(model, named[name], prepend_bos)
            prompt = _digest([("input", inputs.tensor), *sorted(inputs.options.items())])
            record = {"lens": LENS, "model": of_model, "settings": kept_under, "prompt": prompt}
            path = store.lens_path(digest_of(record))
            if path.exists():
                try:
                    yield read_lens(path)[0]
                    continue
                except ResultFileError as error:
                    warnings.warn(f"the prompt {name!r} is measured again: {error}", stacklevel=4)
            lens = jacobian_lens(model, {name: named[name]}, prepend_bos=prepend_bos, progress=False, **settings)
            store.save_lens(lens, record)
            yield lens

    return JacobianLens.merge(lenses())


@measured
def _weights(model: Any) -> str:
    """Return the digest of a model's weights and buffers; those that are offloaded are read a module at a time."""
    parts = []
    for name, module in modules_of(model):
        if module._parameters or module._buffers:
            with in_memory(module):
                own = chain(module._parameters.items(), module._buffers.items())
                parts.append((name, _digest([(each, tensor) for each, tensor in own if tensor is not None])))
    return digest_of(parts)


def _digest(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """Return 32 hexadecimal digits that identify tensors, their names, types and shapes."""
    whole = hashlib.sha256()
    for name, tensor in tensors:
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()[:32]
