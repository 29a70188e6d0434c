"""What is measured on Jacobians that are compared with each other.

A kind of coupling (depth, token, context, head) is a list of ``Group`` (``groups``). ``compare_groups`` follows a
``Schedule`` (``schedule``): it visits each layer once, makes all Jacobians that are needed of it, and drops a Jacobian
as soon as its groups are done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby, product

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling.groups import Group, Place, stacks, visits
from tlcoupling.coupling.metric import coupling, subspace_overlap
from tlcoupling.coupling.null import effective_width, null_coupling, null_std, unreached_of
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.schedule import HOST, Schedule
from tlcoupling.coupling.spectra import Decomposition, Spectrum, spectra_of
from tlcoupling.coupling.workers import Workers
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.autograd import GraphJacobian
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.triplets import Triplets
from tlcoupling.memory import give_back_memory
from tlcoupling.progress import ticking

Cell = dict[str, dict[str, Tensor]]  # what is measured of a group, by sublayer and field name


def compare_groups(jacobians: JacobianEngine, schedule: Schedule, progress: bool | None) -> dict[Group, Cell]:
    """Measure each group, with the sublayers that have a Jacobian at all of its places.

    Raises:
        ArgumentError: K above the rank of a Jacobian.
    """
    sublayers, options = schedule.comparison.sublayers, schedule.comparison.options
    orders = [visits(batch) for batch in schedule.batches]
    ticks = ticking(range(sum(map(len, orders))), "coupling", progress)
    # by products alone a Jacobian holds its block's weights, where these are no others in memory
    products = {layer for (layer, _), method in schedule.methods.items() if method.name == "products"}
    alone = {layer for layer in products if jacobians.trace.lifts(layer)}
    cells: dict[Group, Cell] = {}
    with Workers(schedule.workers) as workers:
        for batch, order in zip(schedule.batches, orders, strict=True):
            held: dict[str, dict[Place, Spectrum]] = {name: {} for name in sublayers}
            for stack in stacks(order, schedule.workers * schedule.stack, alone):
                # a place's sublayers share matrices
                wanted = [(each.place, name) for each in stack for name in each.place.of(sublayers)]
                made = _decompositions(jacobians, schedule, wanted, workers)
                for (place, name), spectrum in zip(wanted, _decomposed(made, options, workers), strict=True):
                    held[name][place] = spectrum
                del made
                give_back_memory()
                for each in stack:
                    next(ticks)
                    for group in (batch[index] for index in each.finished):
                        cells[group] = {
                            name: _compare(jacobians.trace, name, group, held[name], options, workers)
                            for name in group.compared(sublayers)
                        }
                    for place in each.dropped:
                        for name in place.of(sublayers):
                            del held[name][place]
    next(ticks, None)
    return cells


def _decomposed(made: Sequence[Decomposition], options: Options, workers: Workers) -> list[Spectrum]:
    """Return the spectra in order. Each worker takes its share in one stack."""
    share = -(-len(made) // workers.count)
    shares = [made[start : start + share] for start in range(0, len(made), share)]
    at_once = not any(isinstance(one.operator, GraphJacobian) for one in made)  # those run the model's modules
    found = workers.map(partial(spectra_of, k=max(options.k), solver=options.solver), shares, at_once)
    return [spectrum for spectra in found for spectrum in spectra]


def _decompositions(
    jacobians: JacobianEngine, schedule: Schedule, wanted: Sequence[tuple[Place, str]], workers: Workers
) -> list[Decomposition]:
    """Make some Jacobians in order. Workers, where there are some, form the matrices of several side by side."""
    by_layer = schedule.by_layer or any(jacobians.trace.lifts(place.layer) for place, _ in wanted)
    begun = {place.layer for place, _ in wanted} - jacobians.layers

    def together(each: tuple[Place, str]) -> Place | int | None:
        place, _ = each
        if workers.count == 1:
            return place
        return place.layer if by_layer else None

    made: list[Decomposition] = []
    for _, share in groupby(wanted, together):
        some = list(share)
        keys = [(place.layer, name, place.src, place.dest) for place, name in some]
        several = len({place for place, _ in some}) > 1
        with jacobians.formed_together(keys, partial(workers.map, at_once=several)):
            made += [_decomposition(jacobians, schedule, name, place) for place, name in some]
    if schedule.by_layer and begun:
        give_back_memory()  # what the checks leave on this thread's heap is of no use on those of the workers
    return made


def _decomposition(jacobians: JacobianEngine, schedule: Schedule, sublayer: str, place: Place) -> Decomposition:
    """Make one Jacobian, to be decomposed by the scheduled method.

    A certificate may have turned a scheduled closed form down. The method is then chosen again for what autograd
    costs, and a warning says so where the two differ.
    """
    make = partial(jacobians.operator, place.layer, sublayer, place.src, place.dest, place.head)
    operator = make()
    method = schedule.methods[place.layer, sublayer]
    engine = "autograd" if isinstance(operator, GraphJacobian) else "analytic"
    if engine != schedule.costs[place.layer, sublayer].engine:
        scheduled, method = method, schedule.comparison.method(operator, schedule.keep)
        if method.name != scheduled.name:
            reason = f"{sublayer}: scheduled as {scheduled.name!r}, but done as {method.name!r} by {engine}"
            jacobians.warn_once(reason, reason)
    # at once where weights were lifted for it, which would be kept until its stack is decomposed
    lifted = operator.device != HOST or jacobians.trace.lifts(place.layer)
    if method.name != "products" and lifted:
        with jacobians.lifted_once(place.layer):
            operator = Projection(operator.dense())
    return Decomposition(operator, make, method.name, f"{sublayer} of {place}")


def decompose(
    jacobians: JacobianEngine, schedule: Schedule, wanted: Sequence[tuple[str, Place]]
) -> dict[tuple[str, Place], Spectrum]:
    """Return the top triplets of some Jacobians, by sublayer and place, each by the scheduled method.

    Raises:
        ArgumentError: K above the rank of one.
    """
    found: list[Spectrum] = []
    with Workers(min(schedule.workers, len(wanted))) as workers:
        at_once = workers.count * schedule.stack
        for some in (wanted[start : start + at_once] for start in range(0, len(wanted), at_once)):
            made = _decompositions(jacobians, schedule, [(place, name) for name, place in some], workers)
            found += _decomposed(made, schedule.comparison.options, workers)
    return dict(zip(wanted, found, strict=True))


def compare_pair(
    jacobians: JacobianEngine, schedule: Schedule
) -> tuple[dict[str, Tensor], Float[Tensor, "K K"], Triplets]:
    """Measure a schedule's only pair at its only K.

    Returns:
        What is measured of it, by field name, ``[k, row, column]`` or ``[row, column]`` with one of each; the matrix
        U2^T J1 V2; the triplets of J2.

    Raises:
        ArgumentError: K above the rank of one of the two Jacobians.
    """
    options, (sublayer,), (group,) = schedule.comparison.options, schedule.comparison.sublayers, schedule.batches[0]
    found = decompose(jacobians, schedule, [(sublayer, place) for place in sorted(group.places)])
    known = {place: spectrum for (_, place), spectrum in found.items()}
    row, of_column = known[group.rows[0]], known[group.columns[0]].triplets
    left, right = (of_column.u, of_column.v) if options.bases == "uv" else (of_column.v, of_column.u)
    fields = _compare(jacobians.trace, sublayer, group, known, options, Workers(1))
    return fields, project(row, left[None], right)[0], of_column


def project(
    one: Spectrum, left: Float[Tensor, "column d K"], all_right: Float[Tensor, "d columnK"]
) -> Float[Tensor, "column K K"]:
    """A Jacobian between the bases of others, U2^T J1 V2 for each column; ``all_right`` has the V2 side by side."""
    moved = one.multiply(all_right.to(one.triplets.u.device)).to(left.device)
    return left.mT @ rearrange(moved, "d (column i) -> column d i", column=len(left))


def _compare(
    trace: Trace, sublayer: str, group: Group, known: Mapping[Place, Spectrum], options: Options, workers: Workers
) -> dict[str, Tensor]:
    """All that is measured on a group, by field name: each row's Jacobian in each column's bases."""
    rows, columns = ([known[place] for place in places] for places in (group.rows, group.columns))
    device = rows[0].frobenius.device

    def stacked(spectra: Sequence[Spectrum], name: str) -> Tensor:
        return torch.stack([getattr(one.triplets, name).to(device) for one in spectra])

    u2, v2 = stacked(columns, "u"), stacked(columns, "v")
    s, frobenius = stacked(rows, "s"), torch.stack([one.frobenius.to(device) for one in rows])
    compared = workers.map(partial(_in_bases, u2=u2, v2=v2, options=options), rows, all(row.kept for row in rows))
    wide = {side: each.to(device) for side, each in _effective_widths(trace, sublayer, group, known).items()}
    left, right = ("uu", "vv") if options.bases == "uv" else ("vu", "uv")  # of U2^T U1 and V1^T V2, or V2^T U1 ...
    width = (wide[left] * wide[right]).sqrt()
    of_row = {"frobenius": frobenius[:, None], "d_model": u2.shape[1], "width": width}
    of_row |= {"normalizer": options.normalizer, "absolute": options.absolute}
    chance = {
        name: torch.stack([function(s[:, None, :k], **of_row) for k in options.k])
        for name, function in (("null", null_coupling), ("null_std", null_std))
    }
    return {
        **{name: torch.stack([row[name] for row in compared], dim=1) for name in compared[0]},
        **chance,
        "null_width": width.to(s),
        **{
            f"overlap_null_{side}": torch.stack([(k / wide[2 * side]).clamp(max=1) for k in options.k])
            for side in ("u", "v")
        },
        "singular_values": s,
        "frobenius": frobenius,
        "frobenius_error": torch.stack([one.frobenius_error.to(device) for one in rows]),
        "residual": stacked(rows, "residual").amax(-1),
        **{name: stacked(columns, name) for name in ("gaps", "uncertainty")},
        **{
            name: stacked(spectra, "subspace_uncertainty").mT[[k - 1 for k in options.k]]
            for name, spectra in (("subspace_uncertainty", rows), ("basis_subspace_uncertainty", columns))
        },
    }


def _effective_widths(
    trace: Trace, sublayer: str, group: Group, known: Mapping[Place, Spectrum]
) -> dict[str, Float[Tensor, "row column"]]:
    """Return the effective widths, given what a norm of each Jacobian projects out.

    By the side of the row's vectors and that of the column's: ``"uu"``, ``"vv"``, ``"uv"``, ``"vu"``.
    """
    device = known[group.rows[0]].frobenius.device
    missed: dict[str, dict[Place, Tensor]] = {"u": {}, "v": {}}
    for place in group.places:
        triplets = known[place].triplets
        both = unreached_of(triplets.u, triplets.v, trace.input_of(place.layer, sublayer)[0, place.src])
        missed["u"][place], missed["v"][place] = (each.to(device) for each in both)
    return {
        row + column: effective_width(
            [missed[row][place] for place in group.rows], [missed[column][place] for place in group.columns]
        )
        for row, column in product("uv", "uv")
    }


def _in_bases(
    row: Spectrum, u2: Float[Tensor, "column d rank"], v2: Float[Tensor, "column d rank"], options: Options
) -> dict[str, Float[Tensor, "k column"]]:
    """Coupling and overlaps of one Jacobian with the bases of each column."""
    device, triplets = u2.device, row.triplets
    left, right = (u2, v2) if options.bases == "uv" else (v2, u2)
    projected = project(row, left, rearrange(right, "column d i -> d (column i)"))
    s = triplets.s.to(device)
    found = {"values": [coupling(projected[:, :k, :k], s[:k], options.normalizer, options.absolute) for k in options.k]}
    for name, basis1, basis2 in (("overlap_u", triplets.u, u2), ("overlap_v", triplets.v, v2)):
        inner = einsum(basis1.to(device), basis2, "d i, column d j -> column i j")
        found[name] = [subspace_overlap(inner[:, :k, :k]) for k in options.k]
    return {name: torch.stack(cells) for name, cells in found.items()}
