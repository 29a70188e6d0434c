"""The finding in a sentence: which numbers of an analysis differ from chance, by rules.

Each number has its chance level and its error. A clause claims a difference only where the number is further from
chance than ``MARGIN`` errors; otherwise it says that nothing was found. The rules:

- **Coupling.** The number is the mean over ordered pairs of different layers and over measured tokens, at the first K.
  Its error is the null's standard deviation for a single pair. That is too large on purpose: the mean of many pairs
  varies less. So the rotation test, where it was made, has a say too: at p <= 0.05 the text never reads "no more than
  chance". A ratio to chance is given only where the null itself exceeds ``MARGIN`` of its standard deviations;
  otherwise the excess is given.
- **Layers.** "Most in layers a to b" names a run of three layers or more, and of at most half of them. It maximises the
  sum over its pairs of excess minus twice the mean excess. It is said only where that sum is positive: the run couples
  more than twice as much as all layers do. It is said only where blocks couple above chance, and it describes: the run
  was chosen by looking, and no test corrects for that.
- **Sublayers.** One couples more than the other where their excess differs by more than ``MARGIN`` of the two errors,
  added in quadrature.
- **Distance.** Neighbours, and layers two thirds of the depth apart, are described where coupling was found.
- **Trajectories.** They are straighter than random steps where the mean line-shape score is more than ``MARGIN`` errors
  below sqrt(n). The error is that of one token with independent random steps, sqrt((n - 1) / (2 d)): tokens share the
  blocks' weights, so that many tokens may say no more than one.
- **Growth.** Norms grow in fresh weights too. A difference from them is claimed where the mean rates differ by more
  than ``MARGIN`` errors, added in quadrature. A model's error joins the tokens' standard deviation and
  1 / (L sqrt(d)), what the norms of x^0 and x^L vary from one draw of weights to another; it holds for a single token
  too. Without a baseline the rate is described.
- **Sinks** (``Growth.sinks``) are left out of all means over tokens. Where coupling was measured at sinks alone, it is
  their coupling, and the clause says "at sinks".

``benchmarks/headline.py`` counts how often each clause claims something of fresh weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from tlcoupling.coupling.chance import CouplingTest, p_value
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.metric import off_diagonal_mean
from tlcoupling.text import counted, visible
from tlcoupling.trajectory.growth import SINK, Growth
from tlcoupling.trajectory.linearity import Linearity

MARGIN = 3.0  # errors
LEVEL = 0.05  # of the rotation test, two-sided
DRAWS = 199  # of the rotation test: about a second for 30 layers
_NAMES = {"block": "blocks", "attn": "attention", "mlp": "MLP"}
NAN = math.nan


@dataclass(frozen=True)
class Finding:
    """One number and what may be said of it.

    Attributes:
        name: what was measured.
        value: the number, without sinks.
        chance: its chance level: that of random bases, or of random steps; NaN where there is none.
        error: its error, as the rules define it.
        found: whether it differs from chance by the rules; False for what is only described.
        text: the clause; empty where another clause says it.
    """

    name: str
    value: float
    chance: float
    error: float
    found: bool
    text: str = ""


def findings(
    coupling: DepthCoupling,
    linearity: Linearity,
    growth: Growth,
    *,
    fresh: Growth | None = None,
    kept: Bool[Tensor, " pos"] | None = None,
    p: float = NAN,
) -> list[Finding]:
    """Return about a dozen findings, in the order of the sentence.

    Args:
        coupling: depth-wise coupling.
        linearity: how straight the trajectories are.
        growth: how norms grow.
        fresh: growth in fresh weights, if they were measured.
        kept: which tokens count in means; by default ``without_sinks(growth)``.
        p: the two-sided p-value of the first sublayer's coupling, from ``DRAWS`` draws; NaN if unknown.
    """
    kept = without_sinks(growth) if kept is None else kept
    return [
        *_coupling(coupling, kept, p),
        _straightness(linearity, kept, coupling.d_model),
        *_growth(growth, fresh, kept, coupling.d_model),
        _sinks(growth, kept),
    ]


def without_sinks(growth: Growth) -> Bool[Tensor, " pos"]:
    """Return which tokens are not sinks; all tokens where all are sinks."""
    return torch.ones_like(growth.sinks) if growth.sinks.all() else ~growth.sinks


def sentence(found: list[Finding]) -> str:
    """Join the clauses to a sentence."""
    text = "; ".join(one.text for one in found if one.text)
    return f"{text[:1].upper()}{text[1:]}."


def coupling_test(coupling: DepthCoupling, draws: int = DRAWS) -> CouplingTest | None:
    """Return the rotation test; None for several tokens, which are several tests, and for a single layer."""
    return None if len(coupling.positions) > 1 or len(coupling.layers) < 2 else coupling.test(draws=draws)


def _coupling(coupling: DepthCoupling, kept: Tensor, p: float) -> list[Finding]:
    """Return each sublayer's coupling, and where it lies."""
    places = range(len(coupling.positions))
    chosen = [place for place in places if kept[coupling.positions[place]]]
    at, chosen = ("", chosen) if chosen else (" at sinks", list(places))
    matrices = {
        name: getattr(coupling, name)[:, chosen, 0].double().nanmean(1) for name in ("values", "null", "null_std")
    }  # [sublayer, layer, layer] each
    values, null, spread = (off_diagonal_mean(matrix).tolist() for matrix in matrices.values())
    rows = {
        name: Finding(f"coupling of {_NAMES.get(name, name)}", c, chance, error, abs(c - chance) > MARGIN * error)
        for name, c, chance, error in zip(coupling.sublayers, values, null, spread, strict=True)
    }
    lead = next(iter(rows))
    excess = (matrices["values"] - matrices["null"])[0]
    coupled = rows[lead].found and rows[lead].value > rows[lead].chance
    return [
        _with_text(rows[lead], lead, at, p, len(coupling.layers)),
        *(row for name, row in rows.items() if name != lead),
        *(_where(excess, coupling.layers) if coupled else []),
        *_compared(rows),
        *(_distances(*(matrix[0] for matrix in matrices.values())) if coupled else []),
    ]


def _with_text(row: Finding, sublayer: str, at: str, p: float, n_layers: int) -> Finding:
    """Say how far a sublayer's coupling is from chance."""
    who = _NAMES.get(sublayer, sublayer) + at
    numbers = f"{row.value:.4f} against {row.chance:.4f}" + ("" if math.isnan(p) else f", {p_value(p, DRAWS)}")
    verb = "couple" if sublayer == "block" else "couples"
    if math.isnan(row.value):
        text = f"coupling of {who} {'needs two layers' if n_layers < 2 else 'is not defined for every pair of layers'}"
    elif row.value < row.chance and (row.found or p <= LEVEL):
        text = f"{who} {verb} below chance ({numbers})"
    elif not row.found and p <= LEVEL:
        text = f"{who} {verb} little above chance ({numbers})"
    elif not row.found:
        text = f"{who} {verb} no more than chance ({numbers})"
    elif row.chance > MARGIN * row.error:
        text = f"{who} {verb} {row.value / row.chance:.1f} times chance ({numbers})"
    else:
        text = f"{who} {verb} {row.value - row.chance:.4f} above chance ({numbers})"
    return replace(row, text=text)


def _where(excess: Tensor, layers: tuple[int, ...]) -> list[Finding]:
    """Return the run of layers that couples most, if one stands out."""
    n, overall = len(layers), float(off_diagonal_mean(excess))
    above = (excess - 2 * overall).fill_diagonal_(0)
    runs = [(a, b) for a in range(n) for b in range(a + 2, n) if b - a < n // 2]
    if not runs:
        return []
    a, b = max(runs, key=lambda run: float(above[run[0] : run[1] + 1, run[0] : run[1] + 1].sum()))
    inside = excess[a : b + 1, a : b + 1]
    if not above[a : b + 1, a : b + 1].sum() > 0:
        return []
    name = f"layers {layers[a]} to {layers[b]}"
    mean, text = float(off_diagonal_mean(inside)), f"most in {name} (described, not tested)"
    return [Finding(f"excess in {name}", mean, NAN, NAN, False, text)]


def _compared(rows: dict[str, Finding]) -> list[Finding]:
    """Compare the MLP's coupling with the attention's."""
    if not {"attn", "mlp"} <= rows.keys():
        return []
    attn, mlp = rows["attn"], rows["mlp"]
    gap, error = (mlp.value - mlp.chance) - (attn.value - attn.chance), math.hypot(attn.error, mlp.error)
    found = abs(gap) > MARGIN * error and (attn.found or mlp.found)
    text = f"{'MLP more than attention' if gap > 0 else 'attention more than MLP'}" if found else ""
    return [Finding("excess of MLP over attention", gap, 0.0, error, found, text)]


def _distances(values: Tensor, null: Tensor, std: Tensor) -> list[Finding]:
    """Return the coupling of neighbours and of layers far apart."""
    n = len(values)
    far = 2 * n // 3
    if far < 2:
        return []

    def at(matrix: Tensor, step: int) -> float:
        return float(torch.cat([matrix.diagonal(step), matrix.diagonal(-step)]).mean())

    rows = []
    for name, step in (("coupling of neighbours", 1), (f"coupling of layers {far} apart", far)):
        value, chance, error = (at(matrix, step) for matrix in (values, null, std))
        rows.append(Finding(name, value, chance, error, abs(value - chance) > MARGIN * error))
    near, distant = rows
    text = f"neighbours {near.value:.3f}, {far} layers apart {distant.value:.3f}"
    return [replace(near, text=text), distant]


def _straightness(linearity: Linearity, kept: Tensor, d_model: int) -> Finding:
    """Compare the line-shape score of the block path with that of random steps."""
    scores = linearity.lss[0][kept].double()
    scores = scores[scores.isfinite()]
    n = linearity.steps[0]
    chance, error = math.sqrt(n), math.sqrt((n - 1) / (2 * d_model))
    if not len(scores):
        return Finding("line-shape score", NAN, chance, error, False, "no trajectory has a line-shape score")
    mean = float(scores.mean())
    found = n > 1 and chance - mean > MARGIN * error  # one step is a line
    what = "straighter than random steps" if found else "no straighter than random steps"
    text = f"trajectories {what} (line-shape score {mean:.1f}; random {chance:.1f})"
    return Finding("line-shape score", mean, chance, error, found, text)


def _growth(growth: Growth, fresh: Growth | None, kept: Tensor, d_model: int) -> list[Finding]:
    """Describe the growth of norms, and compare it with that of fresh weights."""
    rate, error = _rate(growth, kept, d_model)
    chance, other = (NAN, NAN) if fresh is None else _rate(fresh, kept, d_model)
    found = abs(rate - chance) > MARGIN * math.hypot(error, other)  # never with NaN
    text = f"norms {'grow' if rate > 0 else 'shrink'} {abs(math.expm1(rate)):.0%} a layer"
    shares = []
    if growth.attn_share is not None and growth.mlp_share is not None:
        attn, mlp = (share[:, kept].double().nanmean().item() for share in (growth.attn_share, growth.mlp_share))
        most = "the MLP's" if mlp > attn else "attention's"
        if min(attn, mlp) >= 0 and max(attn, mlp) > 2 * min(attn, mlp):
            text += f", most of it {most}"
        shares = [Finding("growth by attention", attn, NAN, NAN, False), Finding("growth by MLP", mlp, NAN, NAN, False)]
    if fresh is not None:
        text += f" ({'fresh weights' if found else 'no different from fresh weights,'} {math.expm1(chance):.0%})"
    return [Finding("growth rate per layer", rate, chance, error, found, text), *shares]


def _rate(growth: Growth, kept: Tensor, d_model: int) -> tuple[float, float]:
    """Return the mean rate over tokens, and its error."""
    rates = growth.rate[kept].double()
    rates = rates[rates.isfinite()]
    drawn = 1 / (len(growth.alpha) * math.sqrt(d_model))
    return float(rates.mean()), math.hypot(float(rates.std(correction=0)), drawn) if len(rates) else NAN


def _sinks(growth: Growth, kept: Tensor) -> Finding:
    """Count the sinks, and name those that are left out."""
    where = (growth.sinks & ~kept).nonzero().flatten().tolist()
    names = ", ".join(f"{pos} “{visible(growth.tokens[pos])}”" for pos in where[:3])
    more = f" and {len(where) - 3} more" if len(where) > 3 else ""
    text = f"{counted(len(where), 'sink')} left out: {names}{more}" if where else ""
    count = int(growth.sinks.sum())
    return Finding(f"sinks, norm more than {SINK:g} times the median", float(count), NAN, NAN, count > 0, text)
