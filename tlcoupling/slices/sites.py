"""Sites: hook points between which a slice runs, and positions at which it starts and ends."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import Indices, as_list, check_index, resolve_indices
from tlcoupling.directions.readout import Readout
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.operator import JacobianOperator

Stage = Literal["pre", "z", "attn", "mid", "mlp"]
SiteSpec = str | tuple[Any, ...]
Mode = Literal["stack", "same"]

_STREAMS: dict[str, Stage] = {"resid_pre": "pre", "resid_mid": "mid"}
# In the order in which a sequential block passes them; a write is passed where it is added to the stream.
_ORDER: dict[Stage, int] = {"pre": 0, "z": 1, "attn": 2, "mid": 2, "mlp": 3}


@dataclass(frozen=True)
class Site:
    """A place in the forward pass.

    Attributes:
        layer: block index; the number of blocks for what lies behind them.
        stage: ``"pre"`` is x^layer, ``"mid"`` x^layer + a^layer, ``"attn"`` and ``"mlp"`` what these write, ``"z"``
            what a head gives.
        head: the head of ``"z"``; None elsewhere.
        readout: ``"stream"`` where the site is one of these; ``"norm"`` for the final norm's output and ``"logits"``
            for logits, both read from x^L.
        tokens: the chosen logits; None for all.
        signs: of the chosen logits in a difference; None where each is a coordinate.
    """

    layer: int
    stage: Stage = "pre"
    head: int | None = None
    readout: Readout | Literal["stream"] = "stream"
    tokens: tuple[int, ...] | None = None
    signs: tuple[int, ...] | None = None

    def before(self, other: Site) -> bool:
        """Whether the forward pass comes to this site first."""
        here, there = ((site.layer, _ORDER[site.stage], site.readout != "stream") for site in (self, other))
        return here < there


def source_of(trace: Trace, spec: SiteSpec) -> Site:
    """Return the site at which a slice starts.

    What is added to a sublayer's write is added to the stream behind it, so a write is that place.

    Raises:
        ArgumentError: it is not one of a trace's sites, or no place to start from.
    """
    site = _site(trace, "source", spec)
    if site.readout != "stream":
        raise ArgumentError("source", spec, "a hook point of a block")
    if site.stage == "attn" and trace.topology == "sequential":
        return Site(site.layer, "mid")
    return Site(site.layer + 1) if site.stage in ("attn", "mlp") else site


def target_of(trace: Trace, spec: SiteSpec) -> Site:
    """Return the site at which a slice ends.

    Raises:
        ArgumentError: it is not one of a trace's sites.
    """
    return _site(trace, "target", spec)


def ends_of(trace: Trace, source: SiteSpec, target: SiteSpec) -> tuple[Site, Site]:
    """Return the sites at which a slice starts and ends.

    Raises:
        ArgumentError: one is not a trace's site, or the target is not behind the source.
    """
    start, end = source_of(trace, source), target_of(trace, target)
    if not start.before(end):
        raise ArgumentError("target", target, f"a hook point that comes after source={source}")
    return start, end


def positions_of(trace: Trace, src: Indices, dest: Indices) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the positions that a slice moves and those that it reads.

    Raises:
        ArgumentError: one is out of range, or nothing that is moved is read.
    """
    sources, dests = resolve_indices("src", src, trace.n_tokens), resolve_indices("dest", dest, trace.n_tokens)
    if trace.causal and max(dests) < min(sources):
        raise ArgumentError("dest", dest, f"a position not before every src of {src}: the model is causal")
    return sources, dests


def window_between(trace: Trace, positions: Collection[int], engine: EngineName) -> Trace | None:
    """Return the trace at the positions from the first to the last of some; None where all have to be run.

    Hooks expect all positions, and so does whoever asks for the model's own derivatives.
    """
    first, last = min(positions), max(positions)
    if first == last and first > 0:
        first -= 1  # activations of one position cannot tell a weight from a bias
    hooked = trace.hooked_layers | trace.layers_hooked_now()
    if engine == "autograd" or hooked or last - first + 1 == trace.n_tokens:
        return None
    return trace.window(first, last)


def part_between(trace: Trace, positions: Collection[int], engine: EngineName) -> tuple[Trace, int]:
    """Return the trace at those positions that lie on the way between some, and the first of them.

    Where others may lead from one to another, or blocks do not run without the others, it is the whole trace.
    """
    window = window_between(trace, positions, engine)
    if window is None or not trace.alone(window.first - trace.first, window.first - trace.first + window.n_tokens - 1):
        return trace, 0
    try:
        for layer in range(trace.n_layers):
            window.check_current("block", layer, window.run_block(layer, window.block_input(layer), {})[0])
    except Exception:  # whatever a block raises that takes no window
        return trace, 0
    return window, window.first - trace.first


def stream_points(trace: Trace, end: str) -> list[str]:
    """Return the names of the places of the stream, and of the writes, where a slice may have an end.

    Args:
        trace: the trace.
        end: ``"source"`` or ``"target"``.
    """
    mid = ["resid_mid"] if trace.topology == "sequential" else []
    writes = list(trace.writes)
    if trace.topology == "cross":  # between attention and MLP the stream has a place that no site names
        writes = ["mlp"] if end == "source" else ["attn", "mlp"]
    return ["resid_pre", *mid, "resid_post", *(f"{name}_out" for name in writes)]


def _site(trace: Trace, name: str, spec: SiteSpec) -> Site:
    parts = _parts(spec)
    point, *rest = parts
    writes: dict[str, Stage] = {f"{write}_out": "mlp" if write == "mlp" else "attn" for write in trace.writes}
    attends = trace.writes and trace.block(0).mixer.kind == "attn"
    points = [*stream_points(trace, name), *(("z",) if attends else ())]
    allowed = f"(point, layer) with a point of {', '.join(points)}"
    if attends:
        allowed += ", and ('z', layer, head)"
    if name == "target":
        allowed += "; 'logits', ('logits', tokens) or ('logit_diff', token, token)"
        if hasattr(trace.model, "ln_final"):
            allowed += "; 'ln_final', the final norm's output"
            if parts == ("ln_final",):
                return Site(trace.n_layers, readout="norm")
        if point in ("logits", "logit_diff"):
            return _logits(trace, spec, point, rest, allowed)
    if point not in points or len(rest) != (2 if point == "z" else 1):
        raise ArgumentError(name, spec, allowed)
    layer = check_index(f"layer of {name}", rest[0], trace.n_layers)
    if point == "z":
        return Site(layer, "z", check_index(f"head of {name}", rest[1], trace.model.cfg.n_heads))
    if point == "resid_post":
        return Site(layer + 1)
    return Site(layer, _STREAMS.get(point) or writes[point])


def _parts(spec: SiteSpec) -> tuple[Any, ...]:
    """A site as a tuple; ``blocks.3.hook_resid_pre`` is ``("resid_pre", 3)``."""
    if not isinstance(spec, str):
        return tuple(spec) or ("",)
    first, *rest = spec.split(".")
    if first == "blocks" and len(rest) == 2 and rest[0].isdecimal() and rest[1].startswith("hook_"):
        return rest[1].removeprefix("hook_"), int(rest[0])
    return (spec,)


def name_of(trace: Trace, spec: SiteSpec) -> str:
    """Return an allowed site as TransformerLens names it, such as ``blocks.3.hook_resid_post``; logits with tokens."""
    point, *rest = _parts(spec)
    if point in ("logits", "logit_diff"):
        chosen = as_list(rest[0]) if point == "logits" and rest else rest
        joined = (" − " if point == "logit_diff" else ", ").join(map(str, chosen))
        return f"logits[{joined}]" if chosen else "logits"
    if point == "ln_final":
        return point
    block = f"blocks.{rest[0] % trace.n_layers}"
    return f"{block}.attn.hook_z, head {rest[1] % trace.model.cfg.n_heads}" if point == "z" else f"{block}.hook_{point}"


def _logits(trace: Trace, spec: SiteSpec, point: str, rest: list[Any], allowed: str) -> Site:
    if (point == "logit_diff" and len(rest) != 2) or len(rest) > 2:
        raise ArgumentError("target", spec, allowed)
    words = int(trace.model.cfg.d_vocab)
    chosen = None if not rest else tuple(as_list(rest[0]) if point == "logits" else rest)
    tokens = None if chosen is None else tuple(check_index("target", token, words) for token in chosen)
    signs = (1, -1) if point == "logit_diff" else None
    return Site(trace.n_layers, readout="logits", tokens=tokens, signs=signs)


class Placement(JacobianOperator):
    """Put vectors at some positions of a stream that is zero elsewhere; its transpose reads them there.

    With ``mode="stack"`` each position has a vector of its own, ``[position * d]`` to ``[pos * d]``. With ``"same"``
    all have the same one, ``[d]`` to ``[pos * d]``.
    """

    _light = True

    def __init__(
        self, n_tokens: int, positions: Iterable[int], mode: Mode, size: int, like: Tensor | JacobianOperator
    ) -> None:
        """Place vectors of a size at some of so many positions."""
        self.positions, self.mode, self._n_tokens, self._size = tuple(positions), mode, n_tokens, size
        width = size * (len(self.positions) if mode == "stack" else 1)
        self._describe((n_tokens * size, width), like)
        self._cost(0.0, 0.0)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """The streams."""
        stream = x.new_zeros(self._n_tokens, self._size, x.shape[1])
        stream[list(self.positions)] = x.unflatten(0, (-1, self._size)) if self.mode == "stack" else x[None]
        return stream.flatten(0, 1)

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """What is at the positions, added up where they have one vector."""
        there = y.unflatten(0, (self._n_tokens, self._size))[list(self.positions)]
        return there.flatten(0, 1) if self.mode == "stack" else there.sum(0)
