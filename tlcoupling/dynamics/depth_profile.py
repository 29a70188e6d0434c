r"""What each layer does to the stream and to the loss, in one table, and how that goes with its coupling.

Sources: block influence, Men et al., "ShortGPT", 2024, arXiv 2403.03853; angular distance, Gromov et al., "The
Unreasonable Ineffectiveness of the Deeper Layers", 2024, arXiv 2403.17887 (there at the last token, here over all);
linearity, Razzhigaev et al., "Your Transformer is Secretly Linear", 2024, arXiv 2405.12250.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import resolve_one_k, resolve_sublayers
from tlcoupling.coupling.depth import depth_coupling
from tlcoupling.directions.causal import next_token_loss, require_loss
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import model_name_of
from tlcoupling.forward.prompt import named_prompts
from tlcoupling.forward.split import block_hook
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.models.baseline import baseline_model
from tlcoupling.progress import ticking
from tlcoupling.results.base import Provenance, Result, engines_of_prompts
from tlcoupling.results.intervals import Interval, mean_interval
from tlcoupling.text import counted
from tlcoupling.trajectory.growth import find_sinks
from tlcoupling.trajectory.linearity import length, unit

TOKENS_PER_WIDTH = 10  # fewer tokens fit a linear map to anything
AGAINST = ("influence", "angular_distance", "cosine", "linearity", "linearity_of_write", "loss_effect", "layer")
_CELLS = ("prompt", "sublayer", "layer")
_POOLED = ("sublayer", "layer")
_GEOMETRY = ("influence", "influence_null", "angular_distance", "angular_null", "cosine")


@dataclass(frozen=True, repr=False, eq=False)
class DepthProfile(Result):
    r"""What each layer, and each sublayer of it, does: one row of a table for each.

    A sublayer reads x and adds w(x); a block reads x^l and adds x^{l+1} - x^l. ``influence``, ``angular_distance`` and
    ``cosine`` are means over the tokens of a prompt. Linearity is fitted over the tokens of all prompts and texts.

    Attributes:
        influence: block influence, 1 - cos(x, x + w), from 0 to 2. ``[prompt, sublayer, layer]``.
        influence_null: its value for a step of the same length at a right angle to x, as random directions nearly are:
            1 - 1 / sqrt(1 + ||w||^2 / ||x||^2). Same axes.
        angular_distance: arccos(cos(x, x + w)) / pi, from 0 to 1. Same axes.
        angular_null: its value for such a step. Same axes.
        cosine: cos(x, w). Random directions give 0, with a standard deviation of 1 / sqrt(d_model) at a token. Same
            axes.
        loss_effect: change of the mean next-token loss, in nats, without the write: x + w replaced by x in this layer
            alone. Same axes.
        coupling: mean excess of depth-wise coupling with all other layers, as row and as column, at the last token. Its
            chance level is 0. Same axes.
        linearity: 1 - min_A ||X A - Y||^2 / ||Y||^2 with rows x and x + w, both centred over tokens, ``[sublayer,
            layer]``. This is the source's score with the residual.
        linearity_of_write: the same for w alone, without the residual. Same axes.
        linearity_null: both scores where Y has nothing to do with X: rank(X) / (tokens - 1). Same axes.
        loss: mean next-token loss of each prompt, ``[prompt]``.
        prompts: the prompts' names, or their numbers.
        sublayers: ``block`` and those that the model has.
        layers: all layers.
        n_tokens: number of tokens over which linearity was fitted.
        k: number of singular vectors of the coupling.
        baseline: the same of another model, such as fresh weights; None if it was not measured.
    """

    influence: Float[Tensor, "prompt sublayer layer"]
    influence_null: Float[Tensor, "prompt sublayer layer"]
    angular_distance: Float[Tensor, "prompt sublayer layer"]
    angular_null: Float[Tensor, "prompt sublayer layer"]
    cosine: Float[Tensor, "prompt sublayer layer"]
    loss_effect: Float[Tensor, "prompt sublayer layer"]
    coupling: Float[Tensor, "prompt sublayer layer"]
    linearity: Float[Tensor, "sublayer layer"]
    linearity_of_write: Float[Tensor, "sublayer layer"]
    linearity_null: Float[Tensor, "sublayer layer"]
    loss: Float[Tensor, " prompt"]
    prompts: tuple[str, ...]
    sublayers: tuple[str, ...]
    layers: tuple[int, ...]
    n_tokens: int
    k: int
    baseline: DepthProfile | None = None

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys((*_GEOMETRY, "loss_effect", "coupling"), _CELLS),
        **dict.fromkeys(("linearity", "linearity_of_write", "linearity_null"), _POOLED),
        "loss": ("prompt",),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {"rho": ("prompt", "against", "sublayer")}

    def __repr__(self) -> str:
        """One line."""
        sizes = f"{counted(len(self.prompts), 'prompt')}, {counted(self.n_tokens, 'token')}"
        block = self.influence[:, 0].mean(), self.linearity[0].mean(), self.loss_effect[:, 0].mean()
        shown = "influence {:.4f}, linearity {:.4f}, loss without it {:+.4f}".format(*block)
        return f"DepthProfile({len(self.layers)} layers, {sizes}; mean block: {shown})"

    @property
    def rho(self) -> Float[Tensor, "prompt against sublayer"]:
        """Return Spearman's correlation over layers between each quantity and coupling, by prompt.

        ``layer`` is the layer's index: a quantity that only follows depth goes with coupling as far as coupling follows
        depth. NaN where one of the two is constant.
        """
        depth = torch.arange(len(self.layers), dtype=torch.float64)
        columns = [depth if name == "layer" else getattr(self, name) for name in AGAINST]
        return torch.stack([spearman(self.coupling, column.expand_as(self.coupling)) for column in columns], dim=1)

    def correlation(self, confidence: float = 0.95) -> Interval:
        """Return the mean of ``rho`` over prompts with its confidence interval.

        Prompts are the independent units. Layers are not: neighbours resemble each other, so unrelated smooth profiles
        correlate over them by chance, in all prompts alike. Compare with the row ``layer``, and with a baseline.

        Args:
            confidence: level of the interval, between 0 and 1.

        Raises:
            ArgumentError: ``confidence`` out of range.

        Warns:
            UserWarning: fewer than 6 prompts, or equal ones: the ends are NaN.
        """
        fields: dict[str, Any] = mean_interval(self.rho, confidence, "rho")
        fields |= {end: fields[end].clamp(-1, 1) for end in ("low", "high")}  # no mean of correlations is beyond
        return Interval(
            provenance=self.provenance,
            **fields,
            quantity="rho",
            by="prompt",
            confidence=confidence,
            axes=("against", "sublayer"),
            labels=(AGAINST, self.sublayers),
        )

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {"prompt": self.prompts, "sublayer": self.sublayers, "layer": self.layers, "against": AGAINST}


@measured
def depth_profile(
    model: Any,
    prompts: Mapping[str, Any] | Sequence[Any] | Tensor,
    k: int | float = 10,
    *,
    texts: Mapping[str, Any] | Sequence[Any] | Tensor = (),
    sublayers: str | Sequence[str] | None = None,
    include_sinks: bool = False,
    prepend_bos: bool | None = None,
    attention_mask: Mapping[str, Any] | Sequence[Any] | Tensor | None = None,
    baseline: Any | None = None,
    engine: EngineName = "auto",
    progress: bool | None = None,
) -> DepthProfile:
    """Measure what each layer and sublayer does to the stream and to the loss, beside its coupling.

    A linear map of width d fits anything to fewer than d tokens: the linearity of unrelated noise is rank / (tokens -
    1). Give prompts and ``texts`` of at least 10 d_model tokens together. The activations of all of them are held.

    Sinks (``Growth.sinks``), mostly the first token, have a far longer residual stream than all others, and would take
    nearly all of the variance that linearity shares out. They are left out of all but the loss.

    Args:
        model: as in ``trace``. It is not changed.
        prompts: prompts, or a mapping from names to prompts; each of at least two tokens.
        k: K of the coupling: an int, or a fraction of d_model.
        texts: more prompts, over whose tokens linearity alone is fitted, together with those of ``prompts``. They cost
            one run of the model each.
        sublayers: as in ``depth_coupling``; each costs a run of the model for each layer and prompt.
        include_sinks: whether sinks count, as in the published scores.
        prepend_bos: as in ``trace``.
        attention_mask: a mask for each prompt, as in ``analyze_many``.
        baseline: as in ``eigen_geometry``; measured on the same prompts.
        engine: as in ``depth_coupling``.
        progress: show a progress bar; by default on a terminal or in a notebook, after two seconds.

    Raises:
        ArgumentError: an argument out of range; a prompt of one token; fewer than two layers or tokens that count.
        UnsupportedModelError: the model is bidirectional, so that it reads the tokens it would have to predict.
        NonFiniteActivationError: NaN or infinite activations.

    Warns:
        UserWarning: fewer than 10 d_model tokens: linearity is then mostly that of noise.

    Example:
        >>> profile = tlc.depth_profile(model, texts, baseline="fresh")  # doctest: +SKIP
        >>> profile.correlation()  # with coupling, over layers # doctest: +SKIP
    """
    started = time.perf_counter()
    named = named_prompts(prompts, attention_mask)
    traces: dict[str, Trace] = {}
    counting: dict[str, Tensor] = {}
    engines: dict[str, Mapping[str, str]] = {}
    rows, names, rank = [], (), 0
    for name, prompt in ticking(list(named.items()), "prompts", progress):
        traced = traces[name] = trace(model, prompt, prepend_bos=prepend_bos)
        require_loss(traced, prompt)
        if traced.n_layers < 2:
            raise ArgumentError("model", traced.model_name, "a model of two or more layers, for coupling across them")
        names = resolve_sublayers(sublayers, traced.sublayers, traced.refusal)
        rank = resolve_one_k("k", k, traced.d_model)
        coupling = depth_coupling(traced, rank, sublayers=names, engine=engine, progress=False)
        engines[name] = coupling.provenance.engine
        loss = next_token_loss(traced)
        effects = [[_without(traced, layer, each) - loss for layer in range(traced.n_layers)] for each in names]
        counting[name] = _counting(traced, include_sinks)
        geometry = [_geometry(traced, each, counting[name]) for each in names]
        rows.append(
            {
                **{field: torch.stack([each[field] for each in geometry]) for field in _GEOMETRY},
                "loss_effect": torch.stack([torch.stack(row) for row in effects]),
                "coupling": _with_others(coupling.excess[:, 0, 0]),
                "loss": loss,
            }
        )
    first = next(iter(traces.values()))
    named_texts = {f"text {name}": text for name, text in named_prompts(texts).items()} if len(texts) else {}
    for name, text in named_texts.items():
        traces[name] = trace(model, text, prepend_bos=prepend_bos)
        counting[name] = _counting(traces[name], include_sinks)
    n_tokens = sum(int(each.sum()) for each in counting.values())
    if n_tokens < 2:
        raise ArgumentError("prompts", list(named), "two or more tokens that are not sinks")
    if n_tokens < TOKENS_PER_WIDTH * first.d_model:
        warnings.warn(
            f"linearity over {n_tokens} tokens is partly that of any noise, "
            f"{min(first.d_model, n_tokens - 1) / (n_tokens - 1):.2f}: give {TOKENS_PER_WIDTH} d_model = "
            f"{TOKENS_PER_WIDTH * first.d_model} or more",
            stacklevel=3,
        )
    pooled, ids = _pooled(traces, counting, names), {name: traced.tokens for name, traced in traces.items()}
    traces.clear()  # as large as all of the baseline's
    other = None
    if baseline is not None:
        how: dict[str, Any] = {"sublayers": names, "include_sinks": include_sinks, "engine": engine}
        how["texts"] = [ids.pop(name) for name in named_texts]
        other = depth_profile(baseline_model(baseline, first.model), ids, rank, **how, progress=progress)
    return DepthProfile(
        provenance=Provenance(
            model_name=model_name_of(model),
            weight_processing=first.weight_processing,
            settings={"k": rank, "include_sinks": include_sinks, **first.hook_settings},
            engine=engines_of_prompts(engines),
            seconds=time.perf_counter() - started,
        ),
        **{field: torch.stack([row[field] for row in rows]) for field in rows[0]},
        **pooled,
        prompts=tuple(named),
        sublayers=names,
        layers=tuple(range(first.n_layers)),
        n_tokens=n_tokens,
        k=rank,
        baseline=other,
    )


def spearman(first: Float[Tensor, "*rest n"], second: Float[Tensor, "*rest n"]) -> Float[Tensor, "*rest"]:
    """Return Spearman's rank correlation along the last axis, ties sharing their mean rank; NaN if one is constant."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(each.double().numpy(), axis=-1)) for each in (first, second)]
    a, b = (each - each.mean(-1, keepdim=True) for each in ranks)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def linearity_scores(x: Float[Tensor, "token d"], write: Float[Tensor, "token d"]) -> dict[str, Float[Tensor, ""]]:
    """Return the least-squares linearity of x -> x + write and of x -> write, and their value for noise.

    What a linear map of x cannot explain is the same for both, since x itself is linear in x.
    """
    x, write = (each.double() - each.double().mean(0) for each in (x, write))
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    u = u[:, s > max(x.shape) * torch.finfo(x.dtype).eps * s[:1]]
    unexplained = (write - u @ (u.mT @ write)).square().sum()
    return {
        "linearity": 1 - unexplained / (x + write).square().sum(),
        "linearity_of_write": 1 - unexplained / write.square().sum(),
        "linearity_null": x.new_tensor(u.shape[1] / (len(x) - 1)),
    }


def _counting(traced: Trace, include_sinks: bool) -> Tensor:
    """Return which positions count."""
    sinks = find_sinks(length(traced.resid)).cpu()
    return torch.ones_like(sinks) if include_sinks else ~sinks


def _write(
    traced: Trace, layer: int, sublayer: str, counting: Tensor
) -> tuple[Float[Tensor, "token d"], Float[Tensor, "token d"]]:
    """Return what a sublayer, or the block, reads at the tokens that count, and what it adds to that."""
    if sublayer == "block":
        both = traced.resid[layer], traced.resid[layer + 1] - traced.resid[layer]
    else:
        both = traced.read_by(layer, sublayer), traced.writes[sublayer][layer]
    x, write = (each[counting].cpu() for each in both)
    return x, write


def _geometry(traced: Trace, sublayer: str, counting: Tensor) -> dict[str, Float[Tensor, " layer"]]:
    """Return the means over tokens, by layer."""
    means = [_angles(*_write(traced, layer, sublayer, counting)) for layer in range(traced.n_layers)]
    return {name: torch.stack([each[name] for each in means]) for name in _GEOMETRY}


def _angles(x: Float[Tensor, "token d"], write: Float[Tensor, "token d"]) -> dict[str, Float[Tensor, ""]]:
    """Return the means over tokens of a step from x to x + write."""
    x, write = x.double(), write.double()
    after = x + write
    cosine = (unit(x) * unit(after)).sum(-1).clamp(-1, 1)
    ratio = length(write) / length(x)
    # the angle from both sides of the triangle: arccos loses half of the digits of a small one
    angle = 2 * torch.atan2(length(unit(x) - unit(after)), length(unit(x) + unit(after)))
    found = {
        "influence": 1 - cosine,
        "influence_null": 1 - (1 + ratio.square()).rsqrt(),
        "angular_distance": angle / torch.pi,
        "angular_null": ratio.atan() / torch.pi,
        "cosine": (unit(x) * unit(write)).sum(-1),
    }
    return {name: each.nanmean() for name, each in found.items()}


def _without(traced: Trace, layer: int, sublayer: str) -> Float[Tensor, ""]:
    """Return the loss where a sublayer, or the block, adds nothing."""
    if sublayer != "block":
        write = block_hook(layer, traced.block(layer).sublayers[sublayer].write)
        return next_token_loss(traced, [(write, lambda tensor, hook: torch.zeros_like(tensor))])
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor.clone())

    put_back = block_hook(layer, "hook_resid_post"), lambda tensor, hook: kept[-1].to(tensor)
    return next_token_loss(traced, [(block_hook(layer, "hook_resid_pre"), keep), put_back])


def _with_others(excess: Float[Tensor, "sublayer layer layer"]) -> Float[Tensor, "sublayer layer"]:
    """Return the mean excess of each layer with all others, as row and as column."""
    others = ~torch.eye(excess.shape[-1], dtype=torch.bool)
    kept = excess.double() * others
    return (kept.sum(-1) + kept.sum(-2)) / (2 * (excess.shape[-1] - 1))


def _pooled(
    traces: Mapping[str, Trace], counting: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Float[Tensor, "sublayer layer"]]:
    """Return the linearity scores over the tokens of all prompts."""

    def score(layer: int, sublayer: str) -> dict[str, Float[Tensor, ""]]:
        both = [_write(one, layer, sublayer, counting[name]) for name, one in traces.items()]
        x, write = (torch.cat(parts) for parts in zip(*both, strict=True))
        return linearity_scores(x, write)

    n_layers = next(iter(traces.values())).n_layers
    cells = [[score(layer, sublayer) for layer in range(n_layers)] for sublayer in names]
    return {
        field: torch.stack([torch.stack([cell[field] for cell in row]) for row in cells])
        for field in ("linearity", "linearity_of_write", "linearity_null")
    }
