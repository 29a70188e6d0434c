r"""The Jacobian lens: the transport of the residual stream from each layer to the last, averaged over prompts.

$$ J_l = \frac{1}{|V|} \sum_{t \in V} \sum_{t' \in V} \frac{\partial x^L_{t'}}{\partial x^{l+1}_t} $$

for each prompt, with V all its positions but the leading ones and the last; prompts count equally. All cotangents of a
prompt go down through the blocks' derivatives together, one product of matrices a layer. In a causal model only V's own
positions lie on the way, and the others are left out.

Source: Gurnee et al. 2026; its estimator is the one of ``transformer_lens.tools.analysis.jacobian_lens``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import Indices, check_int, resolve_indices
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.prompt import named_prompts
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.precision import full_precision
from tlcoupling.progress import ticking
from tlcoupling.results.base import Result, engines_of_prompts
from tlcoupling.slices.flows import Flows
from tlcoupling.slices.sites import Placement, part_between
from tlcoupling.slices.slice import vectors_through
from tlcoupling.text import counted

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False, eq=False)
class JacobianLens(Result):
    """The averaged transport from the output of each block to that of the last one.

    Attributes:
        matrices: J_l, output coordinates in rows, ``[layer, out, in]``.
        squares: the mean over prompts of ||J_l||_F^2 of a single prompt, ``[layer]``.
        layers: blocks whose output is transported.
        n_prompts: number of prompts.
        skipped: leading positions of each prompt that were left out.
        sketched: number of random cotangents a prompt; None where all were taken.
    """

    matrices: Float[Tensor, "layer out in"]
    squares: Float[Tensor, " layer"]
    layers: tuple[int, ...]
    n_prompts: int
    skipped: int
    sketched: int | None

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"matrices": ("layer", "out", "in"), "squares": ("layer",)}

    def __repr__(self) -> str:
        """One line."""
        worst = float(self.error.max())
        return (
            f"JacobianLens({len(self.layers)} layers, {counted(self.n_prompts, 'prompt')}: standard error "
            f"{worst:.1%} at most)"
        )

    def _coords(self) -> dict[str, Sequence[Any]]:
        width = self.matrices.shape[-1]
        return {"layer": self.layers, "out": range(width), "in": range(width)}

    @property
    def error(self) -> Float[Tensor, " layer"]:
        """The standard error over prompts, ||.||_F relative to the mean's; NaN for one prompt."""
        mean = self.matrices.square().sum((1, 2))
        spread = (self.squares - mean).clamp_min(0) / (self.n_prompts - 1 if self.n_prompts > 1 else torch.nan)
        return (spread / mean).sqrt()

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per layer: ``layer``, ``norm`` (||J_l||_F) and ``error``. The matrices are left out."""
        import pandas as pd

        norms = self.matrices.flatten(1).norm(dim=1)
        return pd.DataFrame({"layer": self.layers, "norm": norms.tolist(), "error": self.error.tolist()})

    @full_precision()
    def transport(self, resid: Float[Tensor, "*batch d_model"], layer: int) -> Float[Tensor, "*batch d_model"]:
        """Map the output of a block to that of the last one, to first order: J_l x.

        Raises:
            ArgumentError: the lens does not hold the layer.
        """
        if layer not in self.layers:
            raise ArgumentError("layer", layer, f"one of the lens's layers, {', '.join(map(str, self.layers))}")
        return resid.to(self.matrices) @ self.matrices[self.layers.index(layer)].mT

    @classmethod
    def merge(cls, lenses: Iterable[JacobianLens]) -> JacobianLens:
        """Return the lens over the prompts of several, which must be of one model, layers and settings.

        Args:
            lenses: the lenses; of a generator, one is held in memory at a time.

        Raises:
            ArgumentError: they are not, or there are none.
        """
        first, total, seconds = None, 0, 0.0
        sums: dict[str, Tensor] = {}
        engines: dict[str, Mapping[str, str]] = {}
        for index, lens in enumerate(lenses):
            if first is None:
                first = lens
            for name, ours, theirs in (
                *((name, getattr(first, name), getattr(lens, name)) for name in ("layers", "skipped", "sketched")),
                ("model", first.provenance.model_name, lens.provenance.model_name),
            ):
                if ours != theirs:
                    raise ArgumentError("lenses", theirs, f"lenses of the same {name}")
            for name in ("matrices", "squares"):
                share = lens.n_prompts * getattr(lens, name)
                sums[name] = sums[name].add_(share) if index else share
            total, seconds = total + lens.n_prompts, seconds + lens.provenance.seconds
            engines[str(index)] = lens.provenance.engine
        if first is None:
            raise ArgumentError("lenses", [], "one or more lenses")
        provenance = replace(first.provenance, engine=engines_of_prompts(engines), seconds=seconds)
        means = {name: one / total for name, one in sums.items()}
        return replace(first, provenance=provenance, n_prompts=total, **means)

    def to_transformer_lens(self) -> Any:
        """Return the same lens as TransformerLens's own, whose ``save`` writes the usual ``.pt`` file.

        Raises:
            ImportError: the installed TransformerLens has none (it comes with 4.3).
        """
        from transformer_lens.tools.analysis.jacobian_lens import JacobianLens as Theirs

        matrices = dict(zip(self.layers, self.matrices, strict=True))
        return Theirs(matrices, n_prompts=self.n_prompts, d_model=self.matrices.shape[-1])


@measured
def jacobian_lens(
    model: Any,
    prompts: Mapping[str, Any] | Sequence[Any] | Tensor,
    *,
    layers: Indices | None = None,
    skip_first_positions: int = 16,
    sketch: int | None = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    engine: EngineName = "auto",
    progress: bool | None = None,
) -> JacobianLens:
    """Average the transport of the residual stream from each block's output to the last one's over prompts.

    Args:
        model: as in ``trace``. It is not changed.
        prompts: prompts, or a mapping from names to prompts. They are not truncated.
        layers: blocks whose output is transported; by default all but the last, whose transport is the identity.
        skip_first_positions: leading positions of each prompt to leave out; the last one always is.
        sketch: number of random orthogonal cotangents for each prompt, in place of all d_model: cheaper by
            d_model / sketch, and right on average over prompts.
        seed: seed of the random cotangents, which each prompt's own tokens vary.
        prepend_bos: as in ``trace``.
        engine: as in ``residual_jacobian``.
        progress: show a progress bar; None: on a terminal or in a notebook, once it takes two seconds.

    Raises:
        ArgumentError: a prompt with no position left, an argument out of range.
        HookError, DerivativeError, StaleTraceError: see ``residual_jacobian``.
        UnsupportedModelError, NonFiniteActivationError, ResidualIdentityError: see ``trace``.

    Example:
        >>> lens = tlc.jacobian_lens(model, texts, sketch=64)  # doctest: +SKIP
        >>> lens.to_transformer_lens().save("lens.pt")  # doctest: +SKIP
    """
    started = time.perf_counter()
    skipped = check_int("skip_first_positions", skip_first_positions, 0)
    named = named_prompts(prompts)
    totals: list[Tensor] = []
    engines: dict[str, Mapping[str, str]] = {}
    traced = None
    for name in ticking(list(named), "prompts", progress):
        traced = trace(model, named[name], prepend_bos=prepend_bos)
        width = traced.d_model
        if sketch is not None:
            sketch = check_int("sketch", sketch, 1, width, "the width of the residual stream")
        positions = range(skipped, traced.n_tokens - 1)
        if not positions:
            allowed = (
                f"prompts of more than {skipped + 1} tokens: the first {skipped} positions and the last are left out"
            )
            raise ArgumentError("prompts", f"{name}: {counted(traced.n_tokens, 'token')}", allowed)
        chosen = resolve_indices("layers", range(traced.n_layers - 1) if layers is None else layers, traced.n_layers)
        cotangents = _cotangents(traced, sketch, seed)
        part, first = part_between(traced, positions, engine)
        positions = range(positions.start - first, positions.stop - first)
        flows = Flows(part, engine)
        made = _of_prompt(part, flows, chosen, positions, cotangents)
        squares = made.square().sum((1, 2))
        if totals:
            totals[0] += made
            totals[1] += squares
        else:
            totals = [made, squares]
        engines[name] = flows.summary
    if traced is None:
        raise ArgumentError("prompts", prompts, "one or more prompts")
    settings = {"skip_first_positions": skipped, "sketch": sketch, "seed": seed, "engine": engine}
    provenance = traced.provenance(
        settings=settings, seconds=time.perf_counter() - started, engine=engines_of_prompts(engines)
    )
    return JacobianLens(
        provenance=replace(provenance, tokens=(), str_tokens=(), text=""),
        matrices=totals[0] / len(named),
        squares=totals[1] / len(named),
        layers=chosen,
        n_prompts=len(named),
        skipped=skipped,
        sketched=sketch,
    )


def _cotangents(traced: Trace, sketch: int | None, seed: int) -> Float[Tensor, "d_model cotangent"]:
    """All unit vectors, or random orthogonal ones Q of such a length that Q Q^T is the identity on average.

    They depend on the prompt and not on its place among others, so that lenses of parts can be merged.
    """
    width = traced.d_model
    if sketch is None:
        return torch.eye(width, dtype=traced.resid.dtype)
    digest = hashlib.sha256(f"{seed} ".encode() + traced.resid[0].double().cpu().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    drawn = torch.randn(width, sketch, generator=generator, dtype=torch.float64)
    return (width / sketch) ** 0.5 * torch.linalg.qr(drawn).Q.to(traced.resid.dtype)


def _of_prompt(
    traced: Trace, flows: Flows, layers: Sequence[int], positions: range, cotangents: Float[Tensor, "d_model cotangent"]
) -> Float[Tensor, "layer out in"]:
    """The transport of one prompt, on the CPU."""
    place = Placement(traced.n_tokens, positions, "same", traced.d_model, traced.resid)
    made = torch.zeros(len(layers), traced.d_model, traced.d_model, dtype=cotangents.dtype)
    for some in cotangents.split(vectors_through(traced), dim=1):
        stream = place.mm(some.to(traced.resid.device))
        for layer in range(traced.n_layers - 1, min(layers) - 1, -1):
            if layer in layers:
                pulled = (place.rmm(stream) / len(positions)).mT.cpu()  # y^T J for each cotangent y
                made[layers.index(layer)] += some @ pulled
            if layer > 0:
                stream = flows.block(layer).rmm(stream)
    return made
