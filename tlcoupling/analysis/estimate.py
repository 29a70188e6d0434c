"""Estimates of the work, memory and time of a measurement, made before it is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tlcoupling.analysis.shared import compared as compared_directions
from tlcoupling.arguments import Indices, KSpec, check_int, resolve_basis_layers, resolve_indices, resolve_sublayers
from tlcoupling.coupling.chance import work_of_draws
from tlcoupling.coupling.context import context_groups
from tlcoupling.coupling.depth import depth_groups
from tlcoupling.coupling.groups import Group, visits
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.schedule import Again, Comparison, Schedule, make_schedule
from tlcoupling.coupling.token import token_groups
from tlcoupling.directions.readout import RANDOM_DIRECTIONS
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.bare import hooked_model
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import model_name_of, require_supported
from tlcoupling.forward.inputs import read_inputs
from tlcoupling.forward.offload import brought_bytes, device_of
from tlcoupling.forward.split import POSITIONWISE, Split, splits_of_model, sublayers_of
from tlcoupling.jacobian.autograd import n_heads_of
from tlcoupling.jacobian.cost import lifted_numbers
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.jacobian.runs import FEW_ROWS
from tlcoupling.linalg.svd import SolverName
from tlcoupling.linalg.work import Rates, Work, measured_rates

if TYPE_CHECKING:
    import pandas

PASS_CALLS = 400.0  # small module calls that take as long as what is not linear algebra in a pass of a block, measured
JACOBIAN_CALLS = 400.0  # likewise in making, checking and handing on a closed form
# Passes of a block for each dest whose closed form is certified (backward), for each src (moved to both sides), and for
# each Jacobian by autograd (forward, backward and its own graph). The checks of a layer are taken together, in 4 calls.
PASSES_OF_DEST, PASSES_OF_SRC, PASSES_OF_AUTOGRAD, CALLS_OF_CHECKS = 2, 2, 3, 4
# Softmaxes that take as long as lifting a weight to float32 in fresh memory, and how often a layer is lifted beyond the
# traced pass; measured.
LIFT_STEPS, LIFTS = 5.0, 3
PATTERN_STEPS = 20.0  # softmaxes that take as long as what a traced pass does with each number of a pattern, measured
# Patterns of one layer that a traced pass holds at once: scores, and what a step makes of them. Counted by PyTorch's
# profiler: 2 in most bridges, 3 in GPT-J's and MPT's; in a HookedTransformer 3 (transformer-lens 4.3) or 4.4 (2.18).
PATTERNS, PATTERNS_OF_HOOKED = 2.0, 4.5
# What the heap keeps between recorded activations of a pass, by their own size. Measured: 0.6 to 0.85 on the CPU at 512
# to 2,048 tokens, 0.15 to 0.6 at 4,096.
BETWEEN = 0.75
LOADED = 15 * 2**20  # bytes of libraries that a first call loads: 13 to 15 MiB measured
STAGES = ("Jacobians", "decomposition", "comparison")
TOKENS = "tokens and contexts"  # the kind of coupling of ``token_layers``


@dataclass(frozen=True)
class Stage:
    """A part of the work.

    Attributes:
        name: what is done.
        method: how; empty where there is only one method.
        flops: floating-point operations.
        seconds: estimated time on this machine.
    """

    name: str
    method: str
    flops: float
    seconds: float


@dataclass(frozen=True, repr=False)
class Estimate:
    """The cost of a measurement.

    Attributes:
        model_name: the model's own name.
        n_tokens: length of the prompt.
        n_measured: tokens whose coupling is measured.
        ks: numbers of singular vectors.
        stages: the parts of the work.
        memory_bytes: memory needed beyond the model, at most.
        free_bytes: memory that is free.
        rates: how fast this machine works, measured.
    """

    model_name: str
    n_tokens: int
    n_measured: int
    ks: tuple[int, ...]
    stages: tuple[Stage, ...]
    memory_bytes: float
    free_bytes: float
    rates: Rates

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return sum(stage.flops for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Estimated seconds of the call on this machine, where nothing else loads it."""
        return sum(stage.seconds for stage in self.stages)

    def __repr__(self) -> str:
        """One line."""
        from rich.filesize import decimal

        return (
            f"Estimate({self.model_name}: {self.n_measured} of {self.n_tokens} tokens, {self.flops / 1e9:.4g} GFLOP, "
            f"about {self.seconds:.2g} s, {decimal(int(self.memory_bytes))} of "
            f"{decimal(int(self.free_bytes))} free)"
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per stage: name, method, flops, seconds."""
        import pandas as pd

        return pd.DataFrame([vars(stage) for stage in self.stages])


@measured
def estimate(
    model: Any,
    prompt: Any,
    k: KSpec = 10,
    *,
    sublayers: str | Sequence[str] | None = None,
    tokens: Indices = -1,
    layers: Indices | None = None,
    token_layers: Indices | None = None,
    basis_layers: Indices | None = None,
    prepend_bos: bool | None = None,
    attention_mask: Any | None = None,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
    draws: int = 0,
    shared: bool = False,
) -> Estimate:
    """Estimate what ``trace`` and ``depth_coupling`` (or ``analyze``) would cost; the model is not run.

    Counts the work of the schedule that the call would follow, from the shapes of the weights, and turns it into
    seconds by rates of this machine. These are measured once per process, in a fraction of a second. Which sublayers
    have closed forms is a guess from the names of their weights. With your own hooks attached, pass
    ``engine="autograd"``. Writing files and pages is not counted.

    Args:
        model: as in ``trace``.
        prompt: as in ``trace``; text or token ids alone, whose length is known without a run.
        k: as in ``depth_coupling``.
        sublayers: as in ``depth_coupling``.
        tokens: as in ``depth_coupling``.
        layers: as in ``depth_coupling``.
        token_layers: as in ``analyze``; their token-wise and context coupling are counted.
        basis_layers: as in ``analyze``.
        prepend_bos: as in ``trace``.
        attention_mask: as in ``trace``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.
        draws: of ``test()`` of the depth-wise coupling; by default it is not counted.
        shared: as in ``analyze``; by default it is not counted.

    Returns:
        ``Estimate``: work, memory and seconds.

    Raises:
        UnsupportedModelError, ArgumentError: as ``trace`` and ``depth_coupling`` would.
        InsufficientMemoryError: as the call would; the message says what would fit.

    Example:
        >>> tlc.estimate(model, "When Mary and John went to the store", tokens="all")  # doctest: +SKIP
    """
    model = hooked_model(model)
    require_supported(model)
    inputs = read_inputs(model, prompt, prepend_bos, attention_mask)
    if not inputs.is_text:
        raise ArgumentError(
            "prompt", "no text", "text or token ids: only a run tells how many positions other inputs have"
        )
    n_tokens = inputs.tensor.shape[1]
    splits = splits_of_model(model)
    names, n_layers = resolve_sublayers(sublayers, sublayers_of(splits)), len(model.blocks)
    options = Options.resolve(model.cfg.d_model, k, "frobenius", "uv", True, engine, solver)
    positions = resolve_indices("tokens", tokens, n_tokens)
    chosen = resolve_indices("layers", layers, n_layers)
    first = next(model.blocks.parameters())
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    compared = () if token_layers is None else resolve_indices("token_layers", token_layers, n_layers)
    others = resolve_basis_layers(basis_layers, compared, n_layers)
    jobs = {"": depth_groups(chosen, positions), TOKENS: _pairs_of_tokens(compared, others, n_tokens, names)}
    schedules = {
        kind: make_schedule(Comparison(model, splits, n_tokens, dtype, names, groups, options))
        for kind, groups in jobs.items()
        if groups
    }
    rates = measured_rates(device_of(model.blocks), dtype)
    stages = stages_of(model, n_tokens, schedules, rates)
    if check_int("draws", draws, 0):
        pairs = len(chosen) * (len(chosen) - 1) // 2
        work = work_of_draws(draws, pairs, len(names) * len(positions), max(options.k))
        stages += (Stage("rotation test", f"{draws} draws", work.flops, rates.seconds(work)),)
    if shared:
        few, size = compared_directions(n_layers, options.k)
        parts = Options.resolve(model.cfg.d_model, size, "frobenius", "uv", True, engine, solver)
        groups = depth_groups(few, [positions[-1]])
        schedules["shared"] = make_schedule(Comparison(model, splits, n_tokens, dtype, ("block",), groups, parts))
        stages += _shared_stages(schedules["shared"], rates)
    return Estimate(
        model_name=model_name_of(model),
        n_tokens=n_tokens,
        n_measured=len(positions),
        ks=options.k,
        stages=stages,
        memory_bytes=memory_with_trace(
            model, splits, n_tokens, dtype, max(schedule.peak_bytes for schedule in schedules.values())
        ),
        free_bytes=min(schedule.free_bytes for schedule in schedules.values()),
        rates=rates,
    )


def memory_with_trace(
    model: Any, splits: Sequence[Split], n_tokens: int, dtype: torch.dtype, peak_bytes: float
) -> float:
    """Return the memory beyond the model of a measurement and of the trace that it is taken on, at most.

    The pass records what sublayers read and write. Its allocator keeps memory between these until the pass has ended,
    and then what was recorded is stacked. The trace holds the stream and the writes, and the mask of the blocks' calls.

    Args:
        model: the model, or the shapes of its weights.
        splits: how each block is split.
        n_tokens: length of the prompt.
        dtype: of the trace.
        peak_bytes: of the measurement beyond its trace.
    """
    cfg, n_layers, size = model.cfg, len(splits), int(getattr(model.cfg, "d_head", 0) or 0)
    stream = dtype.itemsize * float(n_tokens) * cfg.d_model
    names = len(splits[0].names)
    recorded, stacked = 1 + n_layers * max(2, 2 * names), 1 + n_layers * (1 + names)
    groups = int(getattr(cfg, "n_key_value_heads", 0) or n_heads_of(cfg))
    cached = dtype.itemsize * float(n_tokens) * 2 * n_layers * groups * size
    hooked = hasattr(model, "hook_dict") and not hasattr(model, "original_model")
    pattern = dtype.itemsize * float(n_tokens) ** 2
    patterns = pattern * n_heads_of(cfg) * (PATTERNS_OF_HOOKED if hooked else PATTERNS)
    passing = stream * recorded + max(BETWEEN * stream * recorded + patterns, stream * stacked)
    passing += brought_bytes(model) if isinstance(model, nn.Module) else 0.0  # and not shapes alone
    return LOADED + cached + pattern + max(passing, stream * stacked + peak_bytes)


def stages_of(model: Any, n_tokens: int, schedules: Mapping[str, Schedule], rates: Rates) -> tuple[Stage, ...]:
    """List the work of a trace and of some schedules.

    Args:
        model: the model, or the shapes of its weights.
        n_tokens: length of the prompt.
        schedules: by the kind of coupling; empty for that across depth.
        rates: how fast the machine works.
    """
    weights = sum(parameter.numel() for parameter in model.blocks.parameters())
    patterns = len(model.blocks) * n_heads_of(model.cfg) * float(n_tokens) ** 2  # numbers in them
    products, few = 2.0 * weights * n_tokens, n_tokens <= FEW_ROWS
    traced = Work(
        matmul=4.0 * int(getattr(model.cfg, "d_head", 0) or 0) * patterns + (0.0 if few else products),
        weights=products if few else 0.0,
        calls=PASS_CALLS * len(model.blocks),
        softmax=PATTERN_STEPS * patterns + LIFT_STEPS * lifted_numbers(model.blocks),
    )
    checked = sum((_passes_again(schedule) for schedule in schedules.values()), Work())
    stages = [
        Stage(name, "", work.flops, rates.seconds(work))
        for name, work in (("forward pass", traced), ("blocks run again", checked))
    ]
    for kind, schedule in schedules.items():
        for (sublayer, stage), work in _by_stage(schedule).items():
            names = {method.name for (_, name), method in schedule.methods.items() if name == sublayer}
            shared = stage == "Jacobians" and work.flops == 0 and "products" not in names
            method = "the block's" if shared else ", ".join(sorted(names))
            name = f"{kind} {sublayer}: {stage}".lstrip()
            stages.append(Stage(name, method, work.flops, rates.seconds(work, schedule.workers)))
    return tuple(stages)


def _shared_stages(schedule: Schedule, rates: Rates) -> tuple[Stage, ...]:
    """List the work of ``shared_directions``."""
    comparison, work = schedule.comparison, {stage: work for (_, stage), work in _by_stage(schedule).items()}
    cfg, found = comparison.model.cfg, len(comparison.layers) * max(comparison.options.k) + RANDOM_DIRECTIONS
    decomposed = work["Jacobians"] + work["decomposition"] + _passes_again(schedule)
    vocabulary = float(cfg.d_vocab) * cfg.d_model
    # logits are followed through autograd, forwards and backwards, and embeddings multiplied; each time, the numbers
    # come from memory
    passes = -(-found // RANDOM_DIRECTIONS)
    read = Work(thin=(4.0 + 2.0) * found * vocabulary, softmax=(2.0 + 1.0) * passes * vocabulary)
    parts = {"matrices": decomposed + work["comparison"], "tokens": read}
    return tuple(Stage(f"shared block: {name}", "", part.flops, rates.seconds(part)) for name, part in parts.items())


def _by_stage(schedule: Schedule) -> dict[tuple[str, str], Work]:
    """Return the work on Jacobians by sublayer and stage."""
    comparison, names = schedule.comparison, schedule.comparison.sublayers
    batches = [[visit.place for visit in visits(batch)] for batch in schedule.batches]
    made = Counter((place.layer, name) for places in batches for place in places for name in place.of(names))
    dests = Counter(layer for places in batches for layer, _ in {(place.layer, place.dest) for place in places})
    pairs = Counter[tuple[int, str]]()
    for group in comparison.groups:
        for place, name in product(group.rows, group.compared(names)):
            pairs[place.layer, name] += len(group.columns)
    overlaps = Work(thin=4.0 * comparison.model.cfg.d_model * max(comparison.options.k) ** 2)
    stages: dict[tuple[str, str], Work] = dict.fromkeys(product(names, STAGES), Work())
    for (layer, name), method in schedule.methods.items():
        count, pairs_of = made[layer, name], pairs[layer, name]
        closed, block = schedule.costs[layer, name].engine == "analytic", schedule.costs.get((layer, "block"))
        # a block's closed form is made of the matrices of its sublayers; by autograd a row is half a product
        shared = name != "block" and block is not None and block.engine == "analytic"
        forming = method.forming * (0.0 if shared else 1.0 if closed else 0.5)
        stages[name, "Jacobians"] += (forming + Work(calls=JACOBIAN_CALLS)) * count
        if name == "block" and closed and forming.flops and (layer, "mlp") in schedule.costs:
            # all that reach a dest share its MLP
            stages[name, "Jacobians"] += Work(matmul=schedule.costs[layer, "mlp"].dense_flops) * (dests[layer] - count)
        stages[name, "decomposition"] += method.decomposing * count
        stages[name, "comparison"] += (method.comparing + overlaps) * pairs_of
    return stages


def _passes_again(schedule: Schedule) -> Work:
    """Return the work of running blocks again: to certify closed forms, and for each Jacobian by autograd."""
    work, comparison, model = Work(), schedule.comparison, schedule.comparison.model
    closed = all(cost.engine == "analytic" for cost in schedule.costs.values())
    rows = comparison.again.rows if closed else comparison.n_tokens
    for batch in schedule.batches:
        places = set().union(*(group.places for group in batch))
        for layer in comparison.layers:
            of_layer = [place for place in places if place.layer == layer]
            dests, srcs = ({getattr(place, side) for place in of_layer} for side in ("dest", "src"))
            costs = [cost for (one, _), cost in schedule.costs.items() if one == layer]
            by_autograd = sum(cost.engine == "autograd" for cost in costs)
            alone = PASSES_OF_AUTOGRAD * by_autograd * len(of_layer)
            again = Again(rows, len(srcs), len(dests))
            passes = 2 * again.streams if again.few else 1 + PASSES_OF_DEST * len(dests) + PASSES_OF_SRC * len(srcs)
            products = costs[0].forward_flops * rows / comparison.n_tokens * passes
            work += Work(
                matmul=costs[0].forward_flops * alone + (0.0 if again.few else products),
                weights=products if again.few else 0.0,
                calls=PASS_CALLS * (CALLS_OF_CHECKS + alone),
                softmax=PATTERN_STEPS * n_heads_of(model.cfg) * rows * comparison.n_tokens * passes
                + LIFT_STEPS * LIFTS * lifted_numbers(model.blocks[layer]),
            )
    return work


def _pairs_of_tokens(
    layers: Sequence[int], others: Sequence[int], n_tokens: int, sublayers: Sequence[str]
) -> list[Group]:
    """Return what ``analyze`` compares in each of its ``token_layers``."""
    positions = range(n_tokens)
    groups = token_groups(layers, others, positions)
    if not {*sublayers} <= {*POSITIONWISE}:  # an MLP reaches no other token
        groups += context_groups(layers, others, "src", 0, positions)
        groups += context_groups(layers, others, "dest", n_tokens - 1, positions)
    return groups
