"""The hook points of a model by name, also where another module stands in the place of one.

SAELens puts an autoencoder there: what it returns flows on. TransformerLens then no longer lists the name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

from torch import Tensor, nn


class Splice:
    """A module in the place of a hook point, with the methods of a hook point that this library calls.

    Hooks see what the module returns. With ``prepend`` they see what it gets, and cannot change it.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        """Keep the module and its place in the model; no hook is attached."""
        self.name, self.module = name, module
        self._handles: list[Any] = []

    def __call__(self, activation: Tensor) -> Tensor:
        """Run the module."""
        return self.module(activation)

    def add_hook(self, hook: Callable[..., Tensor | None], dir: str, level: int, prepend: bool) -> None:
        """Attach a forward hook ``hook(tensor, hook=point)``."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            hook(args[0], hook=self)

        def behind(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return hook(output, hook=self)

        if prepend:
            self._handles.append(self.module.register_forward_pre_hook(before))
        else:
            self._handles.append(self.module.register_forward_hook(behind))

    def remove_hooks(self, dir: str, level: int) -> None:
        """Remove the hooks that ``add_hook`` attached."""
        while self._handles:
            self._handles.pop().remove()


def hook_points(model: Any) -> dict[str, Any]:
    """Return the hook points of a model by TransformerLens's names, aliases included.

    Returns:
        Each name's ``HookPoint``, or a ``Splice`` where another module stands in its place. Names of one point share
        one object.
    """
    points = dict(model.hook_dict)
    add_aliases = getattr(model, "_add_aliases_to_hooks", None)
    if add_aliases is not None and "blocks.0.hook_resid_pre" not in points:
        add_aliases(points)  # a bridge of SAELens lists none
    for name, module in _spliced(model):
        before, splice = points.get(name, module), Splice(name, module)
        points.update({each: splice for each, point in points.items() if point is before or point is module})
        points[name] = splice
    # an alias keeps a point after another has replaced it under its own name
    return {name: points.get(getattr(point, "name", None), point) for name, point in points.items()}


def in_place(model: Any, point: Any) -> bool:
    """Return whether a model still runs a point: attaching or detaching an autoencoder puts another in its place."""
    try:
        now = reduce(getattr, point.name.split("."), model)
    except AttributeError:  # SAELens leaves points without a full name behind: read them again
        return False
    return now is (point.module if isinstance(point, Splice) else point)


def _spliced(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Go through the modules that are named as hook points and are none."""
    from transformer_lens.hook_points import HookPoint

    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        prefix, parent = waiting.pop()
        for name, child in parent._modules.items():
            if child is None or isinstance(child, HookPoint) or id(child) in seen:
                continue
            seen.add(id(child))
            if name.startswith("hook_"):
                yield prefix + name, child
            elif name != "original_model":
                waiting.append((f"{prefix}{name}.", child))
