"""One sweep up through the blocks that carries the matrices of the slices from all layers, and decomposes them.

At each block, what comes from an earlier layer is the matrix of a slice as far as here. What the block's maps cost to
make is shared by all earlier layers, as many as memory holds; the others take another sweep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import check_int
from tlcoupling.errors import InsufficientMemoryError
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.krylov import krylov_svd
from tlcoupling.linalg.maps import Identity, Projection
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.linalg.svd import truncated_svds
from tlcoupling.linalg.triplets import Triplets
from tlcoupling.memory import free_memory
from tlcoupling.progress import ticking
from tlcoupling.slices.routes import Maps, routes_of
from tlcoupling.slices.sites import Placement, Site
from tlcoupling.slices.slice import require_followed

SHARE = 0.5  # of the free memory, for what is carried from several layers together
_NORM = 1e-2  # residual of a map's largest singular triplet: its value is right to about the square of it
STACKED = 2**27  # numbers of matrices that are decomposed together


class Sweep:
    """The slices between layers: their triplets, those of the blocks, and the norms of all maps.

    Attributes:
        routes: the maps.
        fields: the tensors of a ``SensitivityAtlas``.
    """

    def __init__(
        self,
        trace: Trace,
        k: int,
        sources: Mapping[int, Site],
        targets: Mapping[int, Site],
        src: Sequence[int],
        dest: Sequence[int],
        engine: EngineName,
    ) -> None:
        """Take a trace, the number of triplets, the sites by their layer, and the positions."""
        width = trace.d_model
        self.trace, self.sources, self.targets = trace, sources, targets
        self.layers, self.k = tuple(sources), check_int("k", k, 1, width, "the width of the stream")
        self._enter, reads = (
            Placement(trace.n_tokens, positions, "same", width, trace.resid) for positions in (src, dest)
        )
        mean = Projection(torch.eye(width).to(trace.resid) / len(dest))
        self._leave = reads.T if len(dest) == 1 else mean @ reads.T
        pos = src[0] if tuple(src) == tuple(dest) and len(src) == 1 else None
        self.routes = routes_of(trace, sources, targets, self._enter, self._leave, pos, engine)
        self._ends = (1.0, 1.0) if self.routes.alone else (len(src) ** 0.5, len(dest) ** -0.5)
        self.blocks = tuple(range(self.layers[0], self.layers[-1] + 1))
        n, blocks = len(self.layers), len(self.blocks)
        shapes = {
            "singular_values": (n, n, self.k),
            "residual": (n, n, self.k),
            "norm_product": (n, n),
            "u": (n, n, width, self.k),
            "v": (n, n, width, self.k),
            "block_values": (blocks, self.k),
            "block_u": (blocks, width, self.k),
            "block_v": (blocks, width, self.k),
        }
        self.fields = {name: torch.full(shape, torch.nan, dtype=trace.resid.dtype) for name, shape in shapes.items()}
        self.fields["converged"] = torch.zeros(n, n, self.k, dtype=torch.bool)
        self._norms: dict[int, tuple[float, float, float]] = {}

    def run(self, progress: bool | None) -> None:
        """Carry the matrices of all slices up, and fill the fields.

        Raises:
            InsufficientMemoryError: what is carried from one layer does not fit into memory.
        """
        for group in self._groups():
            carried: dict[int, Tensor] = {}
            above = [block for block in self.blocks if block >= group[0]]
            for layer in ticking(above, "blocks", progress):
                maps = self.routes.maps(layer)
                if layer not in self._norms:
                    self._measure_block(layer, maps)
                self._pass(layer, maps, carried)
                if layer in group:
                    entered = self.routes.enter.mm(self._eye())
                    carried[layer] = self.routes.through(maps.start, entered)
        self._multiply_norms()

    def _groups(self) -> list[tuple[int, ...]]:
        """The sources that are carried together."""
        rows, columns = self.routes.enter.shape
        each = self.trace.resid.dtype.itemsize * float(rows) * columns
        free = free_memory(self.trace.resid.device)
        size, sources = int(SHARE * free / each), self.layers[:-1]
        if size == 0:
            raise InsufficientMemoryError(
                f"the slices from one layer are carried as {rows} x {columns} numbers, {each / 2**30:.1f} GiB, "
                f"more than {SHARE:.0%} of the free {free / 2**30:.1f} GiB: measure a shorter prompt, or from one "
                "position to itself"
            )
        return [sources[start : start + size] for start in range(0, len(sources), size)]

    def _eye(self) -> Float[Tensor, "d d"]:
        return torch.eye(self.trace.d_model).to(self.trace.resid)

    def _pass(self, layer: int, maps: Maps, carried: dict[int, Tensor]) -> None:
        """Take what comes from earlier layers through a block, in place, and decompose what ends there."""
        matrices: dict[int, Tensor] = {}
        for source, stream in carried.items():
            moved = self.routes.through(maps.block, stream)
            if layer in self.layers:
                reached = moved if maps.end is maps.block else self.routes.through(maps.end, stream)
                matrices[source] = self.routes.leave.mm(reached)
            carried[source] = moved
        if not matrices:
            return
        if (first := self.layers[0]) in matrices and layer == self.layers[-1]:
            ends = self.sources[first], self.targets[layer]
            require_followed(self.trace, Projection(matrices[first]), *ends, self._enter, self._leave)
        at = self.layers.index(layer)
        for source, found in zip(matrices, self._decomposed(list(matrices.values())), strict=True):
            self._put((self.layers.index(source), at), found, "singular_values", "u", "v")
            for name in ("residual", "converged"):
                self.fields[name][self.layers.index(source), at] = getattr(found, name).cpu()

    def _measure_block(self, layer: int, maps: Maps) -> None:
        """The norms of a block's maps, and its own Jacobian's triplets."""
        norms = {id(each): _norm(each) for each in (maps.start, maps.block, maps.end)}
        self._norms[layer] = norms[id(maps.start)], norms[id(maps.block)], norms[id(maps.end)]
        entered = self.routes.enter.mm(self._eye())
        own = self.routes.leave.mm(self.routes.through(maps.block, entered)) - self.routes.leave.mm(entered)
        (found,) = self._decomposed([own])
        self._put((layer - self.blocks[0],), found, "block_values", "block_u", "block_v")

    def _decomposed(self, matrices: Sequence[Tensor]) -> list[Triplets]:
        size = max(1, STACKED // matrices[0].numel())
        operators = [Projection(matrix) for matrix in matrices]
        parts = [operators[start : start + size] for start in range(0, len(operators), size)]
        return [found for part in parts for found in truncated_svds(part, self.k)]

    def _put(self, cell: tuple[int, ...], found: Triplets, s: str, u: str, v: str) -> None:
        for name, value in ((s, found.s), (u, found.u), (v, found.v)):
            self.fields[name][cell] = value.cpu()

    def _multiply_norms(self) -> None:
        """The products of the norms of all maps of each slice."""
        for i, source in enumerate(self.layers):
            product = math.prod(self._ends) * self._norms[source][0]
            for layer in range(source + 1, self.layers[-1] + 1):
                _, block, end = self._norms[layer]
                if layer in self.layers:
                    self.fields["norm_product"][i, self.layers.index(layer)] = product * end
                product *= block


def _norm(operator: JacobianOperator) -> float:
    """The largest singular value."""
    return 1.0 if isinstance(operator, Identity) else float(krylov_svd([operator], 1, _NORM)[0].s)
