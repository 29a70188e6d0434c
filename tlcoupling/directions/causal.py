"""The change in next-token loss when top singular directions are removed, compared with random ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import Indices, check_int, check_sublayer, resolve_indices, resolve_one_k
from tlcoupling.directions.intervention import orthonormal, project_out, random_directions
from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import model_name_of
from tlcoupling.forward.offload import device_of
from tlcoupling.forward.prompt import named_prompts
from tlcoupling.forward.split import block_hook
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.svd import truncated_svd
from tlcoupling.results.base import Provenance, Result, engines_of_prompts
from tlcoupling.text import counted

_CELLS = ("prompt", "layer")


@dataclass(frozen=True, repr=False, eq=False)
class CausalEffect(Result):
    """The change in next-token loss when directions are removed from one sublayer's write at a time.

    Attributes:
        loss: mean next-token loss of each prompt without intervention, in nats. ``[prompt]``.
        effect: its change when the directions are removed at every position that predicts a token.
            ``[prompt, layer]``.
        control: its change when random directions are removed: as many, with the same share of the write's norm at each
            position. ``[prompt, layer, draw]``.
        share: the directions' share of the write's norm, sqrt(sum_t ||Q^T a_t||^2 / sum_t ||a_t||^2), 0 to 1.
            ``[prompt, layer]``.
        control_share: the random directions' share. ``[prompt, layer, draw]``.
        prompts: the prompts' names, or their numbers.
        layers: the layers; each is intervened on alone.
        sublayer: ``"attn"``, ``"mixer"`` or ``"mlp"``.
        k: number of directions.
    """

    loss: Float[Tensor, " prompt"]
    effect: Float[Tensor, "prompt layer"]
    control: Float[Tensor, "prompt layer draw"]
    share: Float[Tensor, "prompt layer"]
    control_share: Float[Tensor, "prompt layer draw"]
    prompts: tuple[str, ...]
    layers: tuple[int, ...]
    sublayer: str
    k: int

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "loss": ("prompt",),
        "effect": _CELLS,
        "control": (*_CELLS, "draw"),
        "share": _CELLS,
        "control_share": (*_CELLS, "draw"),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "control_mean": _CELLS,
        "control_std": _CELLS,
        "excess": _CELLS,
    }

    def __repr__(self) -> str:
        """One line."""
        return (
            f"CausalEffect({counted(len(self.prompts), 'prompt')}, {self.sublayer} of {len(self.layers)} layers, "
            f"K={self.k}: loss {self.effect.mean():+.4f} without the directions, {self.control.mean():+.4f} without "
            "random ones)"
        )

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {"prompt": self.prompts, "layer": self.layers, "draw": range(self.control.shape[-1])}

    @property
    def control_mean(self) -> Float[Tensor, "prompt layer"]:
        """Return the mean of the control over its draws."""
        return self.control.mean(-1)

    @property
    def control_std(self) -> Float[Tensor, "prompt layer"]:
        """Return the standard deviation of the control over its draws; NaN for one draw."""
        return self.control.std(-1) if self.control.shape[-1] > 1 else torch.full_like(self.effect, torch.nan)

    @property
    def excess(self) -> Float[Tensor, "prompt layer"]:
        """Return effect - control_mean: the effect beyond that of random directions of the same share."""
        return self.effect - self.control_mean


@measured
def causal_effect(
    model: Any,
    prompts: Mapping[str, Any] | Sequence[Any] | Tensor,
    directions: int | float | Float[Tensor, "d_model k"] = 10,
    *,
    layers: Indices | None = None,
    sublayer: Literal["attn", "mixer", "mlp"] = "mlp",
    draws: int = 10,
    seed: int = 0,
    prepend_bos: bool | None = None,
    attention_mask: Mapping[str, Any] | Sequence[Any] | Tensor | None = None,
    engine: EngineName = "auto",
) -> CausalEffect:
    """Measure the change in next-token loss when directions are removed from a sublayer's write.

    Each layer is intervened on alone, at every position t that predicts a token. If ``directions`` is a number K, the
    top K left singular vectors of the sublayer's Jacobian from t to t are removed, the directions that coupling
    compares. If it is a tensor, the same directions are removed everywhere. The control removes a random subspace of
    the same dimension and the same share of the write's norm at each position (``random_directions``), so both leave a
    write of the same length.

    Args:
        model: as in ``trace``. It is not changed.
        prompts: prompts, or a mapping from names to prompts; each of at least two tokens.
        directions: K (an int, or a fraction of d_model), or directions ``[d_model, k]``.
        layers: block indices; by default all.
        sublayer: ``"attn"``, ``"mlp"``, or ``"mixer"`` where the model has that instead of ``"attn"``.
        draws: number of random controls, at least 1.
        seed: seed of the random numbers.
        prepend_bos: as in ``trace``.
        attention_mask: a mask for each prompt, as in ``analyze_many``.
        engine: as in ``depth_coupling``.

    Raises:
        ArgumentError: an argument out of range, a prompt of one token, linearly dependent directions, or a write of
            length zero.
        UnsupportedModelError: the model is bidirectional, so that it reads the tokens it would have to predict.
        UnsupportedModelError, NonFiniteActivationError, ResidualIdentityError: see ``trace``.

    Example:
        >>> effect = tlc.causal_effect(model, ["The capital of France is Paris"], 10, layers=[5])  # doctest: +SKIP
        >>> effect.excess, effect.control_std  # doctest: +SKIP
    """
    started = time.perf_counter()
    draws = check_int("draws", draws, 1)
    named = named_prompts(prompts, attention_mask)
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, list[Any]] = {name: [] for name in ("loss", "effect", "control", "share", "control_share")}
    engines: dict[str, Mapping[str, str]] = {}
    weight_processing, hook_settings, chosen, k = {}, {}, (), 0
    for name, prompt in named.items():
        traced = trace(model, prompt, prepend_bos=prepend_bos)
        require_loss(traced, prompt)
        check_sublayer("sublayer", sublayer, tuple(traced.writes) or ("none",), traced.refusal)
        chosen = resolve_indices("layers", layers, traced.n_layers)
        given = (
            directions if isinstance(directions, Tensor) else resolve_one_k("directions", directions, traced.d_model)
        )
        measured = _Measured(traced, sublayer, given, draws, generator, engine)
        cells = [measured.layer(layer) for layer in chosen]
        fields["loss"].append(measured.loss)
        for field in ("effect", "control", "share", "control_share"):
            fields[field].append(torch.stack([cell[field] for cell in cells]))
        engines[name] = measured.jacobians.used
        weight_processing, hook_settings, k = traced.weight_processing, traced.hook_settings, measured.k
    return CausalEffect(
        provenance=Provenance(
            model_name=model_name_of(model),
            weight_processing=weight_processing,
            settings={
                "directions": "given" if isinstance(directions, Tensor) else directions,
                "draws": draws,
                "seed": seed,
                **hook_settings,
            },
            engine=engines_of_prompts(engines),
            seconds=time.perf_counter() - started,
        ),
        **{name: torch.stack(values).cpu() for name, values in fields.items()},
        prompts=tuple(named),
        layers=chosen,
        sublayer=sublayer,
        k=k,
    )


def require_loss(traced: Trace, prompt: Any) -> None:
    """Check that the model predicts tokens of a prompt.

    Raises:
        ArgumentError: the prompt has a single token.
        UnsupportedModelError: the model is bidirectional.
    """
    if traced.n_tokens < 2:
        raise ArgumentError("prompts", prompt, "prompts of at least two tokens: the loss is that of the next token")
    if not traced.hooked_layers and not traced.causal:  # a hook of yours may read what it likes
        raise UnsupportedModelError(
            f"{traced.model_name} is bidirectional: it reads the tokens it would have to predict, so its "
            "next-token loss says nothing"
        )


def next_token_loss(traced: Trace, hooks: Sequence[Any] = ()) -> Float[Tensor, ""]:
    """Return the mean next-token loss in nats, with hooks added to those that are attached."""
    model, tokens = traced.model, traced.tokens
    ids = tokens[None].to(device_of(model))
    with torch.no_grad():
        logits = model.run_with_hooks(ids, return_type="logits", fwd_hooks=list(hooks))[0, :-1]
    return torch.nn.functional.cross_entropy(logits.double().cpu(), tokens[1:])


class _Measured:
    """Measures one prompt."""

    def __init__(
        self,
        traced: Trace,
        sublayer: str,
        directions: int | Tensor,
        draws: int,
        generator: torch.Generator,
        engine: EngineName,
    ) -> None:
        self.traced, self.sublayer, self._given = traced, sublayer, directions
        self._draws, self._generator = draws, generator
        self.k = directions if isinstance(directions, int) else orthonormal(directions).shape[-1]
        self.positions = range(traced.n_tokens - 1)
        self.jacobians = JacobianEngine(traced, engine, {(pos, pos) for pos in self.positions})
        self.loss = next_token_loss(traced)

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Return effect, control and their shares in one layer."""
        activations = self.traced.writes[self.sublayer][layer, :-1]
        bases = torch.stack([self._directions(layer, pos) for pos in self.positions]).to(activations)
        effect, share = self._without(layer, bases, activations)
        drawn = []
        for _ in range(self._draws):
            pairs = zip(bases, activations, strict=True)
            control = torch.stack([random_directions(basis, row, self._generator) for basis, row in pairs])
            drawn.append(self._without(layer, control, activations))
        changes, shares = zip(*drawn, strict=True)
        return {
            "effect": effect,
            "share": share,
            "control": torch.stack(changes),
            "control_share": torch.stack(shares),
        }

    def _directions(self, layer: int, pos: int) -> Float[Tensor, "d_model k"]:
        if isinstance(self._given, Tensor):
            return orthonormal(self._given)
        return truncated_svd(self.jacobians.operator(layer, self.sublayer, pos, pos), self._given).u

    def _without(
        self, layer: int, bases: Float[Tensor, "pos d k"], activations: Float[Tensor, "pos d"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the change in loss without the directions, and their share of the write's norm."""
        _, remove = project_out(bases, layer, positions=self.positions)
        write = block_hook(layer, self.traced.block(layer).sublayers[self.sublayer].write)
        changed = next_token_loss(self.traced, [(write, remove)]) - self.loss
        taken = (bases.mT @ activations[..., None]).norm() / activations.norm()
        return changed, taken.double().cpu()
