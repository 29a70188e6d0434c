"""Which engine computes what: analytic where it applies and is certified, autograd everywhere else."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Literal, get_args

import torch

from tlcoupling.arguments import check_index, check_name, check_sublayer
from tlcoupling.errors import ArgumentError, CertificateError
from tlcoupling.forward.block import Uncovered
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.analytic import AnalyticLayer
from tlcoupling.jacobian.autograd import AutogradJacobian
from tlcoupling.jacobian.differences import require_followed
from tlcoupling.linalg.operator import JacobianOperator

EngineName = Literal["auto", "analytic", "autograd"]

# Relative gap allowed between an analytic product and the module's own derivative along the same probe. Float32
# products of this size agree to 1e-5; HuggingFace modules cast to float32 inside, whatever the model's dtype.
CERTIFICATE_TOLERANCE = 1e-4


class JacobianEngine:
    """Makes the Jacobians of one trace, and remembers what made them.

    With ``auto``, each layer and sublayer is taken in closed form where the architecture allows it and one random probe
    through the closed form matches the derivative of the real module along it (to ``CERTIFICATE_TOLERANCE``); where it
    does not, or where hooks of the user's act in the block, autograd takes over and a warning says so once.
    ``analytic`` makes either case an error. Where hooks act, what autograd gives is held against central differences,
    for each src and dest: a hook that detaches the graph is an error.

    Attributes:
        hooked: the blocks in whose Jacobians hooks of the user's act.
    """

    def __init__(self, trace: Trace, engine: EngineName = "auto", dests: Iterable[int] = ()) -> None:
        """Take a trace.

        Args:
            trace: a trace of the model.
            engine: ``"auto"``, ``"analytic"`` or ``"autograd"``.
            dests: positions that will be asked for as dest: what they share in a layer is then done at once. One layer
                is held at a time, so ask for all that is needed of a layer before the next.

        Raises:
            ArgumentError: an unknown engine.
        """
        require_trace(trace)
        check_name("engine", engine, get_args(EngineName))
        self.trace, self.engine = trace, engine
        self._dests = tuple(dests)
        self.hooked = trace.hooked_layers | trace.layers_hooked_now()
        self._last: AnalyticLayer | None = None
        self._refusals: dict[tuple[int, str, bool], str | None] = {}  # by layer, sublayer, src = dest
        self._used: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self._warned: set[Hashable] = set()
        self._followed: set[tuple[int, str, int, int]] = set()  # what was held against differences

    @property
    def used(self) -> dict[str, str]:
        """Which engine made the Jacobians of each sublayer, for the provenance."""
        report = {}
        for sublayer, engines in self._used.items():
            if len(engines) == 1:
                report[sublayer] = next(iter(engines))
            else:
                parts = (f"{name} (layers {sorted(layers)})" for name, layers in engines.items())
                report[sublayer] = ", ".join(parts)
        return report

    def operator(self, layer: int, sublayer: str, src: int, dest: int, head: int | None = None) -> JacobianOperator:
        """The Jacobian of one layer and sublayer; indices must be in range and not negative.

        Raises:
            CertificateError: ``engine="analytic"`` and the closed form is missing, uncertified or hooked.
            HookError: a hook of the user's hides from autograd what it does.
            StaleTraceError: the model has changed since the trace was taken.
        """
        made = None
        if self.engine != "autograd":
            made = self._analytic(layer, sublayer, src, dest, head)
        self._used[sublayer]["autograd" if made is None else "analytic"].add(layer)
        if made is not None:
            return made
        oracle = AutogradJacobian(self.trace, layer, sublayer, src, dest, head)
        key = (layer, sublayer, src, dest)  # a hook may act on some positions alone
        if (layer in self.hooked or oracle.constant) and key not in self._followed:
            whole = oracle if head is None else AutogradJacobian(self.trace, *key, None)
            self.warn_once((layer, sublayer), require_followed(whole, self.trace, *key))
            self._followed.add(key)
        return oracle

    def warn_once(self, subject: Hashable, reason: str | None) -> None:
        """Warn, the first time that there is something to say of a subject."""
        if reason is not None and subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(reason, stacklevel=3)

    def _analytic(self, layer: int, sublayer: str, src: int, dest: int, head: int | None) -> JacobianOperator | None:
        """The certified closed form, or None after saying why not."""
        if layer in self.hooked:
            where = ", ".join(map(str, sorted(self.hooked)))
            return self._refuse(f"hooks are attached to block {where}, and only autograd sees them act")
        closed_form = self._observed(layer)
        if sublayer != "mlp" or src == dest:  # an MLP does not reach another position: nothing to certify
            key = (layer, sublayer, src == dest)
            if key not in self._refusals:
                self._refusals[key] = self._certify(closed_form, sublayer, src, dest)
            if (refusal := self._refusals[key]) is not None:
                return self._refuse(f"{sublayer}: {refusal}")
        return closed_form.sublayer(sublayer, src, dest, head)

    def _observed(self, layer: int) -> AnalyticLayer:
        """The closed forms of a layer; those of one layer are held at a time."""
        if self._last is None or self._last.layer != layer:
            self._last = AnalyticLayer(self.trace, layer, self._dests)
        return self._last

    def _refuse(self, reason: str) -> None:
        if self.engine == "analytic":
            raise CertificateError(f"engine='analytic' cannot be used here: {reason}")
        self.warn_once(reason, f"tlcoupling computes by autograd, which is slower: {reason}")

    def _certify(self, closed_form: AnalyticLayer, sublayer: str, src: int, dest: int) -> str | None:
        """Why a closed form cannot be used, None where it can: one random cotangent through the real modules.

        A block is its two sublayers in the order of its topology; that their writes add up is checked on every trace.
        """
        generator = torch.Generator().manual_seed(closed_form.layer)
        stream = closed_form.resid_pre
        y = torch.randn(stream.shape[1], generator=generator, dtype=stream.dtype).to(stream.device)
        truth, read = torch.zeros_like(y), y
        sequential = self.trace.topology == "sequential"
        reached = self.trace.mlp_out is not None and (sequential or src == dest)
        if sublayer == "mlp" or (sublayer == "block" and reached):
            through_mlp = closed_form.mlp_pulled(y, dest)
            read = y + through_mlp if sequential else y
            truth = through_mlp if src == dest else truth
        if sublayer != "mlp":
            truth = truth + closed_form.attn_run.pull(read, dest, again=True)[src]
        try:
            operator = closed_form.sublayer(sublayer, src, dest)
        except Uncovered as reason:
            return str(reason)
        # J^T y as a vector; J x, which has to be its adjoint, in the one number y . J x
        x = torch.randn(stream.shape[1], generator=generator, dtype=stream.dtype).to(stream.device)
        adjoint = (y @ operator.mv(x) - truth @ x).abs() / x.norm()
        gap, size = torch.maximum((operator.rmv(y) - truth).norm(), adjoint), truth.norm()
        if gap <= CERTIFICATE_TOLERANCE * size:
            return None
        return (
            f"its closed form misses the module's own derivative by {gap / size:.1e} "
            f"(first in layer {closed_form.layer}; allowed: {CERTIFICATE_TOLERANCE:.0e})"
        )


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
    - attn: d a^l_dest / d x^l_src; with ``head``, of that head's share of a^l (of ``hook_z`` through the output
      projection: before a post-norm, and before hooks on the write).
    - mlp: d m^l_dest / d x_mid_dest in a sequential block, d m^l_dest / d x^l_dest in a parallel one; zero for
      src != dest.

    Rows are output coordinates, columns input coordinates. Source: arXiv 2407.07810, section 3. Products that you take
    of it are as precise as ``torch.set_float32_matmul_precision`` has it then; measurements take theirs at its highest.

    Args:
        trace: a trace of the model.
        layer: block index, from -L to L - 1.
        sublayer: ``"block"``, ``"attn"`` or ``"mlp"``.
        src: input position, from -pos to pos - 1.
        dest: output position, not before src.
        head: head index, only with ``sublayer="attn"``.
        engine: ``"auto"``, ``"analytic"`` or ``"autograd"``; see ``JacobianEngine``.

    Returns:
        An operator of shape ``(d_model, d_model)`` with ``mv``, ``rmv``, ``mm``, ``rmm`` and ``dense``.

    Raises:
        ArgumentError: an index out of range, an unknown sublayer or engine.
        CertificateError: ``engine="analytic"`` where no certified closed form exists.
        HookError: a hook of the user's hides from autograd what it does.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> J = tlc.residual_jacobian(trace, layer=3, sublayer="attn")  # doctest: +SKIP
        >>> J.mv(torch.randn(trace.d_model)).shape  # doctest: +SKIP
    """
    require_trace(trace)
    layer = check_index("layer", layer, trace.n_layers)
    src, dest = check_index("src", src, trace.n_tokens), check_index("dest", dest, trace.n_tokens)
    check_sublayer("sublayer", sublayer, trace.sublayers)
    if src > dest:
        raise ArgumentError("src", src, f"a position not after dest={dest}: attention is causal")
    if head is not None:
        if sublayer != "attn":
            raise ArgumentError("head", head, "None unless sublayer='attn'")
        head = check_index("head", head, trace.model.cfg.n_heads)
    return JacobianEngine(trace, engine).operator(layer, sublayer, src, dest, head)
