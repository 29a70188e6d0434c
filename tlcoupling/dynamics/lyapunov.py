r"""Lyapunov spectrum of a token's linearised trajectory, and the rank of what it transports.

P = (I + J^{L-1}) ... (I + J^0) carries a perturbation of x^0 at a token to x^L at the same token (``linearized``). Its
singular values are exp(L lambda_i), with lambda_i the finite-time Lyapunov exponents per layer. They range over too
many orders of magnitude for the product itself: thin orthonormal bases are carried through the factors, forward and
back, with a QR decomposition behind each (Benettin et al. 1980; Dieci and Van Vleck 1995).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import check_index, check_int
from tlcoupling.dynamics.geometry import effective_rank, traced_baseline
from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.results.base import Result

SPARE = 8  # columns carried beside those asked for
SWEEPS = 6  # at most, forward and back
STEADY, UNSTEADY = 1e-6, 1e-2  # change of ln s_i(P) between two sweeps that ends them, and that a warning names


@dataclass(frozen=True, repr=False, eq=False)
class LyapunovSpectrum(Result):
    r"""Finite-time Lyapunov exponents of a token's trajectory, by layer and sublayer, and the rank of what is carried.

    Attributes:
        exponents: lambda_i = ln s_i(P) / L, largest first, ``[exponent]``.
        growth: what each step adds to ln s_i(P): in the basis that starts as the right singular vectors of P, the
            logarithm of the i-th diagonal entry of R. Sums to L lambda_i. ``[layer, sublayer, exponent]``.
        effective_rank: effective rank exp(entropy of s / sum s) of the product up to each depth, from the embedding
            (depth 0, the identity) to L, ``[depth]``. None unless all exponents were measured.
        stable_rank: ||P||_F^2 / s_1^2 of the same. Same axis.
        change: the largest change of ln s_i(P) in the last sweep: how far the numbers are determined.
        sublayers: the steps of a layer in their order: ``("attn", "mlp")`` where the writes run in sequence and no hook
            edits the stream, else ``("block",)``.
        position: the token.
        token: its text.
        baseline: the same of another model, such as fresh weights; None if it was not measured.
    """

    exponents: Float[Tensor, " exponent"]
    growth: Float[Tensor, "layer sublayer exponent"]
    effective_rank: Float[Tensor, " depth"] | None
    stable_rank: Float[Tensor, " depth"] | None
    change: float
    sublayers: tuple[str, ...]
    position: int
    token: str
    baseline: LyapunovSpectrum | None = None

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "exponents": ("exponent",),
        "growth": ("layer", "sublayer", "exponent"),
        "effective_rank": ("depth",),
        "stable_rank": ("depth",),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {"cumulative": ("depth", "exponent")}

    def __repr__(self) -> str:
        """One line."""
        rank = "" if self.effective_rank is None else f", effective rank at the end {self.effective_rank[-1]:.1f}"
        ends = f"{self.exponents[0]:.3f} to {self.exponents[-1]:.3f}"
        return f"LyapunovSpectrum({len(self.growth)} layers, {len(self.exponents)} exponents: {ends} a layer{rank})"

    @property
    def cumulative(self) -> Float[Tensor, "depth exponent"]:
        """Return how far each carried direction has grown by each depth, as a logarithm: 0 at depth 0."""
        steps = self.growth.sum(1).cumsum(0)
        return torch.cat([torch.zeros_like(steps[:1]), steps])

    def _coords(self) -> dict[str, Sequence[Any]]:
        n_layers, _, n = self.growth.shape
        axes = {
            "layer": range(n_layers),
            "sublayer": self.sublayers,
            "exponent": range(n),
            "depth": range(n_layers + 1),
        }
        return dict(axes)


@measured
def lyapunov_spectrum(
    trace: Trace,
    n: int | None = None,
    *,
    pos: int = -1,
    baseline: Any | None = None,
    engine: EngineName = "auto",
    seed: int = 0,
) -> LyapunovSpectrum:
    r"""Measure the finite-time Lyapunov exponents of a token's trajectory through all blocks.

    A basis is carried through the factors I + J of all sublayers, forward and back, with a QR decomposition behind
    each, until the singular values of the product are steady. With fewer than d_model exponents, matrices are not
    formed.

    Args:
        trace: a trace of the model.
        n: number of exponents, the largest ones; by default all d_model, which also gives the ranks.
        pos: the token.
        baseline: as in ``eigen_geometry``.
        engine: as in ``depth_coupling``.
        seed: seed of the basis to start from.

    Raises:
        ArgumentError: an argument out of range.
        UnsupportedModelError: the model is bidirectional, or reads ahead within a prefix or a hook, so that a
            perturbation comes back to its token by way of others.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Warns:
        UserWarning: a singular value of the product still moved by more than 1 % in the last of 6 sweeps.

    Example:
        >>> found = tlc.lyapunov_spectrum(trace, baseline="fresh")  # doctest: +SKIP
        >>> found.effective_rank, found.baseline.effective_rank  # doctest: +SKIP
    """
    started = time.perf_counter()
    require_trace(trace)
    pos = check_index("pos", pos, trace.n_tokens)
    n = trace.d_model if n is None else check_int("n", n, 1, trace.d_model, "d_model")
    if not trace.causal:
        raise UnsupportedModelError(
            f"{trace.model_name} is bidirectional: a perturbation comes back to its token by way of others, so the "
            "product of the token's own Jacobians is not what its trajectory does"
        )
    trace.require_alone(pos)
    edited = trace.hooked_layers or trace.edits is not None
    names = tuple(trace.writes) if trace.topology in ("sequential", "cross") and not edited else ("block",)
    jacobians = JacobianEngine(trace, engine, {(pos, pos)})
    columns = min(n + SPARE, trace.d_model)
    factors = [jacobians.operator(layer, name, pos, pos) for layer in range(trace.n_layers) for name in names]
    if columns > trace.d_model // 2:  # cheaper than products
        factors = [Projection(factor.dense().double()) for factor in factors]
    growth, products, change = _spectrum(factors, columns, n, seed)
    whole = n == trace.d_model
    spectra = torch.linalg.svdvals(
        torch.stack([torch.eye(columns, dtype=torch.float64), *products[len(names) - 1 :: len(names)]])
    )
    by_step = growth[:, :n].reshape(trace.n_layers, len(names), n)
    settings = {"n": n, "pos": pos, "seed": seed}
    provenance = trace.provenance(settings=settings, seconds=time.perf_counter() - started, engine=jacobians.used)
    other = None
    if baseline is not None:
        other = lyapunov_spectrum(traced_baseline(baseline, trace), n, pos=pos, engine=engine, seed=seed)
    return LyapunovSpectrum(
        provenance=provenance,
        exponents=growth[:, :n].sum(0) / trace.n_layers,
        growth=by_step,
        effective_rank=effective_rank(spectra) if whole else None,
        stable_rank=spectra.square().sum(-1) / spectra[:, 0].square() if whole else None,
        change=change,
        sublayers=names,
        position=pos,
        token=trace.str_tokens[pos],
        baseline=other,
    )


def _spectrum(
    factors: Sequence[JacobianOperator], columns: int, n: int, seed: int
) -> tuple[Float[Tensor, "step column"], list[Float[Tensor, "column column"]], float]:
    """Return the logarithms of R's diagonals, the products of R up to each step (up to scale), and the last change."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.linalg.qr(torch.randn(factors[0].shape[0], columns, generator=generator, dtype=torch.float64)).Q
    logs, products, end = _sweep([factor.mm for factor in factors], start)
    change, sweeps = torch.inf, 0
    while change > STEADY and sweeps < SWEEPS:
        sweeps += 1
        left = torch.linalg.svd(products[-1])[0]
        _, _, start = _sweep([factor.rmm for factor in reversed(factors)], end @ left)
        before = logs.sum(0)[:n]
        logs, products, end = _sweep([factor.mm for factor in factors], start)
        change = float((logs.sum(0)[:n] - before).abs().max())
    if change > UNSTEADY:
        warnings.warn(
            f"ln s_i of the product still moved by {change:.1e} in the last of {SWEEPS} sweeps, for one of {n} "
            "singular values: they lie close together, or beyond rounding",
            stacklevel=3,
        )
    return logs, products, change


def _sweep(
    products: Sequence[Callable[[Tensor], Tensor]], q: Float[Tensor, "d column"]
) -> tuple[Float[Tensor, "step column"], list[Float[Tensor, "column column"]], Float[Tensor, "d column"]]:
    """Carry an orthonormal basis through q <- q + J q; return ln diag R, its product so far, and the last basis."""
    logs, carried = [], []
    total = torch.eye(q.shape[1], dtype=q.dtype)
    for product in products:
        q, r = torch.linalg.qr(q + product(q).to(q))
        diagonal = r.diagonal()
        q, r = q * diagonal.sign(), r * diagonal.sign()[:, None]
        logs.append(diagonal.abs().log())
        total = r @ total
        total = total / total.norm()
        carried.append(total)
    return torch.stack(logs), carried, q
