r"""Eigenvalues, rotation, departure from normality and rank of residual Jacobians, J and I + J.

A step of the stream is x <- x + f(x), with the linearisation I + J. Eigenvalues of I + J are 1 + lambda, so both maps
have the same eigenvectors and the same absolute departure from normality.

Source: Fernando and Guitchounts, "Dynamics of the Transformer Residual Stream", 2026, arXiv 2605.14258, claims rotation
early, near-symmetry late, and ranks that training lowers. Its definitions could not be read beyond the abstract. Those
here are the standard ones: Henrici 1962 (departure), Roy and Vetterli 2007 (effective rank), Rudelson and Vershynin
2007 (stable rank).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from tlcoupling.arguments import Indices, resolve_indices, resolve_sublayers
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace, trace
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.haar import haar_of
from tlcoupling.models.baseline import baseline_model
from tlcoupling.progress import ticking
from tlcoupling.results.base import Result
from tlcoupling.text import counted

MAPS = ("J", "I + J")
_PLACES = ("sublayer", "pos", "layer")
WITH_NULL = ("complex_share", "departure", "symmetric", "rotation")
_BY_MAP = ("frobenius", "spectral_norm", "spectral_radius", "effective_rank", "stable_rank", *WITH_NULL[1:])
_BY_MAP += tuple(f"{name}_null" for name in WITH_NULL[1:])


@dataclass(frozen=True, repr=False, eq=False)
class EigenGeometry(Result):
    r"""Eigenvalues of residual Jacobians, and how far they are from normal, from symmetric and from full rank.

    A is J or I + J, on the axis ``map``; lambda are its eigenvalues, s its singular values. ``*_null`` is the chance
    level, the same of one draw of J = U S V^T with the measured S and independent Haar-random U and V.

    Attributes:
        eigenvalues_real: real parts of the eigenvalues of J, largest modulus first, ``[sublayer, pos, layer, index]``.
        eigenvalues_imag: imaginary parts. Same axes.
        complex_share: share of eigenvalues that are not real, among those above rounding, ``[sublayer, pos, layer]``.
        complex_share_null: its chance level: nearly all eigenvalues of a large random matrix are complex. Same axes.
        frobenius: ||A||_F, ``[sublayer, pos, layer, map]``.
        spectral_norm: s_1, the largest amplification in one step. Same axes, as all that follow.
        spectral_radius: the largest |lambda|.
        departure: Henrici's departure from normality, sqrt(||A||_F^2 - sum |lambda|^2) / ||A||_F: 0 if A is normal
            (symmetric, antisymmetric, orthogonal), 1 if it is nilpotent.
        departure_null: its chance level.
        symmetric: ||(A + A^T) / 2||_F^2 / ||A||_F^2: 1 if A is symmetric, 0 if it is antisymmetric. The antisymmetric
            (rotational) part has the rest.
        symmetric_null: its chance level, 1/2 + 1 / (2 d) on average for J.
        rotation: sum (Im lambda)^2 / sum |lambda|^2: 0 if all eigenvalues are real, 1 if all are imaginary.
        rotation_null: its chance level, nearly 1/2 for J.
        effective_rank: exp of the entropy of s / sum s, from 1 to d_model.
        stable_rank: ||A||_F^2 / s_1^2, from 1 to d_model.
        sublayers: what was measured of each layer.
        positions: the tokens' positions; Jacobians are from a token to itself.
        tokens: their text.
        layers: the layers.
        baseline: the same of another model, such as fresh weights; None if it was not measured.
    """

    eigenvalues_real: Float[Tensor, "sublayer token layer index"]
    eigenvalues_imag: Float[Tensor, "sublayer token layer index"]
    complex_share: Float[Tensor, "sublayer token layer"]
    complex_share_null: Float[Tensor, "sublayer token layer"]
    frobenius: Float[Tensor, "sublayer token layer map"]
    spectral_norm: Float[Tensor, "sublayer token layer map"]
    spectral_radius: Float[Tensor, "sublayer token layer map"]
    departure: Float[Tensor, "sublayer token layer map"]
    departure_null: Float[Tensor, "sublayer token layer map"]
    symmetric: Float[Tensor, "sublayer token layer map"]
    symmetric_null: Float[Tensor, "sublayer token layer map"]
    rotation: Float[Tensor, "sublayer token layer map"]
    rotation_null: Float[Tensor, "sublayer token layer map"]
    effective_rank: Float[Tensor, "sublayer token layer map"]
    stable_rank: Float[Tensor, "sublayer token layer map"]
    sublayers: tuple[str, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    baseline: EigenGeometry | None = None

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("eigenvalues_real", "eigenvalues_imag"), (*_PLACES, "index")),
        **dict.fromkeys(("complex_share", "complex_share_null"), _PLACES),
        **dict.fromkeys(_BY_MAP, (*_PLACES, "map")),
    }

    def __repr__(self) -> str:
        """One line."""
        shares = self.symmetric[..., 0].flatten(1).mean(1)
        shown = ", ".join(f"{name} {share:.3f}" for name, share in zip(self.sublayers, shares, strict=True))
        sizes = f"{counted(len(self.layers), 'layer')}, {counted(len(self.positions), 'token')}"
        return f"EigenGeometry({sizes}: symmetric share of J: {shown}; null {self.symmetric_null[..., 0].mean():.3f})"

    @property
    def eigenvalues(self) -> Complex[Tensor, "sublayer token layer index"]:
        """Return the eigenvalues of J; those of I + J are one more."""
        return torch.complex(self.eigenvalues_real, self.eigenvalues_imag)

    @property
    def antisymmetric(self) -> Float[Tensor, "sublayer token layer map"]:
        """Return the share of the antisymmetric part (A - A^T) / 2 in ||A||_F^2, 1 - symmetric."""
        return 1 - self.symmetric

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "sublayer": self.sublayers,
            "pos": self.positions,
            "layer": self.layers,
            "map": MAPS,
            "index": range(self.eigenvalues_real.shape[-1]),
        }


@measured
def eigen_geometry(
    trace: Trace,
    *,
    sublayers: str | Sequence[str] | None = None,
    tokens: Indices = -1,
    layers: Indices | None = None,
    baseline: Any | None = None,
    engine: EngineName = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> EigenGeometry:
    """Measure eigenvalues, normality, symmetry and rank of the Jacobians from a token to itself.

    Matrices are formed and decomposed in float64. SmolLM2-135M (90 matrices of width 576) takes a minute on one core.
    The time grows with the cube of the width.

    Args:
        trace: a trace of the model.
        sublayers: as in ``depth_coupling``.
        tokens: a position, several, or ``"all"``.
        layers: block indices; by default all.
        baseline: ``"fresh"`` for fresh weights of the same architecture (``random_baseline``), or another model, which
            is measured on the same tokens in the same way. Hooks do not act on it.
        engine: as in ``depth_coupling``.
        seed: seed of the random bases.
        progress: show a progress bar; by default on a terminal or in a notebook, after two seconds.

    Raises:
        ArgumentError: an argument out of range.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> found = tlc.eigen_geometry(trace, baseline="fresh")  # doctest: +SKIP
        >>> found.symmetric[0, 0, :, 0]  # of each block's J # doctest: +SKIP
    """
    started = time.perf_counter()
    require_trace(trace)
    names = resolve_sublayers(sublayers, trace.sublayers, trace.refusal)
    positions = resolve_indices("tokens", tokens, trace.n_tokens)
    chosen = resolve_indices("layers", layers, trace.n_layers)
    jacobians = JacobianEngine(trace, engine, {(pos, pos) for pos in positions}, formed=True)
    eps, generator = torch.finfo(trace.resid.dtype).eps, torch.Generator().manual_seed(seed)
    cells: dict[tuple[str, int, int], dict[str, Tensor]] = {}
    for layer in ticking(chosen, "eigenvalues", progress):
        for pos in positions:
            for name in names:
                operator = jacobians.operator(layer, name, pos, pos)
                cells[name, pos, layer] = _geometry(operator.dense().double().cpu(), eps, generator)
    fields = {
        field: torch.stack(
            [
                torch.stack([torch.stack([cells[name, pos, layer][field] for layer in chosen]) for pos in positions])
                for name in names
            ]
        )
        for field in EigenGeometry._axes
    }
    settings = {"sublayers": list(names), "tokens": list(positions), "layers": list(chosen), "seed": seed}
    provenance = trace.provenance(settings=settings, seconds=time.perf_counter() - started, engine=jacobians.used)
    other = None
    if baseline is not None:
        how: dict[str, Any] = {
            "sublayers": names,
            "tokens": positions,
            "layers": chosen,
            "engine": engine,
            "seed": seed,
        }
        other = eigen_geometry(traced_baseline(baseline, trace), **how, progress=progress)
    return EigenGeometry(
        provenance=provenance,
        **fields,
        sublayers=names,
        positions=positions,
        tokens=tuple(trace.str_tokens[pos] for pos in positions),
        layers=chosen,
        baseline=other,
    )


def traced_baseline(baseline: Any, of: Trace) -> Trace:
    """Return a trace of the model that stands beside another one, on the same tokens.

    Args:
        baseline: ``"fresh"`` or a model.
        of: the trace of the other model.
    """
    return trace(baseline_model(baseline, of.model), of.tokens)


def _geometry(jacobian: Float[Tensor, "d d"], eps: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the fields of ``EigenGeometry`` for one Jacobian, given the rounding of its numbers."""
    s = torch.linalg.svdvals(jacobian)
    rotation = haar_of(torch.randn(jacobian.shape, generator=generator, dtype=jacobian.dtype))
    random = s[:, None] * rotation  # Q^T (U S V^T) Q of random bases: only V^T U counts
    found, chance = _quantities(jacobian, s, eps), _quantities(random, s, eps)
    return {**found, **{f"{name}_null": chance[name] for name in WITH_NULL}}


def _quantities(jacobian: Float[Tensor, "d d"], s: Float[Tensor, " d"], eps: float) -> dict[str, Tensor]:
    """Return what is measured of J and of I + J, given the singular values of J."""
    eigenvalues = torch.linalg.eigvals(jacobian)
    eigenvalues = eigenvalues[eigenvalues.abs().argsort(descending=True)]
    known = eigenvalues.abs() > len(s) * eps * s[0]
    # ||A||_F^2 of the triangle of the Schur form, which the identity leaves as it is
    beyond = (s.square().sum() - eigenvalues.abs().square().sum()).clamp(min=0)
    step = jacobian + torch.eye(len(jacobian), dtype=jacobian.dtype)
    by_map = [
        {
            "frobenius": spectrum.norm(),
            "spectral_norm": spectrum[0],
            "spectral_radius": values.abs().amax(),
            "departure": beyond.sqrt() / spectrum.norm(),
            "symmetric": ((matrix + matrix.mT) / 2).norm().square() / spectrum.square().sum(),
            "rotation": values.imag.square().sum() / values.abs().square().sum(),
            "effective_rank": effective_rank(spectrum),
            "stable_rank": spectrum.square().sum() / spectrum[0].square(),
        }
        for matrix, values, spectrum in (
            (jacobian, eigenvalues, s),
            (step, 1 + eigenvalues, torch.linalg.svdvals(step)),
        )
    ]
    return {
        "eigenvalues_real": eigenvalues.real,
        "eigenvalues_imag": eigenvalues.imag,
        "complex_share": (eigenvalues.imag != 0)[known].double().mean(),
        **{name: torch.stack([each[name] for each in by_map]) for name in by_map[0]},
    }


def effective_rank(s: Float[Tensor, "*rest rank"]) -> Float[Tensor, "*rest"]:
    """Return exp(- sum p ln p) with p = s / sum s (Roy and Vetterli 2007); NaN if all are zero."""
    return torch.special.entr(s / s.sum(-1, keepdim=True)).sum(-1).exp()
