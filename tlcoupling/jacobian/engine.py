"""Which engine computes what: analytic where it applies and is certified, autograd everywhere else."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from typing import Any, Literal, get_args

from tlcoupling.arguments import check_index, check_name, check_sublayer
from tlcoupling.errors import ArgumentError, CertificateError
from tlcoupling.forward.context import measured
from tlcoupling.forward.lifting import Lifts, lifted_once
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.analytic import AnalyticLayer
from tlcoupling.jacobian.autograd import AutogradJacobian
from tlcoupling.jacobian.certificate import Pair
from tlcoupling.jacobian.evidence import Evidence
from tlcoupling.jacobian.held import HeldJacobian
from tlcoupling.jacobian.runs import BlockRun
from tlcoupling.linalg.operator import JacobianOperator

EngineName = Literal["auto", "analytic", "autograd"]


class _Layer:
    """One layer of a trace: its closed forms, and what the model itself says of them."""

    def __init__(self, trace: Trace, layer: int, hooked: bool, pairs: Iterable[Pair], formed: bool) -> None:
        self.trace, self.layer, self._hooked, self._pairs = trace, layer, hooked, frozenset(pairs)
        self._formed = formed

    @cached_property
    def closed(self) -> AnalyticLayer:
        dests = {dest for _, dest in self._pairs}
        return AnalyticLayer(BlockRun(self.trace, self.layer, dests, self.evidence.moves))

    @cached_property
    def evidence(self) -> Evidence:
        return Evidence(self.trace, self.layer, self._hooked, self._pairs, self._formed)

    def refusal(self, sublayer: str, src: int, dest: int) -> str | None:
        return self.evidence.refusal(self.closed, sublayer, src, dest)

    def let_go(self) -> None:
        """Drop what takes much memory beside another layer; where more pairs are asked for, it is made again."""
        if "closed" in vars(self):
            self.closed.let_go()

    def held(self, sublayer: str, src: int, dest: int) -> JacobianOperator | None:
        """The closed form of a pair where it agrees with modules and differences."""
        if self.refusal(sublayer, src, dest) is not None:
            return None
        made = self.closed.sublayer(sublayer, src, dest)
        return made if self.evidence.contradiction(made, sublayer, src, dest) is None else None


class JacobianEngine:
    """Makes the Jacobians of one trace, holds each against the model, and remembers what made them.

    The chain of trust is tested link by link, at every (src, dest) that is asked for. The closed form is held against
    the derivative of the real modules (``certificate``). Where it misses that, or where hooks of the user's act in the
    block, ``auto`` takes autograd and a warning says so once, and ``analytic`` raises. What comes out of either is held
    against central differences of what is run (``differences``): a graph that is cut is an error.

    Where the pairs are announced, the block runs on the positions from one before the first of these to the last alone
    (``Trace.window``), as long as a closed form passes all of this there. The first one that does not sends this layer
    and all others to runs of all positions.

    Attributes:
        hooked: the blocks in whose Jacobians hooks of the user's act.
        difference_gap: the largest relative distance of a Jacobian's product from a central difference that
            confirmed it.
    """

    def __init__(
        self, trace: Trace, engine: EngineName = "auto", pairs: Iterable[Pair] = (), formed: bool = False
    ) -> None:
        """Take a trace.

        Args:
            trace: a trace of the model.
            engine: ``"auto"``, ``"analytic"`` or ``"autograd"``.
            pairs: (src, dest) that will be asked for: what they share in a layer is then done at once. One layer is
                held at a time, but for those of ``formed_together``: ask for all of them before the next.
            formed: whether the matrices of closed forms will be asked for: they are then tested as matrices.

        Raises:
            ArgumentError: an unknown engine.
        """
        require_trace(trace)
        check_name("engine", engine, get_args(EngineName))
        self.trace, self.engine = trace, engine
        self._pairs, self._formed = frozenset(pairs), formed
        self.hooked = trace.hooked_layers | trace.layers_hooked_now()
        self.difference_gap = 0.0
        self._layers: dict[tuple[int, bool], _Layer] = {}  # by index, and whether on the window
        self._together: Set[int] = frozenset()  # layers that are held beside another
        self._first, self._window = self._narrowed()
        self._refusals: dict[tuple[int, str, int, int], str | None] = {}  # by layer, sublayer, src, dest
        # by sublayer and engine: layer, src, dest
        self._used: dict[str, dict[str, set[tuple[int, int, int]]]] = defaultdict(lambda: defaultdict(set))
        self._warned: set[Hashable] = set()
        self._confirmed: set[tuple[int, str, int, int]] = set()  # what was held against differences
        self._lifts: tuple[int, Lifts] = (0, {})  # of one layer

    @property
    def used(self) -> dict[str, str]:
        """Which engine made the Jacobians of each sublayer, for the provenance."""
        return self.used_at(self._used)

    def used_at(self, sublayers: Iterable[str], places: Set[tuple[int, int, int]] | None = None) -> dict[str, str]:
        """Return the same of some sublayers; of some places (layer, src, dest) alone, where these are given."""
        report = {}
        for sublayer in sublayers:
            made = {name: at if places is None else at & places for name, at in self._used.get(sublayer, {}).items()}
            engines = {name: {layer for layer, *_ in at} for name, at in made.items() if at}
            if len(engines) == 1:
                report[sublayer] = next(iter(engines))
            else:
                parts = (f"{name} (layers {sorted(layers)})" for name, layers in engines.items())
                report[sublayer] = ", ".join(parts)
        return report

    @property
    def layers(self) -> set[int]:
        """The layers that are held: no block of these is run again."""
        return {layer for layer, _ in self._layers}

    def operator(self, layer: int, sublayer: str, src: int, dest: int, head: int | None = None) -> JacobianOperator:
        """Return the Jacobian of one layer and sublayer; indices must be in range and not negative.

        Raises:
            CertificateError: ``engine="analytic"`` and the closed form is missing, uncertified or hooked.
            HookError: a hook of the user's hides from autograd what it does.
            DerivativeError: the model itself hides from autograd what it does.
            StaleTraceError: the model has changed since the trace was taken.
        """
        with self.lifted_once(layer):
            return self._operator(layer, sublayer, src, dest, head)

    @contextmanager
    def formed_together(
        self, wanted: Sequence[tuple[int, str, int, int]], run: Callable[[Callable[[Any], Any], list[Any]], Any]
    ) -> Iterator[None]:
        """Form the matrices of some closed forms, all at once, before ``operator`` tests them one by one.

        What has no closed form is passed over: ``operator`` says why. Nothing is done where no matrix is wanted.

        Args:
            wanted: layer, sublayer, src and dest of each, layer by layer. Their layers and matrices are held until the
                end, and the last layer beyond it.
            run: calls a function with each item of a list, in threads or not.
        """
        if not self._formed:
            yield
            return
        self._together = {layer for layer, *_ in wanted}
        parts: list[JacobianOperator] = []
        for each in wanted:
            with suppress(Exception), self.lifted_once(each[0]):
                parts += self._parts(*each)
        # the largest first, so that threads end together
        run(lambda part: part.dense(), sorted(dict.fromkeys(parts), key=lambda part: -part.dense_flops))
        try:
            yield
        finally:
            self._together, last = frozenset(), {layer for layer, *_ in wanted[-1:]}
            self._layers = {key: each for key, each in self._layers.items() if key[0] in last}

    def _parts(self, layer: int, sublayer: str, src: int, dest: int) -> list[JacobianOperator]:
        """The closed forms of sublayers that a Jacobian is made of; none where it is left to autograd."""
        if self.engine == "autograd" or layer in self.hooked:
            return []
        windowed = self._window is not None and (src, dest) in self._pairs
        first = self._first if windowed else 0
        return self._layer(layer, windowed).closed.parts(sublayer, src - first, dest - first)

    def lifted_once(self, layer: int) -> AbstractContextManager[None]:
        """Hold no weight of a layer in float32 twice, where they are stored in fewer bits."""
        if self._lifts[0] != layer:
            self._lifts = (layer, {})
        return lifted_once(self._lifts[1])

    def _operator(self, layer: int, sublayer: str, src: int, dest: int, head: int | None) -> JacobianOperator:
        key = (layer, sublayer, src, dest)
        if (made := self._in_window(*key, head)) is not None:
            return made
        whole = None
        if self.engine != "autograd" and self._certified(*key):
            closed = self._layer(layer).closed
            made, whole = closed.sublayer(sublayer, src, dest, head), closed.sublayer(sublayer, src, dest)
        self._used[sublayer]["autograd" if made is None else "analytic"].add((layer, src, dest))
        if made is None:
            made = AutogradJacobian(self.trace, layer, sublayer, src, dest, head)
        if key not in self._confirmed:
            if whole is None:
                whole = made if head is None else AutogradJacobian(self.trace, *key, None)
            evidence = self._layer(layer).evidence
            self.warn_once((layer, sublayer), evidence.contradiction(whole, sublayer, src, dest))
            self._confirm(key, evidence)
        return made

    def warn_once(self, subject: Hashable, reason: str | None) -> None:
        """Warn, the first time that there is something to say of a subject."""
        if reason is not None and subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(reason, stacklevel=3)

    def _certified(self, layer: int, sublayer: str, src: int, dest: int) -> bool:
        """Return whether the closed form of a pair can be used, after saying why not."""
        if layer in self.hooked:
            where = ", ".join(map(str, sorted(self.hooked)))
            return self._refuse("hooks", f"hooks are attached to block {where}, and only autograd sees them act")
        key = (layer, sublayer, src, dest)
        if key not in self._refusals:
            self._refusals[key] = self._layer(layer).refusal(sublayer, src, dest)
        if (refusal := self._refusals[key]) is None:
            return True
        reason = f"{sublayer}: {refusal}"
        return self._refuse(reason.partition(" by ")[0], reason)

    def _layer(self, layer: int, windowed: bool = False) -> _Layer:
        """A layer on all positions, or on the window; one is held at a time, or those that are worked on together."""
        key = (layer, windowed)
        if key not in self._layers:
            self._layers = {other: each for other, each in self._layers.items() if other[0] in self._together}
            for held in self._layers.values():
                held.let_go()
            pairs, trace = self._pairs, self.trace
            if windowed and self._window is not None:
                trace = self._window
                pairs = frozenset((src - self._first, dest - self._first) for src, dest in self._pairs)
            self._layers[key] = _Layer(trace, layer, layer in self.hooked, pairs, self._formed)
        return self._layers[key]

    def _narrowed(self) -> tuple[int, Trace | None]:
        """The trace at the positions of the announced pairs, and the first of these; None where all are to be run."""
        if not self._pairs or self.engine == "autograd" or self.hooked:  # a hook expects all positions
            return 0, None
        # two positions at least: activations of one cannot tell a weight from a bias
        positions = {pos for pair in self._pairs for pos in pair}  # a bidirectional model has src behind dest too
        first, last = max(0, min(positions) - 1), max(positions)
        return first, self.trace.window(first, last) if last - first + 1 < self.trace.n_tokens else None

    def _in_window(self, layer: int, sublayer: str, src: int, dest: int, head: int | None) -> JacobianOperator | None:
        """The closed form of a pair if it holds on the window; None where all positions have to be run."""
        if self._window is None or (src, dest) not in self._pairs:
            return None
        part, key = self._layer(layer, windowed=True), (layer, sublayer, src, dest)
        there = (sublayer, src - self._first, dest - self._first)
        try:
            made = part.closed.sublayer(*there) if key in self._confirmed else part.held(*there)
            if made is not None:
                if head is not None:
                    made = part.closed.sublayer(*there, head)
                self._used[sublayer]["analytic"].add((layer, src, dest))
                self._confirm(key, part.evidence)
                return made
        except Exception:  # whatever a block raises that takes no window; on all positions it shows what it is
            pass
        self._window, self._layers = None, {}
        return None

    def _confirm(self, key: tuple[int, str, int, int], evidence: Evidence) -> None:
        self.difference_gap = max(self.difference_gap, evidence.gap)
        self._confirmed.add(key)

    def _refuse(self, subject: str, reason: str) -> bool:
        if self.engine == "analytic":
            raise CertificateError(f"engine='analytic' cannot be used here: {reason}")
        self.warn_once(subject, f"tlcoupling computes by autograd, which is slower: {reason}")
        return False


@measured
def residual_jacobian(
    trace: Trace,
    layer: int,
    sublayer: str = "block",
    src: int = -1,
    dest: int = -1,
    head: int | None = None,
    engine: EngineName = "auto",
) -> JacobianOperator:
    r"""The residual Jacobian of one block or sublayer, as a linear operator on R^d_model.

    - block: d (x^{l+1}_dest - x^l_dest) / d x^l_src for src = dest, d x^{l+1}_dest / d x^l_src otherwise: a position
      reaches a later one without a skip, so nothing is subtracted there.
    - attn (mixer): d a^l_dest / d x^l_src; with ``head``, of that head's share of a^l (of ``hook_z`` through the output
      projection: before a post-norm, and before hooks on the write).
    - mlp: d m^l_dest / d x_mid_dest in a sequential block, d m^l_dest / d x^l_dest in a parallel one; zero for
      src != dest.
    - cross_attn of a decoder with an encoder: what it writes at dest by the stream that it reads there, behind the
      self-attention; zero for src != dest.

    Rows are output coordinates, columns input coordinates. Source: arXiv 2407.07810, section 3. Products that you take
    of it are as precise as ``torch.set_float32_matmul_precision`` has it then; measurements take theirs at its highest.

    Args:
        trace: a trace of the model.
        layer: block index, from -L to L - 1.
        sublayer: ``"block"``, or one of ``trace.sublayers``: ``"attn"`` (or ``"mixer"``), ``"cross_attn"``, ``"mlp"``.
        src: input position, from -pos to pos - 1.
        dest: output position, not before src in a causal model.
        head: head index, only of an attention.
        engine: ``"auto"``, ``"analytic"`` or ``"autograd"``; see ``JacobianEngine``.

    Returns:
        An operator of shape ``(d_model, d_model)`` with ``mv``, ``rmv``, ``mm``, ``rmm`` and ``dense``. A product after
        the block's weights have changed raises ``StaleTraceError``.

    Raises:
        ArgumentError: an index out of range, an unknown sublayer or engine.
        CertificateError: ``engine="analytic"`` where no certified closed form exists.
        HookError: a hook of the user's hides from autograd what it does.
        DerivativeError: the model itself hides from autograd what it does.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> J = tlc.residual_jacobian(trace, layer=3, sublayer="attn")  # doctest: +SKIP
        >>> J.mv(torch.randn(trace.d_model)).shape  # doctest: +SKIP
    """
    require_trace(trace)
    layer = check_index("layer", layer, trace.n_layers)
    src, dest = check_index("src", src, trace.n_tokens), check_index("dest", dest, trace.n_tokens)
    check_sublayer("sublayer", sublayer, trace.sublayers, trace.refusal)
    if src > dest and trace.causal:
        raise ArgumentError("src", src, f"a position not after dest={dest}: the model is causal")
    if head is not None:
        if sublayer == "block" or trace.block(layer).sublayers[sublayer].kind != "attn":
            raise ArgumentError("head", head, "None unless the sublayer is an attention")
        head = check_index("head", head, trace.model.cfg.n_heads)
    made = JacobianEngine(trace, engine, {(src, dest)}).operator(layer, sublayer, src, dest, head)
    return HeldJacobian(made, trace.model.blocks[layer], layer)
