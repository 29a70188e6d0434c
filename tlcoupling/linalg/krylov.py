"""The block Krylov solver: needs only products with J and J^T, and runs several operators at a time.

Randomised block Lanczos bidiagonalisation with full reorthogonalisation (Golub and Kahan 1965; randomised start and
block analysis: Musco and Musco, NeurIPS 2015, arXiv 1504.05477).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.linalg.stack import Stack
from tlcoupling.linalg.triplets import DETERMINED, Triplets, distances, residuals

OVERSAMPLING = 6  # extra columns of a block beyond k
FIRST_CHECK, LONGEST_WAIT, MAX_STEPS = 6, 5, 40
FIRST_CHECK_OF_PRODUCTS = 3  # matrix-free steps cost far more than a convergence check, so then every step is checked
USUAL_STEPS = 10  # for a top-10 spectrum; storage for the bases starts at this size
DECAY = 7.0  # usual reduction of the residual per step, at least; predicts when to check again
ROUNDING = 32.0  # residuals of a few eps s_1 are what rounding leaves, at all widths: 5 to 30 in float32
SKEW = 16.0  # eps: largest inner product of a new column with an existing one; rounding alone gives 1 to 4
ROUNDS = 4  # of orthogonalisation, at most: with inexact products more rounds do not help


def krylov_svd(operators: Sequence[JacobianOperator], k: int, tolerance: float) -> list[Triplets]:
    """Return the top k triplets of each operator.

    Iterates until every triplet has converged (``_asked``) or the space is exhausted. Steps of all operators run
    together, because one small matrix cannot keep a core busy; one leaves the others when its triplets have converged.
    The random start has a fixed seed, so equal input gives equal output. Triplets may not have converged: check
    ``converged``.

    Args:
        operators: J, all of one shape [m, n], dtype and device.
        k: number of triplets, at most min(m, n).
        tolerance: largest residual of a triplet, relative to its own s_k.
    """
    stack = Stack(operators)
    rows, columns = stack.shape
    width = min(k + OVERSAMPLING, rows, columns)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, width, generator=generator, dtype=stack.dtype).to(stack.device)
    new_v = torch.linalg.qr(start).Q.expand(len(operators), -1, -1)
    v, u, jtu = (Columns(len(operators), size, width * USUAL_STEPS, start) for size in (columns, rows, columns))
    v.append(new_v)
    checks = dict.fromkeys(range(len(operators)), FIRST_CHECK if stack.formed else FIRST_CHECK_OF_PRODUCTS)
    found: dict[int, Triplets] = {}
    for step in range(1, MAX_STEPS + 1):
        new_u = _orthogonalise(stack.mm(new_v)[..., : rows - u.count], u.all)
        u.append(new_u)
        pulled = stack.rmm(new_u)
        jtu.append(pulled)
        last = u.count == rows or v.count == columns or step == MAX_STEPS
        due = [place for place, at in enumerate(checks.values()) if at == step and not last]
        if due:
            running = list(checks)
            triplets, excess = _ritz(u.of(due), v.of(due), jtu.of(due), k, tolerance)
            for index, one, far in zip([running[place] for place in due], triplets, excess, strict=True):
                if far <= 1:
                    found[index] = one
                    del checks[index]
                    continue
                wait = math.ceil(math.log(min(far, 1 / tolerance), DECAY))
                checks[index] = step + (min(max(wait, 1), LONGEST_WAIT) if stack.formed else 1)
            if not checks:
                break
            if len(checks) < len(running):
                left = [place for place, index in enumerate(running) if index in checks]
                stack, pulled = stack.of(left), pulled[left]
                for bases in (u, v, jtu):
                    bases.keep(left)
        if not last or (u.count == rows and v.count < columns):
            new_v = _orthogonalise(pulled[..., : columns - v.count], v.all)
            v.append(new_v)
        if last:
            found.update(zip(checks, _ritz(u.all, v.all, jtu.all, k, tolerance)[0], strict=True))
            break
    return [found[index] for index in range(len(operators))]


class Columns:
    """A growing set of columns for each matrix of a stack. Appending does not copy the existing ones."""

    def __init__(self, stack: int, size: int, expected: int, like: Tensor) -> None:
        """Reserve space for ``expected`` columns; it doubles when full."""
        self.count = 0
        self._rows = like.new_empty(stack, min(expected, size), size)  # each column contiguous, as LAPACK wants it

    @property
    def all(self) -> Float[Tensor, "stack size count"]:
        """Return all columns."""
        return self._rows[:, : self.count].mT

    def of(self, places: list[int]) -> Float[Tensor, "some size count"]:
        """Return all columns of some matrices."""
        return self.all if len(places) == len(self._rows) else self._rows[places, : self.count].mT

    def keep(self, places: list[int]) -> None:
        """Forget the other matrices."""
        self._rows = self._rows[places]

    def append(self, block: Float[Tensor, "stack size w"]) -> None:
        """Append a block of columns."""
        end = self.count + block.shape[-1]
        if end > self._rows.shape[1]:
            self._rows = torch.cat([self._rows, torch.empty_like(self._rows)], dim=1)
        self._rows[:, self.count : end] = block.mT
        self.count = end


def _ritz(
    u: Float[Tensor, "stack m p"],
    v: Float[Tensor, "stack n q"],
    jtu: Float[Tensor, "stack n p"],
    k: int,
    tolerance: float,
) -> tuple[list[Triplets], list[float]]:
    """Return the best triplets within the spans of U and V, from B = U^T J V, and each one's worst residual / asked."""
    inner = jtu.mT @ v
    left, spectrum, right = _small_svd(inner)
    s, next_s = spectrum[..., :k], spectrum.new_zeros(len(spectrum))
    if k < spectrum.shape[-1]:  # a Ritz value lies below its singular value, by no more than its residual
        after = jtu @ left[..., k, None] - v @ (spectrum[..., k, None] * right[..., k, :])[..., None]
        next_s = (spectrum[..., k] + after[..., 0].norm(dim=-1)).minimum(s[..., -1])
    left, right = left[..., :k], right[..., :k, :].mT
    jv = u @ (inner @ right)  # J V lies in the span of U, by construction
    top_u, top_v = u @ left, v @ right
    # this form of J V is only as exact as U and V are orthonormal, so loss of orthonormality counts as residual
    skew = _skew(top_u).maximum(_skew(top_v))
    residual = residuals(jv, jtu @ left, top_u, s, top_v).maximum(skew * s[..., :1])
    asked = _asked(s, next_s, tolerance)
    excess = torch.where(residual > 0, residual / asked, 0.0)  # J may be zero
    columns = zip(top_u, s, top_v, next_s, residual / s, residual <= asked, strict=True)
    return [Triplets(*one, solver="krylov") for one in columns], excess.amax(-1).tolist()


def _small_svd(matrices: Float[Tensor, "stack p q"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V^T of small matrices.

    A GPU's SVD takes a stack one by one; its eigenvalues of symmetric matrices take it at once.
    """
    by_eigenvectors = matrices.is_cuda and matrices.dtype == torch.float32
    return _svd_by_eigenvectors(matrices) if by_eigenvectors else torch.linalg.svd(matrices)


def _svd_by_eigenvectors(matrices: Float[Tensor, "stack p q"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V^T from the eigenvectors of B^T B in float64: right to float32's rounding down to s_1 / 10^4."""
    exact = matrices.double()
    right = torch.linalg.eigh(exact.mT @ exact).eigenvectors.flip(-1)
    left = exact @ right
    s = left.norm(dim=-2)
    left = torch.nn.functional.normalize(left, dim=-2)
    return left.to(matrices), s.to(matrices), right.mT.to(matrices)


def _skew(basis: Float[Tensor, "stack n k"]) -> Float[Tensor, "stack k"]:
    """Return how far each column is from orthonormal to all."""
    return (basis.mT @ basis - torch.eye(basis.shape[-1]).to(basis)).norm(dim=-1)


def _asked(s: Float[Tensor, "stack K"], next_s: Float[Tensor, " stack"], tolerance: float) -> Float[Tensor, "stack K"]:
    """Return the largest residual asked of each triplet, absolute.

    It is the tolerance, relative to the triplet's own s_k. Where another singular value is so close that this would
    leave the vectors undetermined, it is less. It is never less than what rounding leaves.
    """
    sharp = DETERMINED / 2 * distances(s, next_s)
    return (tolerance * s).minimum(sharp).maximum(ROUNDING * torch.finfo(s.dtype).eps * s[..., :1])


def _orthogonalise(block: Float[Tensor, "stack n w"], basis: Float[Tensor, "stack n b"]) -> Float[Tensor, "stack n w"]:
    """Return an orthonormal basis of each block, orthogonal to the existing basis.

    Project once, and again on the orthonormal columns while they are less orthogonal than rounding leaves them. Twice
    is enough (Kahan) unless little of the block is left. If nothing is left (J of low rank), go on with random columns.
    """
    block = torch.baddbmm(block, basis, basis.mT @ block, alpha=-1)
    kept = block.flatten(1).any(1)
    if not kept.all():
        generator = torch.Generator().manual_seed(basis.shape[-1])
        random = torch.randn(block.shape[1:], generator=generator, dtype=block.dtype).to(block)
        block = block.where(kept[:, None, None], random)
    block = torch.linalg.qr(block).Q
    allowed = SKEW * torch.finfo(block.dtype).eps
    for _ in range(ROUNDS):
        left = basis.mT @ block
        if not (left.abs() > allowed).any():
            break
        block = torch.linalg.qr(torch.baddbmm(block, basis, left, alpha=-1)).Q
    return block
