"""Central differences of what is run, held against what a Jacobian says of it: the last link of the chain of trust.

A closed form is held against autograd (``certificate``), and autograd against the function itself, here. A graph that
is cut (``no_grad``, ``detach``, numpy) or a derivative that is made up (straight-through rounding) gives another
Jacobian than the function has, and no error. Each measured pair (src, dest) is tested by itself, along one direction.

Where a first difference disagrees, ``Function.verdict`` takes more of them: in several directions, on both sides, over
a ladder of steps. It tells four things apart:

- rounding: the gap stays within the function's own rounding, which is measured;
- curvature and kinks (ReLU): the gap shrinks with the step, on one side at least, until nothing is left of it;
- a jump close by (a router's tie): most directions agree, on one side at least;
- a false derivative: none of these. Differences then settle elsewhere, or, on a staircase, nowhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlcoupling.errors import DerivativeError, HookError
from tlcoupling.forward.hooked import Hook
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.autograd import at_once
from tlcoupling.jacobian.certificate import Pair
from tlcoupling.jacobian.runs import FEW_ROWS, random_vector
from tlcoupling.linalg.operator import JacobianOperator

# Steps relative to the length of what is moved. HuggingFace's modules cast to float32 inside, so that float64 models
# gain nothing from smaller ones. A difference is good to the square of the step and to rounding over the step.
STEP = 1.6e-2
_LADDER = (4 * STEP, STEP, STEP / 4, STEP / 16, STEP / 64)
_TINY = 1e-6  # a move that shows rounding: its true effect is far below the tolerance at each step of the ladder
_DIRECTIONS = 4
# A step four times smaller has at most 1 / this of the gap: kinks and curves leave less, but for noise. On a staircase
# the gap grows until the step is shorter than a tread, in n coordinates by sqrt(n) at once.
_SHRINKS = 0.8
# Halvings of the interval in which the gap begins: its ends then differ by 0.03 %, and so does the gap but for a jump.
_HALVINGS = 12
# How far a Jacobian's product may lie from a difference, relative to the larger of the two.
TOLERANCE = 0.02
# Rounding of a sublayer's write, relative to its length: what is assumed at first, and at most once it is measured.
# Scores of 100 move a pattern by 100 float32 roundings, 1e-5.
_ROUNDING, _MOST_ROUNDING = 10 * torch.finfo(torch.float32).eps, 1e-4


@dataclass(frozen=True)
class Function:
    """A function, what is said of its derivative, and how it is run.

    Attributes:
        where: its name in a message; ``{row}`` in it stands for the row.
        moved: from moves of the input ``[move, *input]`` to the changes of the output that they make, ``[move, row,
            d]``.
        product: from a direction of the input to the Jacobian's product with it, ``[row, d]``.
        size: by what a direction is multiplied where the step is 1.
        lengths: of the output's rows, to which their rounding is relative.
        hooked: whether hooks of the user's act in it.
    """

    where: str
    moved: Callable[[Tensor], Float[Tensor, "move row d"]]
    product: Callable[[Tensor], Float[Tensor, "row d"]]
    size: float
    lengths: Float[Tensor, " row"]
    hooked: bool

    def require(self, directions: Tensor) -> str | None:
        """Hold the product against one central difference, and against many where that does not confirm it.

        Args, Returns, Raises:
            see ``verdict``.
        """
        step = STEP * self.size
        up, down = self.moved(torch.stack([step * directions[0], -step * directions[0]]))
        right = agree(self.product(directions[0]), (up - down) / (2 * step), _ROUNDING * self.lengths / step)
        return None if right.all() else self.verdict(directions)

    def verdict(self, directions: Tensor) -> str | None:
        """Judge the product by many differences.

        Args:
            directions: of the input, in which it is moved by a step times ``size``, ``[direction, *input]``.

        Returns:
            None where the product is right. Why nothing can be said, where a hook of the user's is not smooth.

        Raises:
            HookError: the product is not the derivative, and hooks act.
            DerivativeError: the product is not the derivative of the model's own function.
        """
        steps = self.size * torch.tensor(_LADDER, dtype=self.lengths.dtype, device=self.lengths.device)
        tiny = self._quotients(directions, steps.new_full((len(directions),), _TINY * self.size))
        rounding = _TINY * self.size * tiny[1:].norm(dim=-1).flatten(0, 1).median(dim=0).values
        # of runs, by side: a central quotient has half of their difference
        rounding = 3 * rounding.clamp(max=_MOST_ROUNDING * self.lengths) * steps.new_tensor([[1.0], [2.0], [2.0]])
        sides = torch.stack([self._quotients(directions, step.expand(len(directions))) for step in steps], dim=2)
        product = torch.stack([self.product(one) for one in directions])[:, None].expand_as(sides)
        unsure = rounding[:, None, None] / steps[:, None]  # [side, 1, step, row]
        close, gap = agree(product, sides, unsure), (sides - product).norm(dim=-1)
        share = close.any(0).float().mean(0)  # [step, row]
        right = (share[1] >= 0.5) & (share[2] >= 0.75)  # a jump close by, or rounding alone
        # nothing is relative to a product of zero: the function has to be constant, over longer moves too
        constant = product[0, :, 0].norm(dim=-1).amax(0) == 0
        right &= ~constant | close[0, :, 0].all(0)
        for row in (~right & ~constant).nonzero().flatten().tolist():
            right[row] = self._approached(directions, row, steps, close[..., row], gap[..., row], rounding[:, row])
        if right.all():
            return None
        settled = agree(sides[0, :, 1], sides[0, :, 2], unsure[0, :, 2]).float().mean(0) >= 0.5
        wrong = ~right & settled if (~right & settled).any() else ~right
        row = int(wrong.nonzero()[0])
        where = self.where.replace("{row}", str(row))
        lengths = (
            f"autograd's product with a direction has length {float(product[0, 0, 0, row].norm()):.3g}, and lies "
            f"{float(gap[0, 0, 1, row]):.3g} from central differences"
        )
        if self.hooked and settled[row]:
            raise HookError(
                f"{where}: autograd does not see all that is run: {lengths}. A hook that detaches the graph does this "
                "(detach(), no_grad, numpy, an autoencoder's detached error term)"
            )
        if self.hooked:
            return (
                f"{where}: the Jacobian could not be checked by differences, which do not settle ({lengths}): a hook "
                "is not smooth there"
            )
        raise DerivativeError(
            f"{where}: autograd's derivative is not that of the function that is run: {lengths}, which "
            f"{'settle there' if settled[row] else 'do not settle'}. Parts that run without a graph do this (experts "
            "under no_grad, a detached part, a hook registered on all modules), and so do rounded activations (int8, "
            "ternary weights with straight-through derivatives)"
        )

    def _approached(
        self,
        directions: Tensor,
        row: int,
        steps: Float[Tensor, " step"],
        close: Bool[Tensor, "side direction step"],
        gap: Float[Tensor, "side direction step"],
        rounding: Float[Tensor, " side"],
    ) -> bool:
        """Return whether quotients approach a row of the product as the step shrinks, as on a curve and behind kinks.

        On one side of most directions the gap shrinks with the step, without a jump, until nothing is left of it.
        """
        product = torch.stack([self.product(one)[row] for one in directions])
        # down to the smallest step that rounding leaves sharp
        sharp = (rounding.amax() / steps <= TOLERANCE * product.norm(dim=-1)[:, None])[None]
        shrinks = ((_SHRINKS * gap[..., 1:] <= gap[..., :-1]) | close[..., 1:] | ~sharp[..., 1:]).all(-1)
        last = sharp.sum(-1).expand(len(gap), -1) - 1
        good = shrinks & (last >= 2) & close.gather(-1, last.clamp_min(0)[..., None])[..., 0]
        if good.any(0).float().mean() < 0.75:
            return False
        # the first step that is too long, if any, and the one before it: where between them does the gap begin?
        apart = (~close & sharp).long().cumsum(-1).argmax(-1)
        apart = torch.where((~close & sharp).any(-1), apart, last)
        high, low = steps[apart], steps[torch.minimum(apart + 1, last.clamp_min(0))]
        several = directions.repeat(len(gap), *[1] * (directions.ndim - 1))

        def quotients(at: Float[Tensor, "side direction"]) -> Float[Tensor, "side direction d"]:
            every = self._quotients(several, at.flatten())[:, :, row].unflatten(1, at.shape)
            return torch.stack([every[side, side] for side in range(len(every))])

        product = product.expand(len(gap), *product.shape)
        for _ in range(_HALVINGS):
            middle = (low * high).sqrt()
            near = agree(product, quotients(middle), rounding[:, None] / middle)
            low, high = torch.where(near, middle, low), torch.where(near, high, middle)
        good &= agree(quotients(low), quotients(high), rounding[:, None] / low)
        return bool(good.any(0).float().mean() >= 0.75)

    def _quotients(
        self, directions: Tensor, steps: Float[Tensor, " direction"]
    ) -> Float[Tensor, "side direction row d"]:
        """Return central quotients, those ahead and those back, of a step of its own along each direction."""
        moves = steps.view(-1, *[1] * (directions.ndim - 1)) * directions
        up, down = self.moved(torch.cat([moves, -moves])).unflatten(0, (2, -1)) / steps[:, None, None]
        return torch.stack([(up - down) / 2, up, -down])


def agree(
    product: Float[Tensor, "*batch d"], quotient: Float[Tensor, "*batch d"], rounding: Float[Tensor, "*#batch"]
) -> Bool[Tensor, "*batch"]:
    """Return where products with a Jacobian lie within ``TOLERANCE`` and rounding of difference quotients."""
    size = torch.maximum(product.norm(dim=-1), quotient.norm(dim=-1))
    return (product - quotient).norm(dim=-1) <= TOLERANCE * size + rounding


def leaning(stream: Float[Tensor, "*rows d"]) -> Float[Tensor, "direction *rows d"]:
    """Draw directions of length 1 that lean as much on a stream, which norms read, as on chance.

    A norm whose scale is off the graph errs along its input alone, a small share of a random direction.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randn((_DIRECTIONS, *stream.shape), generator=generator, dtype=stream.dtype).to(stream.device)
    length = stream.norm(dim=-1, keepdim=True)
    mixed = random / random.norm(dim=-1, keepdim=True) + stream / torch.where(length > 0, length, 1.0)
    return mixed / mixed.norm(dim=-1, keepdim=True)


def require_step_followed(
    trace: Trace, step: JacobianOperator, layer: int, move: Float[Tensor, "pos d_model"], hooked: bool
) -> str | None:
    """Check what autograd makes of a perturbation of a whole stream by one block, at each position.

    The skip connection, which would hide small Jacobians, is taken off both sides.

    Args:
        trace: a trace of the model.
        step: the block's Jacobian, all positions in one vector.
        layer: block index.
        move: the perturbation before the block.
        hooked: whether hooks of the user's act in the block.

    Returns, Raises:
        see ``Function.verdict``.
    """
    lengths = move.norm(dim=-1)
    moving = lengths > 0
    if not moving.any():
        return None
    start = trace.block_input(layer)

    @torch.no_grad()
    def moved(moves: Float[Tensor, "move pos d_model"]) -> Float[Tensor, "move pos d_model"]:
        still = trace.run_block(layer, start.clone(), {})[0]
        return torch.stack([trace.run_block(layer, start + one, {})[0] - still - one for one in moves])

    draws = torch.stack([random_vector(trace, layer, _seed(layer, index)) for index in range(len(move))])
    others = [draws.roll(index, 0).to(move) * lengths[:, None] for index in range(_DIRECTIONS - 1)]
    return Function(
        where=f"layer {layer}, block at position {{row}}",
        moved=moved,
        product=lambda direction: step.mv(direction.flatten()).unflatten(0, move.shape) - direction,
        # no position moves by more than a step's share of its own stream
        size=float((trace.resid[layer].norm(dim=-1)[moving] / lengths[moving]).min()) or 1.0,
        lengths=trace.resid[layer + 1].norm(dim=-1).to(start),
        hooked=hooked,
    ).require(torch.stack([move, *others]).to(start))


@dataclass(frozen=True)
class Quotient:
    """A central difference.

    Attributes:
        direction: along which the input was moved.
        value: the change of the output per unit.
        rounding: how far rounding may have moved the value.
    """

    direction: Float[Tensor, " d_model"]
    value: Float[Tensor, " d_model"]
    rounding: Float[Tensor, ""]


# Directions, lengths of the moves ahead, and the moves: all ahead, then all back.
_Moves = tuple[Float[Tensor, "src d_model"], Float[Tensor, " src"], Float[Tensor, "move pos d_model"]]


class BlockDifferences:
    """Central differences of a block and its sublayers.

    One pair of runs moves x^l at ``src``, and shows what the attention, the MLP and the block make of it at all
    ``dest``. All announced pairs are taken together, a batch of moves in one run, unless hooks of the user's act.

    Attributes:
        gap: the largest distance of a Jacobian's product from a difference that confirmed it, relative to the larger.
        ran: what the sublayers wrote in a run of the streams that ``moves`` moves; empty where there was none.
    """

    def __init__(self, trace: Trace, layer: int, hooked: bool, pairs: Iterable[Pair] = ()) -> None:
        """Take a layer.

        Args:
            trace: a trace of the model.
            layer: block index.
            hooked: whether hooks of the user's act in the block.
            pairs: (src, dest) that will be asked for.
        """
        self._trace, self.layer, self._hooked = trace, layer, hooked
        self._pairs = frozenset(pairs)
        self._sources = sorted({src for src, _ in self._pairs})
        self._batched = not hooked
        self._known: dict[tuple[str, int, int], Quotient] = {}
        self._constants: dict[tuple[str, int, int], bool] = {}
        self.gap = 0.0
        self.ran: Mapping[str, Tensor] = {}

    @property
    def moves(self) -> Float[Tensor, "move pos d_model"] | None:
        """The moves of x^l that show all announced pairs, ahead and back; None where hooks act, or they are many."""
        if self._hooked or not 0 < 2 * len(self._sources) * self._trace.n_tokens <= FEW_ROWS:
            return None
        return self._announced[2]

    @cached_property
    def _announced(self) -> _Moves:
        """The moves of x^l at all announced sources."""
        return self._moves(self._sources, "block", STEP, -STEP)

    def quotient(self, sublayer: str, src: int, dest: int) -> Quotient:
        """Return the difference of a sublayer at ``dest`` for a move of its input at ``src``.

        The MLP of a sequential block reads x_mid, which the attention moves too where x^l is moved: its direction for
        src = dest is that of x_mid.
        """
        key = (sublayer, src, dest)
        if key not in self._known:
            of = sublayer if src != dest and self._inside(sublayer) else "block"
            wanted = self._pairs if (src, dest) in self._pairs else {(src, dest)}
            by_src: dict[int, set[int]] = {}
            for one, other in wanted:
                by_src.setdefault(one, set()).add(other)
            # of a run that is there already, what is asked for; a run of its own tells all that it shows
            alone = of != "block" or (self.ran and not self._inside(sublayer))
            self._measure(by_src, of, (sublayer,) if alone else self._trace.sublayers)
        return self._known[key]

    def require(
        self, operator: JacobianOperator, sublayer: str, src: int, dest: int, product: Float[Tensor, " d_model"]
    ) -> str | None:
        """Hold a Jacobian against one central difference, and against many where that does not confirm it.

        Args:
            operator: the Jacobian.
            sublayer: one of ``trace.sublayers``.
            src: input position.
            dest: output position.
            product: of the Jacobian with the direction of ``quotient``.

        Returns, Raises:
            see ``Function.verdict``.
        """
        one = self.quotient(sublayer, src, dest)
        if product.norm() > 0 and agree(product, one.value, one.rounding):
            larger = torch.maximum(product.norm(), one.value.norm())
            self.gap = max(self.gap, float((product - one.value).norm() / larger))
            return None
        if product.norm() == 0 and one.value.norm() <= one.rounding and self._constant(sublayer, src, dest):
            return None
        trace, layer = self._trace, self.layer
        stream = trace.input_of(layer, sublayer)[0]
        seeds = (_seed(layer, src) + 1 + index for index in range(_DIRECTIONS))
        directions = torch.stack([self._direction(stream, src, seed) for seed in seeds])
        wrote = trace.resid.diff(dim=0) if sublayer == "block" else trace.writes[sublayer]
        batched = self._batched

        def moved(moves: Float[Tensor, "move d"]) -> Float[Tensor, "move 1 d"]:
            whole = stream.new_zeros(len(moves), *stream.shape)
            whole[:, src] = moves
            still = self._run(sublayer, whole[:1] * 0, batched)
            chunk = at_once(trace, layer)
            runs = [self._run(sublayer, part, batched) for part in whole.split(chunk)]
            return torch.cat([self._change(run, still, sublayer, [dest]) for run in runs])

        function = Function(
            where=f"layer {layer}, {sublayer} from position {src} to {dest}",
            moved=moved,
            product=lambda direction: operator.mv(direction)[None],
            size=_length(stream[src]),
            lengths=wrote[layer, dest].norm()[None].to(stream),
            hooked=self._hooked,
        )
        try:
            return function.verdict(directions)
        except DerivativeError:
            if not batched:
                raise
            batched = False  # modules may do otherwise on a batch
            return function.verdict(directions)

    def _measure(self, by_src: Mapping[int, Iterable[int]], of: str, names: Iterable[str]) -> None:
        """Take some sublayers' differences for moves at each src of what one reads, or of x^l for the block and all."""
        for src, direction, step, (up, down) in self._moved(by_src, of, STEP, -STEP):
            for name in names:
                dests = sorted(by_src[src])
                for dest, change in zip(dests, self._change(up, down, name, dests)[0], strict=True):
                    self._keep(name, src, dest, direction, change / (2 * step), step, of)

    def _constant(self, sublayer: str, src: int, dest: int) -> bool:
        """Return whether what a sublayer writes at ``dest`` stays when its input at ``src`` moves by its own length.

        This confirms a Jacobian of zero by one pair of runs for all announced pairs of a source.
        """
        if (sublayer, src, dest) not in self._constants:
            pairs = self._pairs if (src, dest) in self._pairs else {(src, dest)}
            sources = {one for one, _ in pairs}
            for one, _, _, (up, down) in self._moved(sources, sublayer, 1.0, -0.5):
                dests = sorted(end for start, end in pairs if start == one)
                for end, change in zip(dests, self._change(up, down, sublayer, dests)[0], strict=True):
                    still = change.norm() <= _ROUNDING * self._written(sublayer, end).to(change)
                    self._constants[sublayer, one, end] = bool(still)
        return self._constants[sublayer, src, dest]

    def _moved(
        self, sources: Iterable[int], of: str, ahead: float, back: float
    ) -> Iterator[tuple[int, Float[Tensor, " d"], Float[Tensor, ""], tuple[dict[str, Tensor], dict[str, Tensor]]]]:
        """Move the input at each source, some sources in a batch of runs.

        Args:
            sources: positions.
            of: the sublayer whose input is moved.
            ahead: how far in one run, relative to the length of the input there.
            back: how far in the other.

        Yields:
            The source, the direction, the length of the move ahead, and what the two runs wrote.
        """
        order = sorted(sources)
        chunk = max(1, at_once(self._trace, self.layer) // 2) if len(order) > 1 else 1
        for some in (order[start : start + chunk] for start in range(0, len(order), chunk)):
            announced = some == self._sources and of == "block" and ahead == STEP
            directions, steps, moves = self._announced if announced else self._moves(some, of, ahead, back)
            ran = (self.ran if announced else {}) or self._run(of, moves, self._batched)
            for index, src in enumerate(some):
                up, down = (
                    {name: rows[which : which + 1] for name, rows in ran.items()}
                    for which in (index, index + len(some))
                )
                yield src, directions[index], steps[index], (up, down)

    def _moves(self, sources: list[int], of: str, ahead: float, back: float) -> _Moves:
        """Return each source's direction, the length of its move ahead, and the moves: all ahead, then all back."""
        stream = self._trace.input_of(self.layer, of)[0]
        directions = torch.stack([self._direction(stream, src, _seed(self.layer, src)) for src in sources])
        lengths = stream[sources].norm(dim=-1)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        moves = stream.new_zeros(len(sources), *stream.shape)
        moves[range(len(sources)), sources] = lengths[:, None] * directions
        return directions, ahead * lengths, torch.cat([ahead * moves, back * moves])

    def _direction(self, stream: Float[Tensor, "pos d_model"], src: int, seed: int) -> Float[Tensor, " d_model"]:
        """Draw a direction of length 1 that leans as much on what the norms read as on chance.

        A norm whose scale is off the graph errs along its input alone, a small share of a random direction.
        """
        read = (stream, self._trace.mlp_input(self.layer)[0])
        mixed = sum((rows[src] / _length(rows[src]) for rows in read), random_vector(self._trace, self.layer, seed))
        return mixed / _length(mixed)

    def _keep(self, name: str, src: int, dest: int, direction: Tensor, value: Tensor, step: Tensor, of: str) -> None:
        if self._inside(name) and of == "block":
            if src != dest:
                return
            before = itertools.takewhile(lambda other: other != name, self._trace.writes)
            direction = sum((self._known[other, src, dest].value for other in before), direction)
        rounding = _ROUNDING * self._written(name, dest).to(step) / step
        self._known[name, src, dest] = Quotient(direction, value.clone(), rounding)

    def _written(self, name: str, dest: int) -> Float[Tensor, ""]:
        """The length of what a sublayer, or all of a block's, wrote."""
        first, *others = (part[self.layer, dest].norm() for part in _writes(self._trace, name))
        return sum(others, first)

    def _change(
        self, up: Mapping[str, Tensor], down: Mapping[str, Tensor], name: str, dests: list[int]
    ) -> Float[Tensor, "move dest d"]:
        """The difference of two runs in what a sublayer writes, or in all that a block adds to the stream.

        The stream is long where its writes are short, so that it would round them away: what a block adds beside its
        writes counts only where it rises above the rounding of the stream.
        """
        if name != "block":
            return (up[name] - down[name])[:, dests]
        rest = (up["rest"] - down["rest"])[:, dests]
        if not self._trace.writes:
            return rest
        writes = sum((up[part] - down[part])[:, dests] for part in self._trace.writes)
        lengths = self._trace.resid[self.layer + 1].norm(dim=-1).to(rest)[dests]
        return writes + rest * (rest.norm(dim=-1) > _ROUNDING * lengths)[..., None]

    def _run(self, of: str, moves: Float[Tensor, "move pos d"], batched: bool) -> dict[str, Tensor]:
        """What the sublayers write in runs with a sublayer's input moved, and what the block adds beside it."""
        if batched:
            try:
                return self._run_together(of, moves)
            except Exception:  # whatever a module raises that takes no batch; one by one it shows what it is
                self._batched = False
        runs = [self._run_together(of, move[None]) for move in moves]
        return {name: torch.cat([run[name] for run in runs]) for name in runs[0]}

    @torch.no_grad()
    def _run_together(self, of: str, moves: Float[Tensor, "move pos d"]) -> dict[str, Tensor]:
        trace, layer = self._trace, self.layer
        kept: dict[str, Tensor] = {}
        hooks: dict[str, Hook] = {
            sublayer.write: lambda tensor, name=name: kept.__setitem__(name, tensor.clone())
            for name, sublayer in trace.block(layer).sublayers.items()
        }
        read = resid_pre = trace.block_input(layer)
        if self._inside(of):
            moved = trace.input_of(layer, of) + moves
            resid_pre = resid_pre.expand(len(moves), -1, -1).contiguous()
            hooks[trace.reads(layer, of)] = lambda tensor: moved
        else:
            read = resid_pre = resid_pre + moves
        resid_post = trace.run_block(layer, resid_pre.clone(), hooks)
        kept["rest"] = resid_post - read - sum(kept.values())
        return kept

    def _inside(self, sublayer: str) -> bool:
        """Return whether a sublayer reads the stream behind another one."""
        return self._trace.reads(self.layer, sublayer) != "hook_resid_pre"


def _writes(trace: Trace, name: str) -> list[Tensor]:
    """The recorded writes of a sublayer, or of all of a block."""
    every = trace.writes or {"block": trace.resid.diff(dim=0)}
    return [write for part, write in every.items() if name in (part, "block")]


def _seed(layer: int, src: int) -> int:
    return 1_000_003 * (layer + 1) + 101 * src


def _length(vector: Float[Tensor, " d"]) -> float:
    return float(vector.norm()) or 1.0
