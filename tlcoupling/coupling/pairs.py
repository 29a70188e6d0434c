"""What is measured on Jacobians that are compared with each other.

A kind of coupling (depth, token, context, head) is a list of ``Group`` (``groups``). ``compare_groups`` follows a plan
(``plan``): it visits a layer once, asks for all that is needed of it, and drops a Jacobian as soon as its groups are
done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling.arguments import Options
from tlcoupling.coupling.groups import Place, schedule
from tlcoupling.coupling.metric import coupling, null_coupling, null_std, subspace_overlap
from tlcoupling.coupling.plan import Plan
from tlcoupling.coupling.spectra import Spectrum, cheapest, spectrum_of
from tlcoupling.errors import ArgumentError
from tlcoupling.jacobian.engine import JacobianEngine


def compare_groups(
    jacobians: JacobianEngine,
    sublayers: Sequence[str],
    plan: Plan,
    options: Options,
    progress: bool,
) -> dict[str, Tensor]:
    """All that is measured on each group, by field name, ``[sublayer, group, ...]`` on the CPU.

    Raises:
        ArgumentError: K above the rank of a Jacobian.
    """
    schedules = [schedule(batch) for batch in plan.batches]
    ticks = _ticks(len(sublayers) * sum(map(len, schedules)), progress)
    columns = max(len(group.columns) for batch in plan.batches for group in batch)
    cells: list[dict[str, dict[str, Tensor]]] = []
    for batch, steps in zip(plan.batches, schedules, strict=True):
        held: dict[str, dict[Place, Spectrum]] = {name: {} for name in sublayers}
        compared: dict[int, dict[str, dict[str, Tensor]]] = {}
        for step in steps:
            for name in sublayers:
                next(ticks)
                held[name][step.place] = decompose(jacobians, name, step.place, options, columns, plan.keep)
            for index in step.finished:
                group = batch[index]
                compared[index] = {
                    name: _compare([known[p] for p in group.rows], [known[p] for p in group.columns], options)
                    for name, known in held.items()
                }
            for name, place in product(sublayers, step.dropped):
                del held[name][place]
        cells += [compared[index] for index in range(len(batch))]
    next(ticks, None)
    return {
        field: torch.stack([torch.stack([cell[name][field] for cell in cells]) for name in sublayers]).cpu()
        for field in cells[0][sublayers[0]]
    }


def _ticks(total: int, progress: bool) -> Iterator[int]:
    """One item per step of the work, with a progress bar that moves as they are taken."""
    if not progress:
        return iter(range(total))
    from tqdm.auto import tqdm

    return iter(tqdm(range(total), desc="coupling", leave=False))


def decompose(
    jacobians: JacobianEngine, sublayer: str, place: Place, options: Options, columns: int, keep: bool
) -> Spectrum:
    """The top triplets of one Jacobian, as a matrix where that is cheaper and fits."""
    make = partial(jacobians.operator, place.layer, sublayer, place.src, place.dest, place.head)
    operator, k = make(), max(options.k)
    way = cheapest(operator, operator.shape[0], k, columns, options.solver, keep)
    try:
        return spectrum_of(operator, make, k, options.solver, way.name)
    except ArgumentError as error:
        raise ArgumentError(error.name, error.value, f"{error.allowed} ({sublayer} of {place})") from error


def project(
    one: Spectrum, left: Float[Tensor, "column d K"], all_right: Float[Tensor, "d columnK"]
) -> Float[Tensor, "column K K"]:
    """A Jacobian between the bases of others, U2^T J1 V2 for each column; ``all_right`` has the V2 side by side."""
    moved = one.multiply(all_right.to(one.triplets.u.device)).to(left.device)
    return left.mT @ rearrange(moved, "d (column i) -> column d i", column=len(left))


def _compare(rows: Sequence[Spectrum], columns: Sequence[Spectrum], options: Options) -> dict[str, Tensor]:
    """All that is measured on a group, by field name: each row's Jacobian in each column's bases."""
    device = rows[0].frobenius.device

    def stacked(spectra: Sequence[Spectrum], name: str) -> Tensor:
        return torch.stack([getattr(one.triplets, name).to(device) for one in spectra])

    (u1, v1), (u2, v2) = ((stacked(spectra, "u"), stacked(spectra, "v")) for spectra in (rows, columns))
    s, frobenius = stacked(rows, "s"), torch.stack([one.frobenius.to(device) for one in rows])
    count, width = u2.shape[:2]
    left, right = (u2, v2) if options.bases == "uv" else (v2, u2)
    all_right = rearrange(right, "column d i -> d (column i)")
    found: dict[str, list[Tensor]] = {name: [] for name in ("values", "overlap_u", "overlap_v")}
    for row, one in enumerate(rows):  # a row at a time: all pairs' K x K matrices would be the largest thing held
        projected = project(one, left, all_right)
        found["values"].append(
            torch.stack(
                [coupling(projected[:, :k, :k], s[row, :k], options.normalizer, options.absolute) for k in options.k]
            )
        )
        for name, basis1, basis2 in (("overlap_u", u1[row], u2), ("overlap_v", v1[row], v2)):
            inner = einsum(basis1, basis2, "d i, column d j -> column i j")
            found[name].append(torch.stack([subspace_overlap(inner[:, :k, :k]) for k in options.k]))
    chance = {
        name: torch.stack(
            [function(s[:, :k], frobenius, width, options.normalizer, options.absolute) for k in options.k]
        )
        for name, function in (("null", null_coupling), ("null_std", null_std))
    }
    return {
        **{name: torch.stack(cells, dim=1) for name, cells in found.items()},
        **{name: each[..., None].expand(-1, -1, count) for name, each in chance.items()},
        "singular_values": s,
        "frobenius": frobenius,
        "frobenius_error": torch.stack([one.frobenius_error.to(device) for one in rows]),
        "residual": stacked(rows, "residual").amax(-1),
    }
