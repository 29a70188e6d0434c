"""Devices that are not there: tensors that say they lie on ``cpu:1``, and refuse to meet those of another device.

The machines of CI have one device, on which a mix-up of devices goes unseen. A tensor of a simulated device holds one
of the CPU; every operation on it is done there, after it has been refused where a real accelerator would refuse it.
``MEASUREMENTS`` are what is measured on such devices, and on a real one (``test_on_device``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tlcoupling as tlc

HOST = torch.device("cpu")
DEVICES = (torch.device("cpu:1"), torch.device("cpu:2"))

_aten = torch.ops.aten
# What copies from one device to another, or takes indices that lie on the host.
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}
_TAKES_INDICES = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}
_PRODUCTS = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten.baddbmm.default,
    _aten.mv.default,
    _aten.dot.default,
    _aten.addmv.default,
}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of several devices."""


@dataclass
class Ledger:
    """What was done where.

    Attributes:
        products: for each product of matrices, where it was done.
    """

    products: list[torch.device] = field(default_factory=list)


_ledgers: list[Ledger] = []


class Placed(Tensor):
    """A tensor on a simulated device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        """Wrap a tensor of the host."""
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """As of a real accelerator: by way of the host."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as of a real accelerator."""
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        return self.detach().cpu().numpy()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """The tensor inside and its device."""
        return f"Placed({self.inner!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it on the host, and put the result where it belongs."""
        return _run(func, args, kwargs or {})


class _Host(TorchDispatchMode):
    """Operations on tensors of the host alone: those that make something on a simulated device, or copy to one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Tensors of given numbers, which PyTorch makes without any dispatch where the device is one of the CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device = kwargs["device"]
            return func(*args, **{**kwargs, "device": None}).to(device)
        return func(*args, **kwargs)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [*_tensors_in(args), *_tensors_in(kwargs.values())]
    target = kwargs.get("device")
    placed = [tensor for tensor in tensors if isinstance(tensor, Placed)]
    if not placed and (target is None or torch.device(target) not in DEVICES):
        shapes_alone = any(tensor.is_meta for tensor in tensors)  # the count of the work, which has no numbers
        for ledger in _ledgers if func in _PRODUCTS and not shapes_alone else ():
            ledger.products.append(HOST)
        return func(*args, **kwargs)
    here = _place_of(func, args, tensors)
    if target is not None:
        here = torch.device(target)
        kwargs = {**kwargs, "device": here if here.type == "meta" else HOST}
    for ledger in _ledgers if func in _PRODUCTS else ():
        ledger.products.append(here)

    def inner(tensor: Tensor) -> Tensor:
        return tensor.inner if isinstance(tensor, Placed) else tensor

    out = func(*_mapped(args, inner), **_mapped(kwargs, inner))
    if here not in DEVICES:
        return out
    same = {id(tensor.inner): tensor for tensor in placed}  # an operation in place gives back what it was given
    return _mapped(out, lambda tensor: same[id(tensor)] if id(tensor) in same else Placed(tensor, here))


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among the arguments of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A function of all tensors in tuples, lists and dictionaries (torch's own pytrees take most of the time here)."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, function) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, function) for key, item in value.items()}
    return value


def _place_of(func: Any, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> torch.device:
    """Where an operation is done.

    Raises:
        MixedDevicesError: its operands lie on several devices; numbers of the host may meet any, as in PyTorch.
    """
    if func in _COPIES:
        return tensors[0].device
    counted = [args[0]] if func in _TAKES_INDICES else tensors
    if func in _TAKES_INDICES:
        counted += [index for index in _tensors_in(args[1]) if index.device != HOST]
        counted += _tensors_in(args[2:])
    devices = {tensor.device for tensor in counted}
    if len(devices) > 1:
        devices = {tensor.device for tensor in counted if tensor.ndim > 0 or tensor.device != HOST}
    if len(devices) > 1:
        shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in counted)
        raise MixedDevicesError(f"{func}: all tensors have to be on one device, and are {shapes}")
    return devices.pop() if devices else HOST


@contextmanager
def simulated_devices() -> Iterator[Ledger]:
    """Have simulated devices for a while; what is done on them is written down."""
    ledger = Ledger()
    _ledgers.append(ledger)
    try:
        with _Literals(), _Host():
            yield ledger
    finally:
        _ledgers.remove(ledger)


def move(module: nn.Module, device: torch.device, moved: dict[int, Tensor]) -> None:
    """Put a module's parameters and buffers on a device, in place; ``moved`` are those that lie elsewhere already."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None or isinstance(tensor, Placed):
                    continue
                if id(tensor) not in moved:
                    placed = Placed(tensor.detach().clone(), device)
                    moved[id(tensor)] = (
                        nn.Parameter(placed, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else placed
                    )
                table[name] = moved[id(tensor)]  # pyright: ignore[reportArgumentType]


def spread(model: Any) -> Any:
    """Spread a model's layers over the simulated devices, as a device map does.

    The embeddings and the first blocks lie on the first device, the others and what follows on the second; a hook moves
    what a module is called with to where the module lies.
    """
    half, moved = (len(model.blocks) + 1) // 2, {}
    # in this order: an output embedding that is tied to the input's lies where that one lies
    parts = [(part, DEVICES[0]) for name, part in model.named_children() if "embed" in name and name != "unembed"]
    parts += [(block, DEVICES[0 if layer < half else 1]) for layer, block in enumerate(model.blocks)]
    parts += [(part, DEVICES[1]) for name, part in model.named_children() if name in ("ln_final", "unembed")]
    for part, device in parts:
        tied = [moved[id(each)].device for each in part.parameters() if id(each) in moved]
        device = tied[0] if tied else device
        move(part, device, moved)
        part.register_forward_pre_hook(_bring_to(device), with_kwargs=True, prepend=True)
    move(model, DEVICES[0], moved)
    return model


def _bring_to(device: torch.device) -> Callable[..., Any]:
    """A pre-hook that moves all tensors of a call."""

    def bring(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _mapped((args, kwargs), lambda tensor: tensor.to(device))

    bring.__module__ = "accelerate.hooks"  # whose work it does: a hook of the user's own would ask for autograd
    return bring


MEASUREMENTS: dict[str, Callable[[tlc.Trace], Any]] = {
    "depth": lambda trace: tlc.depth_coupling(trace, 3),
    "depth, autograd": lambda trace: tlc.depth_coupling(trace, 3, engine="autograd"),
    "depth, krylov": lambda trace: tlc.depth_coupling(trace, 3, solver="krylov", sublayers="attn"),
    "tokens": lambda trace: tlc.token_coupling(trace, 3, tokens=[1, 6]),
    "tokens, other layers' bases": lambda trace: tlc.token_coupling(
        trace, 3, sublayers="mlp", tokens=[1, 6], basis_layers=[2, 0, 1]
    ),
    "context": lambda trace: tlc.context_coupling(trace, "dest", -1, 3, tokens=[0, 6]),
    "heads": lambda trace: tlc.head_coupling(trace, 3),
    "head alignment": lambda trace: tlc.head_alignment(trace, 3),
    "head steps": tlc.head_steps,
    "linearity": tlc.linearity,
    "growth": tlc.growth,
    "components": tlc.trajectory_components,
    "linearization gap": tlc.linearization_gap,
    "read directions": lambda trace: tlc.read_directions(trace, layer=2),
}


def require_same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """All tensors of a result are on the CPU, and equal; the same operations in the same order leave no rounding."""
    names = [each.name for each in fields(expected) if isinstance(getattr(expected, each.name), Tensor)]
    assert names
    for name in names:
        truth, ours = getattr(expected, name), getattr(found, name)
        assert ours.device == HOST and not isinstance(ours, Placed), f"{name} lies on {ours.device}"
        torch.testing.assert_close(
            ours, truth, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
