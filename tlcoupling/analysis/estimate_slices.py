"""Estimates of the work, memory and time of slices and of the atlas, made before they are measured."""

from __future__ import annotations

from typing import Any, get_args

import torch

from tlcoupling.analysis.estimate import PASS_CALLS, PATTERN_STEPS, Estimate, Stage, stages_of
from tlcoupling.arguments import Indices, check_int, check_name, resolve_indices
from tlcoupling.coupling.depth import depth_groups
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.schedule import HEAP, Comparison, make_schedule
from tlcoupling.forward.context import measured
from tlcoupling.forward.split import splits_of_model
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.autograd import autograd_column_bytes, n_heads_of
from tlcoupling.jacobian.cost import layer_costs
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.krylov import OVERSAMPLING, USUAL_STEPS
from tlcoupling.linalg.svd import svd_work
from tlcoupling.linalg.work import Work, measured_rates
from tlcoupling.memory import free_memory
from tlcoupling.slices.sites import Mode, SiteSpec, ends_of, positions_of, window_between
from tlcoupling.slices.slice import vectors_through
from tlcoupling.slices.sweep import SHARE, STACKED

PASSES = 10  # of a block, forward, that take as long as making its derivative at all positions and checking it
PASSES_ALONG = 3  # of each block in the difference of a whole slice
PASSES_APART = 3  # of each block in the test whether the positions between two count alone
# What an allocator takes for the tensors, with what lies between them: of a slice, and of a sweep, whose matrices grow
# from block to block; and bytes of libraries. Measured on SmolLM2.
HOLES, HOLES_OF_SWEEP, LOADED = 1.2, 1.33, 10 * 2**20
# Of what ``autograd_column_bytes`` counts of a vector on its way back through a block: the activations that a closed
# form holds, and the tangents of one vector in a product, which have no graph. Measured.
HELD = 1 / 3
HIDDEN = 3  # activations of an MLP's width that are held at once where its matrix is formed
NORM_VECTORS = 2 * 7 * 6  # vectors that go through a block for its norm


@measured
def estimate_slice(
    trace: Trace,
    source: SiteSpec,
    target: SiteSpec,
    *,
    k: int = 8,
    src: Indices = -1,
    dest: Indices = -1,
    src_mode: Mode = "stack",
    dest_mode: Mode = "stack",
    engine: EngineName = "auto",
) -> Estimate:
    """Estimate what ``slice_jacobian`` and ``truncated_svd`` of it would cost; nothing is run.

    Args:
        trace: a trace of the model.
        source: as in ``slice_jacobian``.
        target: as in ``slice_jacobian``.
        k: number of singular triplets.
        src: as in ``slice_jacobian``.
        dest: as in ``slice_jacobian``.
        src_mode: as in ``slice_jacobian``.
        dest_mode: as in ``slice_jacobian``.
        engine: as in ``slice_jacobian``.

    Returns:
        ``Estimate``: work, memory beyond model and trace, and seconds.

    Raises:
        ArgumentError: as ``slice_jacobian`` would.

    Example:
        >>> tlc.estimate_slice(trace, ("resid_post", 3), ("resid_post", 20), src="all")  # doctest: +SKIP
    """
    require_trace(trace)
    start, end = ends_of(trace, source, target)
    for name, mode in (("src_mode", src_mode), ("dest_mode", dest_mode)):
        check_name(name, mode, get_args(Mode))
    moved, read = positions_of(trace, src, dest)
    counts = [len(each) if mode == "stack" else 1 for each, mode in ((moved, src_mode), (read, dest_mode))]
    blocks = range(start.layer, end.layer if end.stage == "pre" else end.layer + 1)
    window = window_between(trace, {*moved, *read}, engine) if trace.causal else None
    d, costs = trace.d_model, _Counts(window or trace, engine)
    size_out = d * counts[1]
    if end.readout == "logits":
        chosen = int(trace.model.cfg.d_vocab) if end.tokens is None else len(end.tokens)
        size_out = counts[1] * (1 if end.signs else chosen)
    size = min(d * counts[0], size_out)
    k = check_int("k", k, 1, size, "the size of the slice")
    product = sum(costs.product(block) for block in blocks)
    solver, at_once = svd_work(size, k, product, size * product), vectors_through(costs.trace)
    products = -(-size // at_once) if solver.matmul else 2 * USUAL_STEPS  # of a dense matrix, or of Krylov's steps
    stages = {
        "blocks": costs.checks(PASSES + PASSES_ALONG) * len(blocks),
        "decomposition": solver + Work(calls=PASS_CALLS * products * len(blocks)),
    }
    if window is not None:
        stages["positions"] = _Counts(trace, engine).checks(PASSES_APART) * trace.n_layers
    vectors = min(k + OVERSAMPLING, size)
    bases = 3.0 * USUAL_STEPS * vectors * (d * counts[0] + size_out)
    solving = costs.item * bases + costs.column * min(vectors, at_once)
    mean = float(costs.item) * len(read) * size_out**2 if dest_mode == "same" else 0.0  # a matrix, made from a copy
    peak = HOLES * (len(blocks) * costs.held + mean + max(mean, solving))
    return costs.estimate(trace.n_tokens, counts[0], k, stages, peak)


@measured
def estimate_atlas(
    trace: Trace,
    k: int = 8,
    *,
    src: Indices = -1,
    dest: Indices = -1,
    layers: Indices | None = None,
    engine: EngineName = "auto",
) -> Estimate:
    """Estimate what ``sensitivity_atlas`` between outputs of blocks would cost; nothing is run.

    Args:
        trace: a trace of the model.
        k: as in ``sensitivity_atlas``.
        src: as in ``sensitivity_atlas``.
        dest: as in ``sensitivity_atlas``.
        layers: as in ``sensitivity_atlas``.
        engine: as in ``sensitivity_atlas``.

    Returns:
        ``Estimate``: work, memory beyond model and trace, and seconds. A baseline costs the same again.

    Raises:
        ArgumentError: an argument out of range.

    Example:
        >>> tlc.estimate_atlas(trace, src="all").seconds  # doctest: +SKIP
    """
    require_trace(trace)
    d, costs = trace.d_model, _Counts(trace, engine)
    k = check_int("k", k, 1, d, "the width of the stream")
    moved, read = positions_of(trace, src, dest)
    chosen = sorted(resolve_indices("layers", layers, trace.n_layers))
    blocks = range(chosen[0], chosen[-1] + 1)
    pairs = len(chosen) * (len(chosen) - 1) // 2
    passed = sum(max(chosen) - layer for layer in chosen)  # blocks, by all sources
    alone = moved == read and len(moved) == 1
    one_svd = svd_work(d, k, 2.0 * d**2, 0.0)
    stages = {"decomposition": one_svd * (pairs + len(blocks))}
    carried = float(d) * d * (1 if alone else trace.n_tokens)
    if alone:
        stages["sweep"] = Work(matmul=2.0 * d**3 * passed)
        stages["blocks"] = costs.checks(PASSES_APART) * trace.n_layers + costs.jacobians(blocks, moved[0])
        group = len(chosen) - 1
    else:
        group = max(1, min(len(chosen) - 1, int(SHARE * costs.free / (costs.item * carried))))
        sweeps = -(-(len(chosen) - 1) // group)
        formed = d * costs.mlp * len(blocks) * (sweeps + 1) / 2  # later sweeps start higher
        through = sum(costs.formed(block) for block in blocks) / len(blocks)
        stages["blocks"] = costs.checks(PASSES) * len(blocks) + Work(
            matmul=formed, thin=NORM_VECTORS * through * len(blocks)
        )
        stages["sweep"] = Work(matmul=d * through * (passed + len(blocks)))
    kept = 2.0 * d * k * len(chosen) ** 2
    # of what is decomposed together: a copy, and Krylov's three bases, copied as some converge
    stacked = (d**2 + 6.0 * d * min(d, USUAL_STEPS * (k + OVERSAMPLING))) * min(group, max(1, STACKED // d**2))
    held = costs.item * (group * carried + kept + stacked)
    if alone:
        peak = held + costs.item * 5.0 * d**2  # of the block that is formed
        peak += HEAP * (torch.get_num_threads() - 1)
    else:  # a block's matrices are formed beside those of the last one, and what the heap keeps of products with these
        forming = HIDDEN * costs.d_mlp * d * trace.n_tokens + 3.0 * carried
        passing = HELD * costs.column * min(d, vectors_through(trace))
        peak = held + costs.item * forming + passing + len(blocks) * costs.held
    return costs.estimate(trace.n_tokens, len(moved), k, stages, HOLES_OF_SWEEP * peak)


class _Counts:
    """What products and checks of a trace's blocks at all positions cost."""

    def __init__(self, trace: Trace, engine: EngineName) -> None:
        self.trace, model = trace, trace.model
        self.engine: EngineName = engine
        self.splits = splits_of_model(model)
        self._costs = layer_costs(model, range(trace.n_layers), self.splits, trace.n_tokens, engine)
        self._heads, self._size = n_heads_of(model.cfg), int(getattr(model.cfg, "d_head", 0) or 0)
        self.item = trace.resid.dtype.itemsize
        self.column = autograd_column_bytes(model.blocks[0], self._heads, trace.n_tokens, self.item)
        self.free = free_memory(trace.resid.device)
        self.rates = measured_rates(trace.resid.device, trace.resid.dtype)
        first = self._costs[0]
        self._forward = first["block"].forward_flops
        mlp = first.get("mlp")
        self.mlp = mlp.product_flops * trace.n_tokens if mlp is not None and mlp.engine == "analytic" else 0.0
        self.d_mlp = int(getattr(model.cfg, "d_mlp", 0) or 0) if self.mlp else 0
        # of a block, by its closed form: copies of the weights that sublayers write with, and activations
        written = float(self.item) * trace.d_model * (self._heads * self._size + self.d_mlp)
        self.held = self.column if first["block"].engine == "autograd" else written + HELD * self.column

    def product(self, layer: int) -> float:
        """A product of a block's derivative at all positions with one vector."""
        cost = self._costs[layer]["block"]
        if cost.engine == "autograd":
            return cost.product_flops
        return cost.forward_flops + 12.0 * self._heads * self._size * self.trace.n_tokens**2

    def formed(self, layer: int) -> float:
        """The same with the MLP's matrices formed."""
        d = float(self.trace.d_model)
        return self.product(layer) - (self.mlp - 2.0 * self.trace.n_tokens * d**2 if self.mlp else 0.0)

    def checks(self, passes: int) -> Work:
        """A block run so many times, at all positions."""
        softmax = PATTERN_STEPS * self._heads * float(self.trace.n_tokens) ** 2
        return Work(matmul=self._forward, calls=PASS_CALLS, softmax=softmax) * passes

    def jacobians(self, blocks: range, pos: int) -> Work:
        """Making the blocks' Jacobians at one position, and checking them."""
        trace, model = self.trace, self.trace.model
        options = Options.resolve(trace.d_model, 1, "frobenius", "uv", True, self.engine, "auto")
        groups = depth_groups(tuple(blocks), (pos,))
        schedule = make_schedule(
            Comparison(model, self.splits, trace.n_tokens, trace.resid.dtype, ("block",), groups, options)
        )
        dense = sum(self._costs[block]["block"].dense_flops for block in blocks)
        again = next(
            stage for stage in stages_of(model, trace.n_tokens, {"": schedule}, self.rates) if "again" in stage.name
        )
        return Work(matmul=dense, calls=again.seconds * self.rates.calls)

    def estimate(self, n_tokens: int, n_measured: int, k: int, stages: dict[str, Work], peak: float) -> Estimate:
        """Put an estimate together."""
        trace: Any = self.trace
        return Estimate(
            model_name=trace.model_name,
            n_tokens=n_tokens,
            n_measured=n_measured,
            ks=(k,),
            stages=tuple(Stage(name, "", work.flops, self.rates.seconds(work)) for name, work in stages.items()),
            memory_bytes=peak + LOADED,
            free_bytes=self.free,
            rates=self.rates,
        )
