"""Random edits of small models, each with the verdict that is expected of the library beforehand: for ``attack.py``.

An edit is drawn by its kind: which model, where in it, and what is done to it. It changes the model (a module, a hook,
the weights), PyTorch's own state around the measurement, or the input.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from architectures import boot
from cases import CASES, Case, part
from packed import packed_and_plain
from torch import Tensor, nn
from torch_settings import default_dtype, matmul_precision

import tlcoupling as tlc

Verdict = Literal["measured", "refused", "said"]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Hooks = list[tuple[str, Callable[..., Any]]]

PACKED = importlib.util.find_spec("bitsandbytes") is not None  # which packs weights in 4 bits


def _of_architecture(name: str) -> Callable[[torch.dtype], Any]:
    return lambda dtype: boot(name).to(dtype)


def _packed(dtype: torch.dtype) -> Any:
    """In float32 a Llama in 4 bits, in float64 what its weights stand for."""
    packed, plain = packed_and_plain("nf4", on_avx512=False)
    return packed if dtype == torch.float32 else plain.to(dtype)


def _fresh_weights(name: str) -> Callable[[torch.dtype], Any]:
    """The baseline of a model."""
    return lambda dtype: tlc.random_baseline(next(case for case in CASES if case.name == name).build(dtype).eval())


BASELINES = ("bridge-llama", "bridge-gpt2", "bridge-gemma2")
MODELS = {
    case.name: case
    for case in (
        *CASES,
        Case("mamba", _of_architecture("MambaForCausalLM"), exact=False),
        Case("bert", _of_architecture("BertForMaskedLM"), exact=False),
        Case("llama-nf4", _packed, exact=False),
        *(Case(f"baseline of {name}", _fresh_weights(name), exact=False) for name in BASELINES),
    )
}
SEPARATE = ("bridge-llama", "bridge-gemma2", "bridge-qwen3", "bridge-mistral")  # a module for each projection
PLAIN = ("bridge-gpt2", "bridge-pythia", "native-layernorm")
DENSE = (*SEPARATE, *PLAIN, "bridge-mpt")
SEQUENTIAL = (*SEPARATE, "bridge-gpt2", "native-layernorm")
N_LAYERS, N_TOKENS, WIDTH = 3, 7, 32


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Leave the model as it is."""
    yield


@dataclass(frozen=True)
class Edit:
    """One edit of one small model.

    Attributes:
        kind: its kind, a row of the table.
        what: what is done, and where.
        expected: ``"measured"``; ``"refused"`` with a TLCouplingError; ``"said"``: measured with a warning that the
            number could not be checked.
        case: the model, by its name in ``cases``.
        layer: where the number is taken.
        change: puts the edit in force on a model. The differences are taken under it, too.
        hooks: the user's hooks, as ``fwd_hooks``.
        attached: whether these are attached by ``with model.hooks(...)`` around the measurement.
        setting: of PyTorch, around the measurement alone: what the model does is measured without it.
        dtype: of the weights.
        prompt: token ids, or text.
        src: the input position; any, where it is None.
        measure: ``"jacobians"``; ``"whole"`` for growth, linearity and coupling; ``"cache"`` for a trace of a cache;
            ``"held"`` for matrices of Jacobians that were made before ``after``.
        after: changes the model between the trace and the Jacobians.
        split: whether its blocks may be split into sublayers: False where their writes do not add up.
        meant: the token ids that the prompt stands for, where these are not the prompt itself.
    """

    kind: str
    what: str
    expected: Verdict
    case: str
    layer: int
    change: Callable[[Any], AbstractContextManager[None]] = unchanged
    hooks: Hooks = field(default_factory=list)
    attached: bool = False
    setting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    dtype: torch.dtype = torch.float64
    prompt: Any = None
    src: int | None = None
    measure: Literal["jacobians", "whole", "cache", "held"] = "jacobians"
    after: Callable[[Any], Any] | None = None
    split: bool = True
    meant: list[int] | None = None


@contextmanager
def _in_place(module: nn.Module, wrap: Wrap) -> Iterator[None]:
    """Replace a forward, and make sure that it is called: a bridge runs some parts by code of its own."""
    call, called = wrap(module.forward), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return call(*args, **kwargs)

    module.__dict__["forward"] = counted
    yield
    assert called, "the edit was never in force"


def replaced(layer: int, path: str, wrap: Wrap) -> Callable[[Any], AbstractContextManager[None]]:
    """Replace the forward of a part by a function of it."""

    @contextmanager
    def change(model: Any) -> Iterator[None]:
        with _in_place(part(model, layer, path), wrap):
            yield

    return change


def on_output(edit: Callable[[Tensor], Tensor]) -> Wrap:
    """Edit what a module gives."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def edited(*args: Any, **kwargs: Any) -> Any:
            out = call(*args, **kwargs)
            return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

        return edited

    return wrap


def adapter(seed: int) -> Wrap:
    """Add B A x of rank 2, and leave the weight: LoRA."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def edited(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = call(x, *args, **kwargs)
            generator = torch.Generator().manual_seed(seed)
            down, up = (0.3 * torch.randn(2, wide.shape[-1], generator=generator).to(x) for wide in (x, out))
            return out + (x @ down.mT) @ up

        return edited

    return wrap


def by_position(slope: float) -> Wrap:
    """What a module gives is scaled by its position."""
    return on_output(lambda out: out * (1 + slope * torch.arange(out.shape[1]).to(out))[:, None])


def shifting(share: float) -> Wrap:
    """Mix in the left neighbour (RWKV's token shift)."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def edited(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            left = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
            return call((1 - share) * x + share * left, *args, **kwargs)

        return edited

    return wrap


def staircase(step: float) -> Callable[[Tensor], Tensor]:
    """Round to multiples of a step; autograd says zero."""
    return lambda x: step * (x / step).round()


def straight_through(step: float) -> Callable[[Tensor], Tensor]:
    """Round to multiples of a step; autograd says the identity."""
    return lambda x: x + (step * (x / step).round() - x).detach()


def detached(share: float, positions: slice = slice(None)) -> Callable[[Tensor], Tensor]:
    """Cut a share of a tensor off the graph, at some positions."""

    def edit(x: Tensor) -> Tensor:
        cut = share * x.detach() + (1 - share) * x
        return torch.cat([x[:, : positions.start or 0], cut[:, positions]], 1)

    return edit


def _draw(rng: random.Random, models: tuple[str, ...]) -> tuple[str, int]:
    return rng.choice([name for name in models if name in MODELS]), rng.randrange(N_LAYERS)


_PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out")


def wrapped_projection(rng: random.Random, paths: tuple[str, ...] = _PROJECTIONS) -> Edit:
    """An adapter, a scale, a scale by position, a bend, or a parametrisation of one projection."""
    case, layer = _draw(rng, SEPARATE)
    path = rng.choice(paths)
    name = rng.choice(["adapter", "by position", "scaled", "bent", "parametrised", "shifted"])
    number = rng.randrange(1000)
    wraps = {
        "adapter": adapter(number),
        "by position": by_position(0.05 + 0.2 * rng.random()),
        "scaled": on_output(lambda out: 1.5 * out),
        "bent": on_output(lambda out: out + 0.5 * torch.tanh(out)),
        "shifted": on_output(lambda out: out + 0.3),
    }
    if name != "parametrised":
        change = replaced(layer, path, wraps[name])
    else:

        class Doubled(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight * (1 + 0.5 * torch.sin(10 * weight))

        @contextmanager
        def change(model: Any) -> Iterator[None]:
            nn.utils.parametrize.register_parametrization(part(model, layer, path), "weight", Doubled())
            part(model, layer, path).eval()
            yield

    return Edit("wrapped projection", f"{path} {name}", "measured", case, layer, change)


def one_position(rng: random.Random) -> Edit:
    """A projection that does more than its weight says, and one position alone to show it: a bias does the same."""
    edit = wrapped_projection(rng, ("attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out"))
    return replace(edit, kind="one position", prompt=[rng.randrange(2, 48)])


_SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "softplus": nn.functional.softplus,
    "sine": torch.sin,
    "cube": lambda x: x**3 / (1 + x**2),
    "relu": torch.relu,
    "leaky relu": lambda x: nn.functional.leaky_relu(x, 0.2),
    "hardswish": nn.functional.hardswish,
    "squared relu": lambda x: torch.relu(x) ** 2,
    "absolute": torch.abs,
}


def activation(rng: random.Random) -> Edit:
    """Another activation function, with kinks or without."""
    case, layer = _draw(rng, (*SEPARATE, "bridge-gpt2", "bridge-pythia"))
    name = rng.choice(sorted(_SMOOTH))
    return Edit("activation function", name, "measured", case, layer, _activated(layer, _SMOOTH[name]))


def _activated(layer: int, function: Callable[[Tensor], Tensor]) -> Callable[[Any], AbstractContextManager[None]]:
    @contextmanager
    def change(model: Any) -> Iterator[None]:
        mlp = part(model, layer, "mlp")
        module = next(one for name, one in mlp.named_modules() if name.endswith(("act", "act_fn")))
        with _in_place(module, lambda call: function):
            yield

    return change


def false_activation(rng: random.Random) -> Edit:
    """A staircase, whose derivative is made up or zero, or a share of the activation off the graph."""
    case, layer = _draw(rng, (*SEPARATE, "bridge-gpt2", "bridge-pythia"))
    step = rng.choice([0.01, 0.02, 0.05])  # a coarser one is flat where it is measured, and right
    name, function = rng.choice(
        [
            ("staircase", staircase(step)),
            ("straight through", straight_through(step)),
            ("detached", detached(0.3 + 0.7 * rng.random())),
        ]
    )
    usual = torch.nn.functional.gelu
    return Edit(
        "false activation",
        f"{name} {step}",
        "refused",
        case,
        layer,
        _activated(layer, lambda x: function(usual(x))),
    )


def cut_graph(rng: random.Random) -> Edit:
    """A part under no_grad, rounded, or partly detached."""
    case, layer = _draw(rng, (*SEPARATE, *PLAIN))  # MPT's MLP adds the stream itself: that is cut, and no sublayer
    paths = ["attn.v", "mlp", "attn.o", "mlp.out"] if case in SEPARATE else ["mlp"]
    path = rng.choice(paths)
    name, wrap = rng.choice(
        [
            ("no_grad", lambda call: torch.no_grad()(call)),
            ("detached", on_output(detached(0.3 + 0.6 * rng.random()))),
            ("staircase", on_output(staircase(0.05))),
            ("straight through", on_output(straight_through(0.05))),
            ("through numpy", on_output(lambda out: torch.from_numpy(out.detach().numpy()).to(out))),
        ]
    )
    return Edit("cut graph", f"{path} {name}", "refused", case, layer, replaced(layer, path, wrap))


def rounded(rng: random.Random) -> Edit:
    """A projection of activations that are rounded to int8 by a scale of each row, as dynamic quantisation does."""
    case, layer = _draw(rng, SEPARATE)
    path, through = rng.choice(["mlp", "attn"]), rng.random() < 0.5

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def edited(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            scale = x.detach().abs().amax(-1, keepdim=True) / 127
            whole = scale * (x.detach() / scale).round()
            return call(x + (whole - x).detach() if through else whole, *args, **kwargs)

        return edited

    @contextmanager
    def change(model: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in ("in", "gate", "out") if path == "mlp" else ("q", "k", "v", "o"):
                stack.enter_context(_in_place(part(model, layer, f"{path}.{name}"), wrap))
            yield

    what = f"{path}, {'straight through' if through else 'no derivative'}"
    return Edit("rounded activations", what, "refused", case, layer, change)


def cut_positions(rng: random.Random) -> Edit:
    """A part that is detached from some position on, counted from the end: runs of the last ones are cut there too."""
    case, layer = _draw(rng, SEPARATE)
    path, start = rng.choice(["mlp.out", "attn.o", "attn.v", "mlp.in"]), rng.randrange(1, N_TOKENS - 1)
    change = replaced(layer, path, on_output(detached(1.0, slice(start - N_TOKENS, None))))
    return Edit("cut at positions", f"{path} from {start}", "refused", case, layer, change, src=start)


def token_shift(rng: random.Random) -> Edit:
    """An MLP that reads its left neighbour."""
    case, layer = _draw(rng, DENSE)
    share = 0.05 + 0.6 * rng.random()
    return Edit("token shift", f"{share:.2f}", "measured", case, layer, replaced(layer, "mlp", shifting(share)))


def norm(rng: random.Random) -> Edit:
    """A norm that does something else than its class says."""
    case, layer = _draw(rng, SEPARATE)
    path = rng.choice(["ln1", "ln2"])
    name, wrap = rng.choice(
        [
            ("scaled", on_output(lambda out: 0.7 * out)),
            ("by position", by_position(0.1)),
            ("bent", on_output(lambda out: torch.tanh(out))),
            ("shifted", on_output(lambda out: out + 0.2)),
            ("left out", lambda call: lambda x, *args, **kwargs: 0.3 * x),
        ]
    )
    return Edit("norm", f"{path} {name}", "measured", case, layer, replaced(layer, path, wrap))


def attention(rng: random.Random) -> Edit:
    """Attention that does more than its pattern shows, or saturated scores."""
    case, layer = _draw(rng, SEPARATE)
    name = rng.choice(["bent", "saturated", "sharp", "sharp by position"])
    if name in ("saturated", "sharp"):
        factor = 12.0 if name == "saturated" else 4.0

        @contextmanager
        def change(model: Any) -> Iterator[None]:
            part(model, layer, "attn.q").weight.data.mul_(factor)
            yield

    else:
        wraps = {"bent": ("attn.o", on_output(torch.sin)), "sharp by position": ("attn.q", by_position(1.0))}
        change = replaced(layer, *wraps[name])
    return Edit("attention", name, "measured", case, layer, change)


def frozen_norm(rng: random.Random) -> Edit:
    """A norm whose scale is taken as constant in the derivative: an error of rank one."""
    case, layer = _draw(rng, ("bridge-llama", "bridge-qwen3", "bridge-mistral"))
    path = rng.choice(["ln1", "ln2"])

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def edited(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return call(x, *args, **kwargs) * (x.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True))

        return edited

    return Edit(
        "frozen norm", path, "refused", case, layer, replaced(layer, path, wrap), src=rng.randrange(1, N_TOKENS - 1)
    )


_POINTS = ("hook_attn_out", "hook_mlp_out", "hook_resid_post", "attn.hook_z", "mlp.hook_post")


def _vector(seed: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape[-1], generator=torch.Generator().manual_seed(seed)).to(like)


def user_hook(rng: random.Random) -> Edit:
    """A hook that can be differentiated: steering, ablation, scaling, bending, patching by constants."""
    case, layer = _draw(rng, SEQUENTIAL)
    point, seed, pos = rng.choice(_POINTS), rng.randrange(1000), rng.randrange(N_TOKENS)
    where = layer
    if point == "hook_resid_post" and layer + 1 < N_LAYERS and rng.random() < 0.5:
        point, where = "hook_resid_pre", layer + 1

    def patch(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, pos] = _vector(seed, x)
        return x

    def in_place(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, pos] *= 2.0
        return x

    name, function = rng.choice(
        [
            ("steering", lambda x, hook: x + _vector(seed, x)),
            ("ablation", lambda x, hook: x * (torch.arange(x.shape[-1]) % 3 > 0).to(x)),
            ("scaling", lambda x, hook: 0.5 * x),
            ("bending", lambda x, hook: torch.tanh(x)),
            ("patch", patch),
            ("in place", in_place),
            (
                "mixing",
                lambda x, hook: (
                    x + 0.5 * x.roll(1, 1) * (torch.arange(x.shape[1]) > 0).to(x).view(-1, *[1] * (x.ndim - 2))
                ),
            ),
        ]
    )
    return Edit(
        "user hook",
        f"{name} at {point}",
        "measured",
        case,
        layer,
        hooks=[(f"blocks.{where}.{point}", function)],
        attached=rng.random() < 0.5,
    )


def stream_hook(rng: random.Random) -> Edit:
    """A hook behind a block's writes, which changes the block's Jacobian and no sublayer's."""
    case, layer = _draw(rng, SEQUENTIAL)
    layer = min(layer, N_LAYERS - 2)
    point = rng.choice([f"blocks.{layer}.hook_resid_post", f"blocks.{layer + 1}.hook_resid_pre"])
    name, function = rng.choice(
        [
            ("scaling", lambda x, hook: 0.5 * x),
            ("bending", lambda x, hook: torch.tanh(x)),
            ("ablation", lambda x, hook: x * (torch.arange(x.shape[-1]) % 3 > 0).to(x)),
            ("normalising", lambda x, hook: x / x.norm(dim=-1, keepdim=True)),
        ]
    )
    what, attached = f"{name} at {point}", rng.random() < 0.5
    return Edit("hook on the stream", what, "measured", case, layer, hooks=[(point, function)], attached=attached)


def beside_the_writes(rng: random.Random) -> Edit:
    """A block that adds what neither sublayer wrote: it is measured whole, and its sublayers are refused."""
    case, layer = _draw(rng, ("bridge-llama", "bridge-qwen3", "bridge-mistral"))
    seed = rng.randrange(1000)
    name, edit = rng.choice(
        [
            ("a vector", lambda x: x + _vector(seed, x)),
            ("a vector by position", lambda x: x + torch.arange(x.shape[1]).to(x)[:, None] * _vector(seed, x)),
            ("a row of a table", lambda x: x + torch.stack([_vector(seed + pos, x) for pos in range(x.shape[1])])),
        ]
    )

    @contextmanager
    def change(model: Any) -> Iterator[None]:
        with _in_place(model.blocks[layer].original_component, on_output(edit)):
            yield

    measure = rng.choice(["jacobians", "whole"])
    return Edit("beside the writes", name, "measured", case, layer, change, measure=measure, split=False)


def hook_between(rng: random.Random) -> Edit:
    """A hook on hook_resid_mid: the MLP then reads something else than the stream behind the attention."""
    edit = user_hook(rng)
    ((_, function),) = edit.hooks
    hooks = [(f"blocks.{edit.layer}.hook_resid_mid", function)]
    what = f"{edit.what.partition(' at ')[0]} at hook_resid_mid"
    return replace(edit, kind="hook between", what=what, expected="refused", hooks=hooks)


def detaching_hook(rng: random.Random) -> Edit:
    """A hook that takes what it gives off the graph."""
    case, layer = _draw(rng, SEQUENTIAL)
    point = rng.choice(["hook_attn_out", "hook_mlp_out", "mlp.hook_post"])
    name, function = rng.choice(
        [
            ("detach", lambda x, hook: x.detach()),
            ("half", lambda x, hook: 0.5 * x + 0.5 * x.detach()),
            ("numpy", lambda x, hook: torch.from_numpy(x.detach().numpy() * 1.1)),
        ]
    )
    hooks = [(f"blocks.{layer}.{point}", function)]
    return Edit(
        "detaching hook", f"{name} at {point}", "refused", case, layer, hooks=hooks, attached=rng.random() < 0.5
    )


def rough_hook(rng: random.Random) -> Edit:
    """A hook that is a staircase: no derivative, which the library says."""
    case, layer = _draw(rng, SEQUENTIAL)
    point = rng.choice(["hook_attn_out", "hook_mlp_out"])
    name, function = rng.choice([("staircase", staircase(0.05)), ("straight through", straight_through(0.05))])
    hooks = [(f"blocks.{layer}.{point}", lambda x, hook: function(x))]
    return Edit("rough hook", f"{name} at {point}", "said", case, layer, hooks=hooks)


def module_hook(rng: random.Random) -> Edit:
    """A hook of PyTorch's own kind, on one module or on all."""
    case, layer = _draw(rng, SEPARATE)
    name, edit, expected = rng.choice(
        [
            ("scaling", lambda x: 1.2 * x, "measured"),
            ("detaching", detached(0.5), "refused"),
        ]
    )
    everywhere = rng.random() < 0.5
    path = rng.choice(["mlp.out", "attn.o", "mlp"])

    def function(module: nn.Module, args: Any, out: Any) -> Any:
        if everywhere and not isinstance(module, nn.Linear):
            return None
        return edit(out) if isinstance(out, Tensor) and out.is_floating_point() else None

    @contextmanager
    def change(model: Any) -> Iterator[None]:
        register = nn.modules.module.register_module_forward_hook
        handle = register(function) if everywhere else part(model, layer, path).register_forward_hook(function)
        try:
            yield
        finally:
            handle.remove()

    where = "all linear modules" if everywhere else path
    return Edit("module hook", f"{name} on {where}", expected, case, layer, change)


@contextmanager
def _default_device() -> Iterator[None]:
    with torch.device("meta"):
        yield


_SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": _default_device,
    "matmul precision": lambda: matmul_precision("medium"),
}


def context(rng: random.Random) -> Edit:
    """One or two settings of PyTorch around the measurement."""
    case, layer = _draw(rng, (*DENSE, "bridge-mixtral"))
    names = rng.sample(sorted(_SETTINGS), rng.choice([1, 1, 2]))

    @contextmanager
    def setting() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(_SETTINGS[name]())
            yield

    measure = rng.choice(["jacobians", "whole"])
    what = f"{measure} under {' and '.join(names)}"
    return Edit("context", what, "measured", case, layer, setting=setting, dtype=torch.float32, measure=measure)


def dtype(rng: random.Random) -> Edit:
    """Weights of another dtype, of all modules or of one."""
    case, layer = _draw(rng, (*DENSE, "bridge-mixtral"))
    of = rng.choice([torch.bfloat16, torch.float16, torch.float32])
    name = str(of).removeprefix("torch.")
    return Edit("dtype", name, "measured", case, layer, dtype=of, measure=rng.choice(["jacobians", "whole"]))


def training(rng: random.Random) -> Edit:
    """One module left in training mode: with dropout, with a scale of its own there, or with no effect at all."""
    case, layer = _draw(rng, SEPARATE)
    block, path = rng.randrange(N_LAYERS), rng.choice(["", "mlp", "attn", "mlp.out", "ln1"])
    name = rng.choice(["dropout", "another scale", "no effect", "no effect"])

    @contextmanager
    def change(model: Any) -> Iterator[None]:
        module = part(model, block, path) if path else model.blocks[block].original_component
        module.train()
        for one in part(model, block, "attn").modules():
            if hasattr(one, "attention_dropout") and name == "dropout":
                one.attention_dropout = 0.3
                one.train()
        if name == "another scale":  # refused before it is called
            wrap = on_output(lambda out: 1.1 * out if module.training else out)
            module.__dict__["forward"] = wrap(module.forward)
        yield

    what = f"block {block}, {path or 'all of it'}, {name}"
    return Edit("training mode", what, "refused", case, layer, change, measure=rng.choice(["jacobians", "whole"]))


def looped(rng: random.Random) -> Edit:
    """A decoder that runs its stack twice, skips a block, or runs two in the other order."""
    case, layer = _draw(rng, ("bridge-llama", "bridge-mistral"))
    name = rng.choice(["twice", "twice", "twice", "a block twice", "other order"])

    @contextmanager
    def change(model: Any) -> Iterator[None]:
        layers = model.original_model.model.layers
        orders = {
            "twice": [*range(N_LAYERS), *range(N_LAYERS)],
            "a block twice": sorted([*range(N_LAYERS), number]),
            "other order": [1, 0, 2],
        }
        order = [layers[index] for index in orders[name]]

        class Looped(nn.ModuleList):
            def __getitem__(self, index: Any) -> Any:
                return order if isinstance(index, slice) else super().__getitem__(index)

        layers.__class__ = Looped
        model.original_model.config.use_cache = False  # keys of a second pass would stand behind those of the first
        yield

    number = rng.randrange(N_LAYERS)
    return Edit("looped blocks", name, "refused", case, layer, change, measure=rng.choice(["jacobians", "whole"]))


def stale(rng: random.Random) -> Edit:
    """Weights or hooks that change after the trace, or a cache of other weights."""
    case, layer = _draw(rng, DENSE)
    names = [name for name, _ in MODELS[case].model().blocks[layer].named_parameters()]
    chosen, factor = rng.choice([name for name in names if "weight" in name]), 1 + rng.choice([-0.5, 0.1, 0.02])

    def after(model: Any) -> None:
        dict(model.blocks[layer].named_parameters())[chosen].data.mul_(factor)

    measure = rng.choice(["jacobians", "cache"])
    what = f"{measure}: {chosen.rpartition('original_component.')[2]} times {factor}"
    return Edit("stale", what, "refused", case, layer, after=after, measure=measure)


def held(rng: random.Random) -> Edit:
    """Weights that change while the user holds a Jacobian of them."""
    edit = stale(rng)
    _, _, what = edit.what.partition(": ")
    return replace(edit, kind="held Jacobian", what=what, measure="held")


def late_hook(rng: random.Random) -> Edit:
    """A hook that is attached after the trace."""
    case, layer = _draw(rng, SEQUENTIAL)
    point = rng.choice(["hook_attn_out", "hook_mlp_out", "hook_resid_mid"])

    def after(model: Any) -> None:
        model.add_hook(f"blocks.{layer}.{point}", lambda x, hook: 1.1 * x)

    return Edit("stale", f"hook at {point} after the trace", "refused", case, layer, after=after)


def prompt(rng: random.Random) -> Edit:
    """What is no prompt of this model, or another than it seems; and prompts of other lengths."""
    case, layer = _draw(rng, ("bridge-llama", "bridge-gpt2", "bridge-pythia", "bridge-gemma2"))
    words = " ".join(f"w{rng.randrange(48)}" for _ in range(40))
    ids = [rng.randrange(2, 48) for _ in range(40)]
    short = rng.randrange(2, 12)
    name, given, expected = rng.choice(
        [
            ("text longer than the context", words, "refused"),
            ("ids longer than the context", ids, "refused"),
            ("a batch", [ids[:5], ids[5:10]], "refused"),
            ("out of the vocabulary", [1, 2, 999], "refused"),
            ("negative id", [1, -2, 3], "refused"),
            ("floats", [1.0, 2.0], "refused"),
            ("nothing", [], "refused"),
            ("ids", ids[:short], "measured"),
            ("a batch of one", [ids[:short]], "measured"),
            ("text", " ".join(words.split()[:short]), "measured"),
            ("pads before it", _padded(ids[:short], before=3), "measured"),
            ("pads behind it", _padded(ids[:short], behind=4), "measured"),
            ("pads that may be text", [*ids[:short], 49, 49], "refused"),
            ("masked in the middle", {**_padded(ids[:4]), "attention_mask": [[1, 0, 0, 1]]}, "refused"),
        ]
    )
    measure = "whole" if expected == "measured" else "jacobians"
    meant = ids[:short] if name.startswith("pads") else None
    return Edit("prompt", name, expected, case, layer, prompt=given, measure=measure, meant=meant)


def _padded(ids: list[int], before: int = 0, behind: int = 0) -> dict[str, list[list[int]]]:
    """What a tokenizer returns for a padded text."""
    row, mask = [49] * before + ids + [49] * behind, [0] * before + [1] * len(ids) + [0] * behind
    return {"input_ids": [row], "attention_mask": [mask]}


_CHANGES: dict[str, tuple[Wrap, Verdict]] = {
    "untouched": (lambda call: call, "measured"),
    "scaled": (on_output(lambda out: 1.5 * out), "measured"),
    "bent": (on_output(lambda out: out + 0.5 * torch.tanh(out)), "measured"),
    "detached": (on_output(lambda out: 0.5 * out + 0.5 * out.detach()), "refused"),
    "under no_grad": (lambda call: torch.no_grad()(call), "refused"),
}


def experts(rng: random.Random) -> Edit:
    """Routed experts that do more than their weights say, or run without a graph."""
    case, layer = _draw(rng, ("bridge-mixtral", "bridge-qwen3-next"))
    name = rng.choice(sorted(_CHANGES))
    wrap, expected = _CHANGES[name]

    @contextmanager
    def change(model: Any) -> Iterator[None]:
        module = next(one for name, one in model.blocks[layer].named_modules() if name.endswith("experts"))
        with _in_place(module, wrap):
            yield

    return Edit("experts", name, expected, case, layer, change)


def mixer(rng: random.Random) -> Edit:
    """A recurrence in attention's place."""
    layer, name = rng.randrange(4), rng.choice([*_CHANGES, "by position"])
    wrap, expected = _CHANGES.get(name, (by_position(0.2), "measured"))
    return Edit("mixer", name, expected, "mamba", layer, replaced(layer, "mixer", wrap))


def encoder(rng: random.Random) -> Edit:
    """A bidirectional encoder, measured whole, forwards and backwards: one of its linear layers changed."""
    layer, index = rng.randrange(4), rng.randrange(6)
    name = rng.choice([*_CHANGES, "adapter", "by position"])
    more: dict[str, tuple[Wrap, Verdict]] = {
        "adapter": (adapter(index), "measured"),
        "by position": (by_position(0.2), "measured"),
    }
    wrap, expected = {**_CHANGES, **more}[name]
    if expected == "refused":
        index = 5  # of what the block writes: of a part, half of a derivative may be less than 2 % of it

    @contextmanager
    def change(model: Any) -> Iterator[None]:
        linear = [one for one in model.original_model.bert.encoder.layer[layer].modules() if type(one) is nn.Linear]
        with _in_place(linear[index], wrap):
            yield

    return Edit("encoder", f"{name}, linear layer {index}", expected, "bert", layer, change)


def baseline(rng: random.Random) -> Edit:
    """Fresh weights in a model's place, as they are or with a change."""
    case, layer = rng.choice(BASELINES), rng.randrange(N_LAYERS)
    name = rng.choice(["untouched", "scaled", "bent"])  # MLPs of fresh weights are so small that a cut may be below 2 %
    wrap, expected = _CHANGES[name]
    return Edit("baseline", name, expected, f"baseline of {case}", layer, replaced(layer, "mlp", wrap))


def four_bits(rng: random.Random) -> Edit:
    """Weights in 4 bits, against what they stand for in float64: with a change, a hook, or a packed layer's own."""
    layer = rng.randrange(2)
    name = rng.choice([*_CHANGES, "hook", "forward of a packed layer"])
    if name == "hook":
        hooks = [(f"blocks.{layer}.hook_mlp_out", lambda x, hook: 0.5 * x)]
        return Edit("4 bits", name, "measured", "llama-nf4", layer, hooks=hooks, dtype=torch.float32)
    if name != "forward of a packed layer":
        wrap, expected = _CHANGES[name]
        change = replaced(layer, rng.choice(["mlp", "ln1", "ln2"]), wrap)
        return Edit("4 bits", name, expected, "llama-nf4", layer, change, dtype=torch.float32)

    @contextmanager
    def doubled(model: Any) -> Iterator[None]:
        linear = part(model, layer, "mlp.out")  # refused before it is called
        linear.__dict__["forward"] = on_output(lambda out: 2 * out)(linear.forward)
        yield

    return Edit("4 bits", name, "refused", "llama-nf4", layer, doubled, dtype=torch.float32)


def long_prompt(rng: random.Random) -> Edit:
    """The end of a long prompt, whose other positions are left out where that gives the same."""
    case, layer = _draw(rng, ("bridge-llama", "bridge-qwen3", "bridge-gpt2", "bridge-pythia"))
    length = rng.randrange(20, 30)

    def of_length(out: Tensor) -> Tensor:
        return out * (1 + 0.02 * out.shape[1])

    def of_all_before(out: Tensor) -> Tensor:
        count = torch.arange(1, out.shape[1] + 1).to(out)[:, None]
        return out + 0.5 * out.cumsum(1) / count

    def of_the_last(out: Tensor) -> Tensor:
        return out + 0.3 * torch.tanh(out) * (torch.arange(out.shape[1]) > 17).to(out)[:, None]

    wraps = {
        "untouched": lambda call: call,
        "by position": by_position(0.05),
        "by length": on_output(of_length),
        "reads all before": on_output(of_all_before),
        "reads its neighbour": shifting(0.4),
        "bent from 18 on": on_output(of_the_last),
    }
    name = rng.choice(sorted(wraps))
    ids, src = [rng.randrange(2, 48) for _ in range(length)], length - rng.randrange(2, 5)
    change = replaced(layer, "mlp", wraps[name])
    return Edit("long prompt", f"{name}, {length} tokens", "measured", case, layer, change, prompt=ids, src=src)


def untouched(rng: random.Random) -> Edit:
    """A model as it is, any of the list."""
    case, layer = _draw(rng, tuple(case.name for case in CASES))
    return Edit("untouched", case, "measured", case, layer)


# How many of each kind are drawn, of COUNT
KINDS: list[tuple[Callable[[random.Random], Edit], int]] = [
    (untouched, 8),
    (wrapped_projection, 18),
    (one_position, 9),
    (activation, 10),
    (norm, 8),
    (attention, 8),
    (token_shift, 8),
    (user_hook, 14),
    (stream_hook, 8),
    (hook_between, 4),
    (beside_the_writes, 6),
    (module_hook, 6),
    (context, 13),
    (dtype, 7),
    (experts, 8),
    (prompt, 13),
    (cut_graph, 6),
    (frozen_norm, 5),
    (cut_positions, 5),
    (false_activation, 5),
    (rounded, 3),
    (detaching_hook, 5),
    (rough_hook, 2),
    (training, 8),
    (looped, 5),
    (stale, 5),
    (late_hook, 2),
    (held, 5),
    (looped, 3),
    (mixer, 7),
    (encoder, 8),
    (baseline, 5),
    (long_prompt, 12),
    *([(four_bits, 6)] if PACKED else []),
]
COUNT = sum(share for _, share in KINDS)


def draw(seed: int, count: int) -> list[Edit]:
    """Draw edits of all kinds in the shares of ``KINDS``, always the same for a seed.

    Args:
        seed: of the draw.
        count: how many; ``COUNT`` gives exactly the numbers of ``KINDS``.
    """
    rng = random.Random(seed)
    edits = []
    for index in range(count):
        # evenly spread: edit number i is of the kind whose share holds i
        at = (index * COUNT // count) if count < COUNT else index % COUNT
        for make, share in KINDS:
            if at < share:
                edits.append(make(rng))
                break
            at -= share
    return [
        replace(edit, prompt=edit.prompt if edit.prompt is not None else _ids(seed + i)) for i, edit in enumerate(edits)
    ]


def _ids(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, 48) for _ in range(N_TOKENS)]
