r"""Steering: the directions that move a later layer most, and what adding a direction does to the model.

A steering vector is added to the stream behind one block, at several positions. The top right singular vectors of the
Jacobian from there to a later place move that place most, to first order. ``steering_effect`` adds a vector for real
and compares the change of the next-token distribution with that of random directions of the same length.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcoupling.arguments import Indices, as_list, check_index, check_int, resolve_indices
from tlcoupling.directions.intervention import orthonormal, random_directions
from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.forward.context import measured
from tlcoupling.forward.offload import device_of
from tlcoupling.forward.prompt import named_prompts
from tlcoupling.forward.split import block_hook
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import truncated_svd
from tlcoupling.linalg.triplets import Triplets
from tlcoupling.results.base import Result, engines_of_prompts
from tlcoupling.results.intervals import mean_interval
from tlcoupling.slices.sites import SiteSpec
from tlcoupling.slices.slice import slice_jacobian
from tlcoupling.text import counted

if TYPE_CHECKING:
    import pandas

_CELLS = ("prompt", "scale")
CONTROLS = ("length", "share")
DIRECTIONS = ("the direction", "random")
_ROWS = 800  # positions of prompts with another direction each that run together


@measured
def steering_vector(
    trace: Trace,
    layer: int,
    target: SiteSpec,
    *,
    k: int = 1,
    src: Indices = "all",
    dest: Indices = "all",
    engine: EngineName = "auto",
) -> Triplets:
    """The directions that, added behind a block at several positions, move a later place most, to first order.

    Args:
        trace: a trace of the model.
        layer: the block behind which they are added.
        target: the later place, as in ``slice_jacobian``.
        k: number of directions.
        src: positions at which the same vector is added.
        dest: positions whose mean is moved.
        engine: as in ``slice_jacobian``.

    Returns:
        Triplets: ``v`` holds unit directions in columns, ``u`` how the target moves, ``s`` by how much.

    Raises:
        ValueError: as ``slice_jacobian`` and ``truncated_svd``.

    Example:
        >>> vectors = tlc.steering_vector(trace, 3, ("resid_post", 20), k=8)  # doctest: +SKIP
        >>> model.run_with_hooks(tokens, fwd_hooks=[tlc.add_direction(vectors.v[:, 0], 3, scale=5.0)])  # doctest: +SKIP
    """
    jacobian = slice_jacobian(
        trace, ("resid_post", layer), target, src=src, dest=dest, src_mode="same", dest_mode="same", engine=engine
    )
    return truncated_svd(jacobian, k)


@dataclass(frozen=True, repr=False, eq=False)
class SteeringEffect(Result):
    r"""What adding a direction to the stream does to the next-token distribution, beside random directions.

    Attributes:
        kl: KL(p || q) in nats of the next-token distribution p at the last token and the steered one q.
            ``[prompt, scale]``.
        logits: the change of the named tokens' logits there, less the mean change of all logits, which changes no
            probability. ``[prompt, scale, token]``.
        loss: the change of the mean next-token loss of the prompt. ``[prompt, scale]``.
        linear_gap: ||change - linear prediction|| / ||change|| of all logits at the last token. ``[prompt, scale]``.
        control_kl, control_loss: the same for random directions: of the vector's length (``"length"``), and of its
            length and its share of the stream (``"share"``). ``[prompt, scale, control, draw]``.
        prompts: the prompts' names, or their numbers.
        scales: by what the vector is multiplied.
        tokens: ids of the named tokens.
        layer: the block behind which it is added.
        texts: what the model generates greedily, ``texts[prompt][direction][place]``: the directions are ``"the
            direction"`` and a random one of its length, the places scale 0 and ``scales``. Empty unless asked for.
    """

    kl: Float[Tensor, "prompt scale"]
    logits: Float[Tensor, "prompt scale token"]
    loss: Float[Tensor, "prompt scale"]
    linear_gap: Float[Tensor, "prompt scale"]
    control_kl: Float[Tensor, "prompt scale control draw"]
    control_loss: Float[Tensor, "prompt scale control draw"]
    prompts: tuple[str, ...]
    scales: tuple[float, ...]
    tokens: tuple[int, ...]
    layer: int
    texts: tuple[Any, ...] = ()

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "kl": _CELLS,
        "logits": (*_CELLS, "token"),
        "loss": _CELLS,
        "linear_gap": _CELLS,
        "control_kl": (*_CELLS, "control", "draw"),
        "control_loss": (*_CELLS, "control", "draw"),
    }

    def __repr__(self) -> str:
        """One line."""
        pairs = zip(self.scales, self.kl.mean(0), self.control_kl.mean((0, 2, 3)), strict=True)
        shown = ", ".join(f"{scale:g}: {kl:.3g} ({random:.3g})" for scale, kl, random in pairs)
        return f"SteeringEffect({counted(len(self.prompts), 'prompt')}, KL by scale (random directions): {shown})"

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "prompt": self.prompts,
            "scale": self.scales,
            "token": self.tokens,
            "control": CONTROLS,
            "draw": range(self.control_kl.shape[-1]),
        }

    def excess(self, confidence: float = 0.95) -> dict[str, Tensor]:
        """KL less the mean over random directions: its mean over prompts and interval, ``[scale, control]`` each.

        Returns:
            ``estimate``, ``low``, ``high``, ``standard_error`` and ``units``, as an ``Interval`` has them.

        Raises:
            ArgumentError: a confidence that is not between 0 and 1.

        Warns:
            UserWarning: fewer than 6 prompts: the ends are NaN.
        """
        return mean_interval(self.kl[..., None] - self.control_kl.mean(-1), confidence, "excess")

    def generated(self, allowed: float = 0.1) -> pandas.DataFrame:
        """Return one row per generated text: ``prompt``, ``direction``, ``scale``, ``within_reach`` and ``text``.

        ``within_reach`` says whether the linear prediction for the vector is off by ``allowed`` at most, at this scale
        and all smaller ones.

        Raises:
            ArgumentError: nothing was generated.
        """
        import pandas as pd

        if not self.texts:
            raise ArgumentError("new_tokens", 0, "steering_effect(..., new_tokens=20) or so, which generates text")
        reach = self.reach(allowed).tolist()
        rows = [
            (prompt, direction, scale, scale == 0 or abs(scale) <= abs(far), text)
            for prompt, far, of_prompt in zip(self.prompts, reach, self.texts, strict=True)
            for direction, of_direction in zip(DIRECTIONS, of_prompt, strict=True)
            for scale, text in zip((0.0, *self.scales), of_direction, strict=True)
        ]
        return pd.DataFrame(rows, columns=["prompt", "direction", "scale", "within_reach", "text"])

    def reach(self, allowed: float = 0.1) -> Float[Tensor, " prompt"]:
        """Return the largest scale up to which the linear prediction is off by ``allowed`` at most; NaN if none is."""
        order = sorted(range(len(self.scales)), key=lambda index: abs(self.scales[index]))
        holds = (self.linear_gap[:, order] <= allowed).long().cumprod(1).sum(1)
        return self.kl.new_tensor([float("nan"), *(self.scales[index] for index in order)])[holds]


@measured
def steering_effect(
    model: Any,
    prompts: Mapping[str, Any] | Sequence[Any] | Tensor,
    vector: Float[Tensor, " d_model"],
    layer: int,
    scales: Iterable[float] = (1.0, 2.0, 4.0, 8.0),
    *,
    positions: Indices = "all",
    tokens: Any = (),
    draws: int = 100,
    new_tokens: int = 0,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> SteeringEffect:
    """Measure what a vector does when it is added to the stream behind a block, beside random directions.

    Args:
        model: as in ``trace``. It is not changed.
        prompts: prompts, or a mapping from names to prompts; each of at least two tokens.
        vector: the direction, with its length.
        layer: the block behind which it is added.
        scales: by what it is multiplied; not 0.
        positions: positions at which it is added.
        tokens: ids of tokens whose logits are reported.
        draws: number of random directions of each kind.
        new_tokens: number of tokens to generate after each prompt, greedily, with the vector and with a random
            direction of its length; ``generated()`` shows them. With ``positions="all"`` they are added at new tokens
            too.
        seed: seed of the random numbers.
        prepend_bos: as in ``trace``.

    Raises:
        ArgumentError: an argument out of range, a prompt of one token, a vector of length zero.
        UnsupportedModelError: the model is bidirectional, so that it predicts no next token.

    Example:
        >>> effect = tlc.steering_effect(model, texts, vectors.v[:, 0], 3, scales=[4, 8])  # doctest: +SKIP
        >>> effect.excess()["low"]  # doctest: +SKIP
    """
    started = time.perf_counter()
    named, draws = named_prompts(prompts), check_int("draws", draws, 1)
    new_tokens = check_int("new_tokens", new_tokens, 0)
    scales = tuple(float(scale) for scale in scales)
    if not scales or not all(0 < abs(scale) < float("inf") for scale in scales):
        raise ArgumentError("scales", scales, "one or more finite numbers, not 0")
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Tensor]] = []
    texts: list[tuple[tuple[str, ...], ...]] = []
    engines: dict[str, Mapping[str, str]] = {}
    traced, chosen = None, ()
    for name, prompt in named.items():
        traced = trace(model, prompt, prepend_bos=prepend_bos)
        if traced.n_tokens < 2:
            raise ArgumentError("prompts", prompt, "prompts of at least two tokens: the loss is that of the next token")
        if not traced.hooked_layers and not traced.causal:
            raise UnsupportedModelError(f"{traced.model_name} is bidirectional, and predicts no next token")
        chosen = tuple(check_index("tokens", token, int(traced.model.cfg.d_vocab)) for token in as_list(tokens))
        steered = _Steered(traced, vector, layer, resolve_indices("positions", positions, traced.n_tokens))
        rows.append(steered.measure(scales, chosen, draws, generator))
        if new_tokens:
            texts.append(steered.texts(scales, new_tokens, generator))
        engines[name] = {"block": ", ".join(sorted(set(steered.linear.engine.values())))}
    assert traced is not None  # named_prompts refuses an empty list
    settings = {"draws": draws, "seed": seed, "positions": positions, "length": float(vector.norm())}
    return SteeringEffect(
        provenance=traced.provenance(
            settings=settings, seconds=time.perf_counter() - started, engine=engines_of_prompts(engines)
        ),
        **{field: torch.stack([row[field] for row in rows]) for field in rows[0]},
        prompts=tuple(named),
        scales=scales,
        tokens=chosen,
        layer=check_index("layer", layer, traced.n_layers),
        texts=tuple(texts),
    )


class _Steered:
    """One prompt, with directions added."""

    def __init__(self, traced: Trace, vector: Tensor, layer: int, positions: tuple[int, ...]) -> None:
        self.traced, self.positions = traced, positions
        self.layer = check_index("layer", layer, traced.n_layers)
        if vector.shape != (traced.d_model,) or not 0 < float(vector.norm()) < float("inf"):
            allowed = f"a vector of d_model = {traced.d_model} numbers, of finite length above zero"
            raise ArgumentError("vector", f"{tuple(vector.shape)} of length {float(vector.norm()):g}", allowed)
        self.vector = vector.detach().to(traced.resid)
        self.linear = slice_jacobian(traced, ("resid_post", self.layer), "logits", src=positions, src_mode="same")
        self._still = self._logits(self.vector.new_zeros(1, traced.d_model))

    def measure(
        self, scales: Sequence[float], tokens: Sequence[int], draws: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the fields of ``SteeringEffect`` for this prompt."""
        controls = self._random(draws, generator)
        straight = self.linear.mv(self.vector).double().cpu()
        fields: dict[str, list[Tensor]] = {}
        for scale in scales:
            logits = self._logits(scale * self.vector[None])
            kl, loss = self._changes(logits)
            control_kl, control_loss = self._of_controls(scale * controls)
            change = (logits - self._still)[0, -1]
            gap = (change - scale * straight).norm() / change.norm()
            named = change[list(tokens)] - change.mean()
            values = (kl[0], loss[0], gap, named, control_kl, control_loss)
            for name, value in zip(
                ("kl", "loss", "linear_gap", "logits", "control_kl", "control_loss"), values, strict=True
            ):
                fields.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in fields.items()}

    def _random(self, draws: int, generator: torch.Generator) -> Float[Tensor, "control draw d_model"]:
        """Random directions of the vector's length, and of its length and share of the mean stream."""
        mean = self.traced.resid[self.layer + 1][list(self.positions)].mean(0)
        length, unit = self.vector.norm(), orthonormal(self.vector)
        free = torch.randn(draws, len(mean), generator=generator, dtype=torch.float64).to(mean)
        sign = torch.sign(self.vector @ mean)
        shared = [sign * random_directions(unit, mean, generator)[:, 0].to(mean) for _ in range(draws)]
        return length * torch.stack([free / free.norm(dim=1, keepdim=True), torch.stack(shared)])

    def _of_controls(self, moves: Float[Tensor, "control draw d_model"]) -> tuple[Tensor, Tensor]:
        """KL and change of loss of many directions, a few at a time."""
        at_once = max(1, _ROWS // self.traced.n_tokens)
        parts = [self._changes(self._logits(some)) for some in moves.flatten(0, 1).split(at_once)]
        kl, loss = (torch.cat(each).unflatten(0, moves.shape[:2]) for each in zip(*parts, strict=True))
        return kl, loss

    def texts(self, scales: Sequence[float], count: int, generator: torch.Generator) -> tuple[tuple[str, ...], ...]:
        """Return what is generated with the vector and with a random direction of its length, without and by scale."""
        random = self._random(1, generator)[0, 0]
        moves = torch.stack([scale * vector for vector in (self.vector, random) for scale in (0.0, *scales)])
        tokens = self.traced.tokens[None].expand(len(moves), -1).cpu()
        for _ in range(count):
            tokens = torch.cat([tokens, self._logits(moves, tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
        new = tokens[:, self.traced.n_tokens :].tolist()
        tokenizer = getattr(self.traced.model, "tokenizer", None)
        made = [" ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids) for ids in new]
        return tuple(made[: len(scales) + 1]), tuple(made[len(scales) + 1 :])

    @torch.no_grad()
    def _logits(
        self, moves: Float[Tensor, "move d_model"], tokens: Int[Tensor, "move pos"] | None = None
    ) -> Float[Tensor, "move pos vocabulary"]:
        """The model's logits with each vector added, on the trace's tokens or on longer ones."""
        model = self.traced.model
        rows = slice(None) if len(set(self.positions)) == self.traced.n_tokens else list(self.positions)

        def act(activation: Tensor, hook: Any) -> Tensor:
            moved = activation.clone()
            moved[:, rows] += moves[:, None].to(activation)
            return moved

        if tokens is None:
            tokens = self.traced.tokens[None].expand(len(moves), -1)
        tokens = tokens.to(device_of(model))
        hooks = [(block_hook(self.layer, "hook_resid_post"), act)]
        return model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks).double().cpu()

    def _changes(
        self, logits: Float[Tensor, "move pos vocabulary"]
    ) -> tuple[Float[Tensor, " move"], Float[Tensor, " move"]]:
        """KL at the last token, and the change of the mean next-token loss."""
        still, moved = self._still.log_softmax(-1), logits.log_softmax(-1)
        kl = (still[:, -1].exp() * (still[:, -1] - moved[:, -1])).sum(-1)
        following = self.traced.tokens[1:].cpu()[None, :, None]
        losses = [-each[:, :-1].gather(-1, following.expand(len(each), -1, -1)).mean((1, 2)) for each in (moved, still)]
        return kl, losses[0] - losses[1]
