"""Linearity and growth of your own forward pass, without a cache.

A ``TrajectoryRecorder`` supplies hooks. It holds the stream of one layer at a time, running sums per token for each
path, and the norms.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import MissingHookError, TLCouplingError, UnsupportedModelError
from tlcoupling.forward.cache import without_batch
from tlcoupling.forward.hooked import model_name_of, require_supported
from tlcoupling.forward.split import block_hook, splits_of_model, topology_of
from tlcoupling.forward.stream import (
    IDENTITY_TOLERANCE,
    mid_is_another,
    not_finite,
    relative_gap,
    writes_do_not_add_up,
)
from tlcoupling.precision import full_precision
from tlcoupling.results.base import Provenance
from tlcoupling.trajectory.growth import Growth, growth_of_norms
from tlcoupling.trajectory.linearity import Linearity, length, linearity_of_paths, make_paths, walk


class TrajectoryRecorder:
    """Hooks that measure linearity and growth of a run, without storing activations of all layers.

    The hooks read and never edit. Put them after your own (``[*mine, *recorder.fwd_hooks]``) to measure the edited
    stream. Each new run starts over. Numbers and checks are those of ``tlc.linearity`` and ``tlc.growth`` on a cache:
    the writes must add up to the stream, so steer at ``hook_resid_pre`` or at a write.

    Memory: the norms, ``[2 or 3 x layer, pos]``, and about a dozen tensors ``[pos, d_model]``.

    Args:
        model: the model to record, in eval mode.

    Raises:
        UnsupportedModelError: see ``trace``.

    Example:
        >>> recorder = tlc.TrajectoryRecorder(model)  # doctest: +SKIP
        >>> loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=recorder.fwd_hooks)  # doctest: +SKIP
        >>> recorder.linearity().path("block"), recorder.growth().expodistance  # doctest: +SKIP
    """

    def __init__(self, model: Any) -> None:
        """Prepare for a run; no hook is attached."""
        require_supported(model)
        self._splits = splits_of_model(model)
        self._n_layers, self._topology = len(self._splits), topology_of(self._splits)
        self._model_name = model_name_of(model)
        self._start()
        self._problem = MissingHookError(
            "the recorder has seen no run: give its fwd_hooks to model.run_with_hooks first"
        )

    def __repr__(self) -> str:
        """One line."""
        state = "one run recorded" if self._done else "nothing recorded"
        return f"TrajectoryRecorder({self._model_name}: {self._n_layers} {self._topology} blocks, {state})"

    @property
    def fwd_hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """Return pairs (hook name, function) for ``model.run_with_hooks`` or ``model.hooks``, to put after your own."""
        return [
            (block_hook(layer, name), self._reader(layer, name))
            for layer in range(self._n_layers)
            for name in self._names(layer)
        ]

    def _names(self, layer: int) -> list[str]:
        """The hook points of a layer that are read, in the order in which they are called."""
        writes = [part.write for part in self._splits[layer].parts]
        if self._topology == "sequential":
            writes.insert(1, "hook_resid_mid")
        return ["hook_resid_pre", *writes, "hook_resid_post"]

    @full_precision()
    def linearity(self) -> Linearity:
        """Return how straight the token trajectories of the last run were.

        Raises:
            MissingHookError: no run, or an interrupted one.
            NonFiniteActivationError, ResidualIdentityError: see ``tlc.linearity``.

        Warns:
            UserWarning: as in ``tlc.linearity``.
        """
        self._require_run()
        return linearity_of_paths(self._paths, self._provenance(), self._tokens)

    @full_precision()
    def growth(self) -> Growth:
        """Return how the residual norms of the last run grew.

        Raises:
            MissingHookError, NonFiniteActivationError, ResidualIdentityError: see ``linearity``.

        Warns:
            UserWarning: as in ``tlc.growth``.
        """
        self._require_run()
        between = None
        if self._topology == "sequential":
            between = torch.stack(self._mid_norms), torch.stack(self._written_norms)
        return growth_of_norms(torch.stack(self._norms), between, self._provenance(), self._tokens)

    def _require_run(self) -> None:
        if self._problem is not None:
            raise self._problem
        if not self._done:
            raise MissingHookError(
                f"the recorded run stopped in block {self._layer}: the recorder needs a whole pass, up to "
                f"{block_hook(self._n_layers - 1, 'hook_resid_post')}"
            )

    def _provenance(self) -> Provenance:
        return Provenance(model_name=self._model_name, seconds=self._seconds)

    @property
    def _tokens(self) -> tuple[str, ...]:
        return tuple(str(pos) for pos in range(len(self._norms[0])))

    def _reader(self, layer: int, name: str) -> Callable[..., None]:
        @full_precision()
        def read(activation: Tensor, hook: Any) -> None:
            if (layer, name) == (0, "hook_resid_pre"):
                self._start()
            if self._problem is not None:
                return
            self._layer = layer
            try:
                self._tolerance = _tolerance(activation)
                row = without_batch(activation.detach(), block_hook(layer, name))
                # a copy, since a later hook may edit it in place
                row = row.clone() if row.dtype == torch.float64 else row.to(torch.float32, copy=True)
                self._read(layer, name, row.to(self._device or row.device))
            except TLCouplingError as problem:  # the user's run continues; asking for a result raises the error
                self._problem = problem

        return read

    def _start(self) -> None:
        self._problem: TLCouplingError | None = None
        self._done, self._layer, self._seconds, self._tolerance = False, 0, 0.0, 0.0
        self._device: torch.device | None = None
        self._started = time.perf_counter()
        self._paths = make_paths(self._splits)
        self._norms: list[Tensor] = []
        self._mid_norms: list[Tensor] = []
        self._written_norms: list[Tensor] = []
        self._held: dict[str, Tensor] = {}

    def _read(self, layer: int, name: str, row: Float[Tensor, "pos d"]) -> None:
        """Process one activation. A layer's activations are held until the next layer's input arrives."""
        if name == "hook_resid_pre":
            self._device = row.device
            self._step(layer, row)
            self._held = {}
        elif name == "hook_resid_mid":
            split = self._splits[layer]
            mid = self._held["hook_resid_pre"] + self._held[split.parts[0].write]
            gap = float(relative_gap(mid, row).max())
            if not gap <= self._tolerance:
                raise mid_is_another(layer, gap, self._tolerance, split, split.parts[1])
            self._mid_norms.append(length(mid))
        self._held[name] = row
        if name == "hook_resid_post":
            self._require_finite(layer + 1, row)
            split = self._splits[layer]
            total = self._held["hook_resid_pre"] + sum(self._held[part.write] for part in split.parts)
            gap = float(relative_gap(total, row).max())
            if split.parts and not gap <= self._tolerance:
                raise writes_do_not_add_up(layer, gap, self._tolerance, split)
            self._written_norms.append(length(row))
            if layer == self._n_layers - 1:
                self._step(self._n_layers, row)
                self._held, self._done = {}, True
                self._seconds = time.perf_counter() - self._started

    def _step(self, depth: int, stream: Float[Tensor, "pos d"]) -> None:
        """Add the steps of the layer that led to x^depth."""
        self._require_finite(depth, stream)
        self._norms.append(length(stream))
        if depth > 0:
            writes = {part.name: self._held[part.write] for part in self._splits[depth - 1].parts}
            walk(self._paths, self._held["hook_resid_pre"], stream, writes)

    def _require_finite(self, depth: int, stream: Float[Tensor, "pos d"]) -> None:
        finite = stream.isfinite().all(-1)
        if not finite.all():
            raise not_finite(depth, self._n_layers, int((~finite).nonzero()[0]))


def _tolerance(activation: Tensor) -> float:
    """Return the tolerance of the residual identity for an activation's dtype.

    Raises:
        UnsupportedModelError: the dtype is not supported.
    """
    if activation.dtype not in IDENTITY_TOLERANCE:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in IDENTITY_TOLERANCE)
        raise UnsupportedModelError(f"the run's activations are {activation.dtype}; allowed: {names}")
    return IDENTITY_TOLERANCE[activation.dtype]
