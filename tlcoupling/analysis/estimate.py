"""What a measurement would cost: its work, its memory and its time, known before anything of it is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tlcoupling.arguments import Indices, KSpec, resolve_indices, resolve_sublayers
from tlcoupling.coupling.context import context_groups
from tlcoupling.coupling.depth import depth_groups
from tlcoupling.coupling.groups import Group
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.plan import Job, Plan, make_plan
from tlcoupling.coupling.token import token_groups
from tlcoupling.forward.block import topology_of_model
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import model_name_of, require_supported
from tlcoupling.forward.prompt import to_tokens
from tlcoupling.forward.stream import sublayers_of
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName
from tlcoupling.precision import full_precision

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Stage:
    """A part of the work.

    Attributes:
        name: what is done.
        way: how; empty where there is one way.
        flops: floating-point operations.
    """

    name: str
    way: str
    flops: float


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
        rate: floating-point operations per second of this machine's matrix products, measured.
    """

    model_name: str
    n_tokens: int
    n_measured: int
    ks: tuple[int, ...]
    stages: tuple[Stage, ...]
    memory_bytes: float
    free_bytes: float
    rate: float

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return sum(stage.flops for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds at the rate of matrix products: a lower bound. Calls reach a tenth to a quarter of that rate."""
        return self.flops / self.rate

    def __repr__(self) -> str:
        """One line."""
        from rich.filesize import decimal

        return (
            f"Estimate({self.model_name}: {self.n_measured} of {self.n_tokens} tokens, {self.flops / 1e9:.4g} GFLOP, "
            f"{self.seconds:.2g} s at {self.rate / 1e9:.0f} GFLOP/s, {decimal(int(self.memory_bytes))} of "
            f"{decimal(int(self.free_bytes))} free)"
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per stage: name, way, flops, seconds."""
        import pandas as pd

        rows = [{**vars(stage), "seconds": stage.flops / self.rate} for stage in self.stages]
        return pd.DataFrame(rows)


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
    prepend_bos: bool | None = None,
    attention_mask: Any | None = None,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
) -> Estimate:
    """What ``trace`` and ``depth_coupling`` (or ``analyze``) would cost with these arguments; the model is not run.

    The work is that of the way that the call would take (matrices or products, kept or made again), counted from the
    shapes of the weights. Which sublayers have closed forms is a guess from the names of their weights; with hooks of
    yours attached, pass ``engine="autograd"``.

    Args:
        model: as in ``trace``.
        prompt: as in ``trace``.
        k: as in ``depth_coupling``.
        sublayers: as in ``depth_coupling``.
        tokens: as in ``depth_coupling``.
        layers: as in ``depth_coupling``.
        token_layers: as in ``analyze``; their token-wise and context coupling are counted.
        prepend_bos: as in ``trace``.
        attention_mask: as in ``trace``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.

    Returns:
        ``Estimate``: work, memory, and seconds at the matrix-product rate, which is measured meanwhile (a moment).

    Raises:
        UnsupportedModelError, ArgumentError: as ``trace`` and ``depth_coupling`` would.
        InsufficientMemoryError: as the call would; the message says what would fit.

    Example:
        >>> tlc.estimate(model, "When Mary and John went to the store", tokens="all")  # doctest: +SKIP
    """
    require_supported(model)
    n_tokens = to_tokens(model, prompt, prepend_bos, attention_mask).shape[1]
    topology = topology_of_model(model)
    names, n_layers = resolve_sublayers(sublayers, sublayers_of(topology)), len(model.blocks)
    options = Options.resolve(model.cfg.d_model, k, "frobenius", "uv", True, engine, solver)
    positions = resolve_indices("tokens", tokens, n_tokens)
    chosen = resolve_indices("layers", layers, n_layers)
    first = next(model.blocks.parameters())
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    compared = () if token_layers is None else resolve_indices("token_layers", token_layers, n_layers)
    jobs = {"": (names, depth_groups(chosen, positions))} | _pairs_of_tokens(compared, n_tokens, names)
    plans = {
        kind: make_plan(Job(model, topology, n_tokens, dtype, parts, groups, options))
        for kind, (parts, groups) in jobs.items()
    }
    weights = sum(parameter.numel() for parameter in model.blocks.parameters())
    run_again = sum(plan.run_flops for plan in plans.values())
    stages = [Stage("forward pass", "", 2.0 * weights * n_tokens), Stage("blocks run again", "", run_again)]
    for kind, plan in plans.items():
        stages += _stages(f"{kind} " if kind else "", plan)
    return Estimate(
        model_name=model_name_of(model),
        n_tokens=n_tokens,
        n_measured=len(positions),
        ks=options.k,
        stages=tuple(stages),
        memory_bytes=max(plan.peak_bytes for plan in plans.values()),
        free_bytes=min(plan.free_bytes for plan in plans.values()),
        rate=matmul_rate(first.device, dtype),
    )


def _pairs_of_tokens(
    layers: Sequence[int], n_tokens: int, sublayers: Sequence[str]
) -> dict[str, tuple[tuple[str, ...], list[Group]]]:
    """What ``analyze`` compares in each of its ``token_layers``: by kind, the sublayers and the groups."""
    if not layers:
        return {}
    positions, reach = range(n_tokens), tuple(name for name in sublayers if name != "mlp")
    pairs = {"token-wise": (tuple(sublayers), token_groups(layers, layers, positions))}
    if reach:  # an MLP reaches no other token
        pairs["fixed src"] = (reach, context_groups(layers, "src", 0, positions))
        pairs["fixed dest"] = (reach, context_groups(layers, "dest", n_tokens - 1, positions))
    return pairs


def _stages(kind: str, plan: Plan) -> list[Stage]:
    """The work of a plan: making, decomposing and comparing the Jacobians of each sublayer."""
    stages = []
    for name, (way, count) in plan.ways.items():
        part_of_block = way.formed == 0 and way.name != "products"
        stages.append(
            Stage(f"{kind}{name}: Jacobians", "the block's" if part_of_block else way.name, count * way.formed)
        )
        stages.append(Stage(f"{kind}{name}: decomposition", way.name, count * way.thin))
        stages.append(Stage(f"{kind}{name}: comparison", way.name, count * way.compared))
    return stages


@full_precision()
def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """A device's matrix-product rate in floating-point operations per second, the fastest of several products."""
    size, rounds = (4096, 5) if device.type == "cuda" else (1024, 10)
    a, seconds = torch.randn(size, size, device=device, dtype=dtype), []
    for _ in range(rounds):
        _finish(device)
        started = time.perf_counter()
        _ = a @ a
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)


def _finish(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
