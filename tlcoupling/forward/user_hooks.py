"""Hooks of the user's: where they act, and how a trace keeps and attaches them.

The conventions are those of ``model.run_with_hooks(fwd_hooks=...)``: pairs of a hook point's name, or of a function
that picks names, and a function ``hook(activation, hook=hook_point)`` that may give another activation back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tlcoupling.errors import ArgumentError, HookError
from tlcoupling.forward.points import Splice
from tlcoupling.forward.split import block_hook

FwdHooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]


# Whose own hooks are part of what a model is: they capture and pass on, or move to another device.
_LIBRARIES = ("tlcoupling.", "transformer_lens.", "transformers.", "accelerate.")
_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# torch.nn.modules.module keeps the hooks of all modules (register_module_forward_hook) in tables of these names
_GLOBAL_TABLES = tuple(f"_global{name}" for name in _TABLES)


def has_user_hooks(points: Collection[Any]) -> bool:
    """Return whether anyone but us and TransformerLens (for OPT's MLP, which is no module) acts at the points.

    A module in the place of a point counts as a hook on it.
    """
    for point in points:
        if isinstance(point, Splice):
            return True
        if (point.fwd_hooks or point.bwd_hooks) and not all(map(_is_its_own, (*point.fwd_hooks, *point.bwd_hooks))):
            return True
    return has_module_hooks(points)


def has_module_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether anyone but the libraries has registered hooks of PyTorch's own kind on the modules themselves.

    TransformerLens puts the hooks of its points there too, by functions of its own.
    """
    for module in modules:
        tables = (each for table in _TABLES if (each := module.__dict__[table]))  # nearly all are empty
        if any(not _of_library(function) for table in tables for function in table.values()):
            return True
    return False


def has_global_hooks() -> bool:
    """Return whether anyone but the libraries has registered hooks on all modules of the process."""
    tables = (getattr(torch.nn.modules.module, name) for name in _GLOBAL_TABLES)
    return any(not _of_library(function) for table in tables for function in table.values())


def _is_its_own(handle: Any) -> bool:
    return handle.is_permanent and _of_library(getattr(handle, "user_hook", None))


def _of_library(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_LIBRARIES)


def points_of_block(points: Mapping[str, Any], layer: int) -> list[Any]:
    """All hook points of a block, and the next block's ``hook_resid_pre``: those that a run of the block passes."""
    return [
        point
        for name, point in points.items()
        if name.startswith(block_hook(layer, "")) or name == block_hook(layer + 1, "hook_resid_pre")
    ]


def hooked_layers(points: Mapping[str, Any], blocks: nn.ModuleList) -> frozenset[int]:
    """The blocks in whose Jacobians hooks of the user's act.

    The Jacobian of block l is that of x^{l+1} with respect to x^l. Hooks on its own ``hook_resid_pre`` make x^l, and
    act before it; those on its ``hook_resid_post`` and on the next ``hook_resid_pre`` make x^{l+1}, and act within it.
    Hooks outside the blocks (embeddings) move x^0 alone. Hooks of PyTorch's own kind act within the block whose modules
    they are registered on, and those of all modules within every block.
    """
    if has_global_hooks():
        return frozenset(range(len(blocks)))
    known = {id(point): point for point in points.values()}  # a point has several names
    hooked = {number for number, point in known.items() if has_user_hooks([point])}
    touched = {name: point for name, point in points.items() if id(point) in hooked}

    def acts(layer: int) -> bool:
        reads = points[block_hook(layer, "hook_resid_pre")]
        return any(point is not reads for point in points_of_block(touched, layer)) or has_module_hooks(
            module for module in blocks[layer].modules() if id(module) not in known
        )

    return frozenset(layer for layer in range(len(blocks)) if acts(layer))


def hooked_outside_blocks(model: Any, points: Mapping[str, Any]) -> bool:
    """Whether hooks of the user's act outside the blocks: on embeddings, final norm or logits."""
    modules = [part for name, part in model.named_children() if name not in ("blocks", "original_model")]
    outside = [point for name, point in points.items() if not name.startswith("blocks.")]
    return (
        has_user_hooks(outside)
        or has_module_hooks(each for part in modules for each in part.modules())
        or has_global_hooks()
    )


@dataclass(frozen=True, eq=False)
class UserHooks:
    """Forward hooks that a trace keeps, and attaches whenever it runs a part of the model.

    Attributes:
        model: the model.
        points: its hook points by name.
        hooks: pairs of a name or a filter and a function.
    """

    model: Any
    points: Mapping[str, Any] = field(repr=False)
    hooks: FwdHooks
    _fired: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, model: Any, points: Mapping[str, Any], fwd_hooks: FwdHooks) -> UserHooks:
        """Check the hooks.

        Raises:
            ArgumentError: no pair, no name and no filter, no function, or a name (or filter) of no hook point.
        """
        checked: list[tuple[Any, Callable[..., Any]]] = []
        kept = cls(model, points, checked)
        for pair in fwd_hooks:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and callable(pair[1])):
                raise ArgumentError("fwd_hooks", pair, "pairs (hook name or filter of names, function)")
            name, function = pair
            if isinstance(name, str):
                if name not in points:
                    raise ArgumentError("fwd_hooks", name, f"names of the model's hook points, such as {_near(name)}")
            elif not callable(name):
                raise ArgumentError("fwd_hooks", name, "a hook name or a function of a name in front of each function")
            elif not any(name(each) for each in points):
                raise ArgumentError("fwd_hooks", name, "filters that pick at least one of the model's hook points")
            checked.append((name, kept._checked(name, function)))
        return kept

    @property
    def names(self) -> tuple[str, ...]:
        """The names that they were given by, filters by their own."""
        return tuple(name if isinstance(name, str) else getattr(name, "__name__", "filter") for name, _ in self.hooks)

    @contextmanager
    def attached(self, layer: int | None = None) -> Iterator[None]:
        """Attach them for a while, as TransformerLens does: all, or those that a run of one block passes.

        Raises:
            ArgumentError: TransformerLens refuses a hook, because the point is switched off.
        """
        chosen = list(self.hooks)
        if layer is not None and chosen:
            passed = {id(point) for point in points_of_block(self.points, layer)}
            inside = {name for name, point in self.points.items() if id(point) in passed}
            chosen = [(_restrict(name, inside), hook) for name, hook in chosen if _picks(name, inside)]
        if not chosen:
            yield
            return
        context = self.model.hooks(fwd_hooks=chosen)
        try:
            context.__enter__()
        except (AssertionError, ValueError, KeyError) as error:
            raise ArgumentError("fwd_hooks", self.names, f"hook points that are switched on ({error})") from error
        try:
            yield
        finally:
            context.__exit__(None, None, None)

    def require_fired(self, prefix: str = "blocks.") -> None:
        """Check that each hook on a named point was called in a forward pass.

        Args:
            prefix: of the names that the pass reached; a trace's ends with the blocks.

        Raises:
            ArgumentError: one was not, so it would be left out without a word.
        """
        for name, _ in self.hooks:
            if isinstance(name, str) and name.startswith(prefix) and name not in self._fired:
                allowed = "hook points that the forward pass of this model calls; this one is switched off (a model's "
                raise ArgumentError("fwd_hooks", name, allowed + "set_use_...(True) switches some on) or unused")

    def _checked(self, name: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(activation: Any, hook: Any) -> Any:
            if isinstance(name, str):
                self._fired.add(name)
            shape = activation.shape if isinstance(activation, Tensor) else None
            result = function(activation, hook=hook)
            if result is None or shape is None:
                return result
            if not isinstance(result, Tensor):
                raise HookError(
                    f"the hook on {hook.name} gives back {type(result).__name__}; a tensor of the activation's shape "
                    f"{tuple(shape)} is needed, or None"
                )
            if result.shape != shape:
                raise HookError(
                    f"the hook on {hook.name} changes the shape from {tuple(shape)} to {tuple(result.shape)}; what it "
                    "gives back must keep it (`expand_as(activation)` where it is to be repeated)"
                )
            return result

        return checked


def _picks(name: str | Callable[[str], bool], inside: Collection[str]) -> bool:
    return name in inside if isinstance(name, str) else any(name(each) for each in inside)


def _restrict(name: str | Callable[[str], bool], inside: Collection[str]) -> str | Callable[[str], bool]:
    """The same name, or the filter kept to some names."""
    return name if isinstance(name, str) else lambda each: each in inside and name(each)


def _near(name: str) -> str:
    """A hook name like the one that was meant."""
    point = name.rpartition(".")[2]
    return repr(block_hook(0, point if point in ("hook_attn_out", "hook_mlp_out") else "hook_resid_pre"))
