"""The report in a notebook with a kernel: choosing a layer or a token that was not measured measures it.

The page in the frame tells what is chosen in it (``assets/scripts/main.js``), ``assets/live.js`` passes that on as the
trait ``chosen``, and a new page comes back as the trait ``page``. The page asks what two Jacobians share, and how a
layer's heads couple, with the trait ``asked`` (``assets/scripts/kernel.js``). The trait ``answer`` goes into the page
that is shown. A notebook that is opened without a kernel shows the page that was saved with it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, TypeVar
from uuid import uuid4

import torch
import traitlets
from anywidget import AnyWidget
from torch import Tensor

from tlcoupling.analysis.analyze import Analysis, couplings_of_tokens
from tlcoupling.analysis.shared import VECTORS, shared_pair
from tlcoupling.coupling.depth import depth_coupling
from tlcoupling.coupling.groups import Place
from tlcoupling.coupling.heads import head_coupling
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.result import Coupling
from tlcoupling.errors import ArgumentError, TLCouplingError
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.models.baseline import random_baseline
from tlcoupling.viz import panes
from tlcoupling.viz.page import asset
from tlcoupling.viz.widgets import Widget, render_html

CouplingT = TypeVar("CouplingT", bound=Coupling)
# The fields that label an axis of groups.
_LABELS = {"layer": ("layers", "basis_layers"), "pos": ("positions", "tokens")}


class Live(AnyWidget):
    """The report of an analysis, which measures more of it on demand.

    It displays itself in Jupyter, VS Code, Colab and marimo. Choosing a layer whose tokens were not compared measures
    their coupling. Choosing a token whose layers were not compared measures its coupling across depth. Fresh weights
    are measured too, if the analysis has them beside it. A click on a pair of layers, tokens or heads measures what
    the two share: |U2^T J1 V2|, and the tokens that the shared directions write and read.

    Args:
        result: an analysis that was made here, so that it has its trace.
        baseline: the model of ``result.baseline``, if that is not ``tlc.random_baseline(model)``.

    Attributes:
        result: the analysis, with what was measured since.
        status: what is being measured, or why it could not be.

    Raises:
        ArgumentError: something else than an analysis, or one without its trace, such as one from a file.
        ImportError: anywidget is not installed.

    Example:
        >>> live = tlc.viz.Live(tlc.analyze(model, "When Mary and John went to the store"))  # doctest: +SKIP
        >>> live  # choose layers and tokens, then go on with live.result  # doctest: +SKIP
    """

    _esm = f"{asset('host.js')}\n{asset('live.js')}"
    page = traitlets.Unicode().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    key = traitlets.Unicode().tag(sync=True)
    chosen = traitlets.Dict().tag(sync=True)
    asked = traitlets.Dict().tag(sync=True)
    answer = traitlets.Dict().tag(sync=True)

    def __init__(self, result: Analysis, *, baseline: Any | None = None) -> None:
        if not isinstance(result, Analysis):
            raise ArgumentError(
                "result", type(result).__name__, "an Analysis, which tlc.analyze(model, prompt) returns"
            )
        if result.trace is None:
            raise ArgumentError("result", "an analysis without its trace", "one that tlc.analyze returned here")
        self.result = result
        self._model = baseline
        self._saved: Any = None
        self._opened: dict[tuple[str, bool], dict[str, Any]] = {}
        super().__init__(page=render_html(result), key=uuid4().hex)
        self.observe(self._choose, "chosen")
        self.observe(self._answer, "asked")

    def _choose(self, change: Mapping[str, Any]) -> None:
        """Measure what is chosen and not measured, and show it."""
        chosen = change["new"]
        layer, token = chosen.get("layer"), chosen.get("token")
        compared = self.result.token_coupling
        try:
            if token is not None and token not in self.result.coupling.positions:
                self.status = f"measuring the layers at token {token} …"
                self.result = self._extended(self.result, _at_token, token)
            if layer is not None and (compared is None or layer not in compared.layers):
                self.status = f"measuring the tokens of layer {layer} …"
                self.result = self._extended(self.result, _in_layer, layer)
        except TLCouplingError as error:
            self.status = f"not measured: {error}"
            return
        if self.status:
            self.status, self.page = "", render_html(self.result, chosen, list(self._opened.values()))
            if self._saved is not None:
                self._saved.update(_html(self._static()))

    def _answer(self, change: Mapping[str, Any]) -> None:
        """Measure what the page asks for, and answer."""
        asked = change["new"]
        assert self.result.trace is not None
        measure = {"pair": _pair, "heads": _heads}[asked["what"]]
        try:
            found = measure(self.result, self.result.trace, asked)
            if asked["what"] == "pair" and self.result.baseline is not None:  # what shares weights couples untrained
                found["fresh"] = _pair(self.result.baseline, self._other, asked)["coupling"]
            answer = {"asked": asked, "found": found}
        except TLCouplingError as error:
            answer = {"asked": asked, "refusal": str(error)}
        self._opened[asked["what"], asked.get("of") == "layer"] = self.answer = answer  # layers have their own panel

    def _extended(self, result: Analysis, measure: Any, index: int) -> Analysis:
        """Return the analysis, and the one of fresh weights beside it, with one more measurement."""
        assert result.trace is not None
        changed = measure(result, result.trace, index)
        more = replace(result, **changed)
        if "coupling" not in changed:  # the rotation test takes a second: what it tests is the same
            vars(more)["depth_test"] = result.depth_test
        if result.baseline is None:
            return more
        return replace(more, baseline=replace(result.baseline, **measure(result.baseline, self._other, index)))

    @cached_property
    def _other(self) -> Trace:
        """The trace of the model of the baseline, whose own is not kept.

        Raises:
            ArgumentError: it is another model than was measured.
        """
        own, measured = self.result.trace, self.result.baseline
        assert own is not None and measured is not None
        found = trace(random_baseline(own.model) if self._model is None else self._model, own.tokens)
        norms, known = found.resid.norm(dim=-1).cpu(), measured.growth.norms
        if norms.shape != known.shape or not torch.allclose(norms, known.to(norms), rtol=1e-3):
            raise ArgumentError("baseline", "another model", "the model that was measured as the baseline")
        return found

    def _static(self) -> str:
        """Return the page as it is saved with a notebook."""
        frame, mark = Widget(self.page, height=900)._repr_html_(), f'data-tlcoupling="{html.escape(self.key)}"'
        # in the place of the widget, JupyterLab would say that it has none
        dead = f".jp-OutputArea-child:has([{mark}]) + .jp-OutputArea-child:not(:has(.tlcoupling-status))"
        return f"<style>{dead} {{ display: none }}</style><div {mark}>{frame}</div>"

    def _ipython_display_(self) -> None:
        """Display the page that is saved with the notebook, and the one that the kernel answers, which hides it."""
        from IPython.display import display

        self._saved = display(_html(self._static()), display_id=True)
        if (bundle := self._repr_mimebundle_()) is not None:
            display(bundle[0], raw=True)


def _html(text: str) -> Any:
    """Return HTML that IPython displays as it is."""
    from IPython.display import HTML

    return HTML(text)


def _at_token(result: Analysis, traced: Trace, token: int) -> dict[str, Any]:
    """Measure depth-wise coupling at one more token."""
    more = depth_coupling(traced, tokens=token, **_settings(result))
    return {"coupling": joined(result.coupling, more, "pos")}


def _in_layer(result: Analysis, traced: Trace, layer: int) -> dict[str, Any]:
    """Measure the coupling of tokens in one more layer."""
    compared, basis = result.token_coupling, layer
    if compared is not None and compared.basis_layers != compared.layers and len({*compared.basis_layers}) == 1:
        basis = compared.basis_layers[0]
    more = couplings_of_tokens(traced, (layer,), {**_settings(result), "basis_layers": basis})
    known = {name: getattr(result, name) for name in more}
    return {
        name: one if known[name] is None or one is None else joined(known[name], one, "layer")
        for name, one in more.items()
    }


def _pair(result: Analysis, traced: Trace, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Measure what a pair of Jacobians shares, with at most as many vectors as a page has of pairs of layers."""
    row, column = (Place(*(one.get(name) for name in Place._fields)) for one in asked["pair"])
    sublayer, k = asked["sublayer"], min(asked["k"], VECTORS)
    if row.head is not None:
        sublayer, k = traced.attention((row.layer,)), min(k, traced.model.cfg.d_head)
    settings = {**_settings(result), "k": k}
    del settings["sublayers"]
    options = Options.resolve(traced.d_model, **settings)
    return panes.shared_pair(shared_pair(traced, sublayer, row, column, options), options.bases)


def _heads(result: Analysis, traced: Trace, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Measure how the heads of a layer couple at a token."""
    settings = {**_settings(result), "k": min(asked["k"], traced.model.cfg.d_head)}
    del settings["sublayers"]
    return panes.heads(head_coupling(traced, token=asked["token"], layers=asked["layer"], **settings))


def _settings(result: Analysis) -> dict[str, Any]:
    """Return the settings that the analysis was made with."""
    names = ("k", "sublayers", "normalizer", "bases", "absolute", "engine", "solver")
    return {name: result.coupling.provenance.settings[name] for name in names}


def joined(one: CouplingT, other: CouplingT, axis: str) -> CouplingT:
    """Join two couplings along an axis of groups, in the order of its labels.

    Args:
        one: a coupling.
        other: the same for other labels of the axis.
        axis: ``"layer"`` of a coupling of tokens, ``"pos"`` of a depth-wise one.
    """
    labels = [*one._coords()[axis], *other._coords()[axis]]
    order = sorted(range(len(labels)), key=labels.__getitem__)
    changed: dict[str, Any] = {}
    for name in (spec.name for spec in fields(one)):
        first, second, axes = getattr(one, name), getattr(other, name), one._axes.get(name, ())
        if name in _LABELS[axis]:
            both = [*first, *second]
            changed[name] = tuple(both[at] for at in order)
        elif axis in axes and isinstance(first, Tensor):
            at = axes.index(axis)
            changed[name] = torch.cat([first, second], dim=at).index_select(at, torch.tensor(order))
    return replace(one, **changed)
