r"""Attention scores: f with pattern = softmax(f(q . k) + b), fitted to the pattern.

f(x) = c x, or a tanh(c x / a) with a soft-cap a; c may differ between positions of the query (Llama 4, Ministral).
b = 0, or a bias of head and source position alone, which is what ALiBi's m_h (s - t) amounts to under a softmax over s.
A head may also attend to a sink, a number beside the scores whose share of the pattern goes nowhere (gpt-oss). Only f
has a derivative, so bias and sink are eliminated and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlcoupling.forward.block import Uncovered, close

_STEPS = 30  # of Gauss-Newton on c with a soft-cap; it converges in a few
_SHARE_OF_SINK = 1e-3  # rows of a pattern without a sink sum to 1 but for rounding, 4e-3 / n in half precision
_NEAR = 1e-2  # a fitted c within this of one that the model declares is replaced by it: it has no rounding error


@dataclass(frozen=True)
class Scores:
    """f(x) = c x, or a tanh(c x / a).

    Attributes:
        scale: c, for all positions of the query or for each.
        cap: a; None without a soft-cap.
    """

    scale: float | Float[Tensor, "dest 1"]
    cap: float | None = None

    def at(self, dest: int) -> Scores:
        """Return f for the query of one position."""
        return Scores(float(self.scale[dest]), self.cap) if isinstance(self.scale, Tensor) else self

    def __call__(self, products: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f(x)."""
        scores = self.scale * products
        return scores if self.cap is None else self.cap * (scores / self.cap).tanh()

    def slope(self, products: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f'(x)."""
        if self.cap is None:
            return torch.ones_like(products) * self.scale
        return self.scale * (1 - (self.scale * products / self.cap).tanh().square())

    @classmethod
    def fit(
        cls,
        products: Float[Tensor, "head dest src"],
        pattern: Float[Tensor, "head dest src"],
        attn: Any,
        cfg: Any,
        d_head: int,
    ) -> Scores:
        """Find f such that the pattern is a softmax of f(q . k), without or with a bias; the usual f is tried first.

        Raises:
            Uncovered: no such f fits.
        """
        declared = list(_declared_scales(attn, cfg, d_head))
        sink = bool((1 - pattern.sum(-1)).max() > _SHARE_OF_SINK)
        for biased in (False, True)[: 1 if sink else 2]:
            rows = _Rows(products, pattern, biased)
            for cap in (None, *_declared_caps(attn, cfg)):
                usual = cls(declared[0], cap)
                if rows.match(usual):
                    return usual
                fitted = rows.fit(usual)
                near = [c for c in declared if not abs(fitted.scale - c) > _NEAR * c]  # with one position any c fits
                for scores in (*(cls(c, cap) for c in near[:1]), fitted):
                    if rows.match(scores):
                        return scores
            if not biased and rows.match(scores := rows.fit_each(declared[0])):
                return scores
        raise Uncovered("the attention pattern is not a softmax of a function of q . k and a source bias")


class _Rows:
    """Rows of log-patterns and of scores, compared over the attended positions.

    A softmax ignores a constant in each row. A bias of the source position cancels in the difference of two rows.
    """

    def __init__(
        self, products: Float[Tensor, "head dest src"], pattern: Float[Tensor, "head dest src"], biased: bool
    ) -> None:
        """Take all rows, or the differences of consecutive rows where there is a bias."""
        self.products, self.pattern, self.biased = products, pattern, biased
        seen = pattern > 0
        self.seen: Bool[Tensor, "head row src"] = seen[:, 1:] & seen[:, :-1] if biased else seen

    @cached_property
    def logs(self) -> Float[Tensor, "head row src"]:
        """The log-pattern, centred."""
        return self._open(self.pattern.where(self.pattern > 0, 1.0).log())

    def _open(self, rows: Float[Tensor, "head dest src"]) -> Float[Tensor, "head row src"]:
        """Centre each row over the attended positions (a softmax ignores constants)."""
        rows = (rows.diff(dim=1) if self.biased else rows).where(self.seen, 0.0)
        mean = rows.sum(-1, keepdim=True) / self.seen.sum(-1, keepdim=True).clamp(min=1)
        return (rows - mean).where(self.seen, 0.0)

    def fit(self, start: Scores) -> Scores:
        """Fit c by least squares, Gauss-Newton where f is bent."""
        scores = start
        for _ in range(1 if start.cap is None else _STEPS):
            slope = self._open(self.products * scores.slope(self.products) / scores.scale)
            step = (slope * (self.logs - self._open(scores(self.products)))).sum() / slope.square().sum()
            scores = Scores(scores.scale + float(step), scores.cap)
            if not abs(float(step)) > 1e-15 * abs(scores.scale):
                break
        return scores

    def fit_each(self, declared: float) -> Scores:
        """Fit c by least squares for each position of the query; the declared one where a single key is attended to."""
        products = self._open(self.products)
        scale = (products * self.logs).sum((0, 2)) / products.square().sum((0, 2))
        return Scores(scale.nan_to_num(declared)[:, None])

    def match(self, scores: Scores) -> bool:
        """Whether the scores reproduce the pattern: each row, or each row's change from the previous one."""
        logits = scores(self.products)
        truth = self.pattern
        if self.biased:
            logits = logits.diff(dim=1) + truth[:, :-1].clamp(min=torch.finfo(truth.dtype).tiny).log()
            truth = truth[:, 1:].where(self.seen, 0.0)
            truth = truth / truth.sum(-1, keepdim=True).clamp(min=torch.finfo(truth.dtype).tiny)
        logits = logits.where(self.seen, -torch.inf)
        if not self.biased:
            logits = torch.cat([logits, self._sinks(logits)], -1)
        ours = logits.softmax(-1).nan_to_num(0.0)[..., : truth.shape[-1]]
        return truth.numel() == 0 or close(ours, truth)

    def _sinks(self, logits: Float[Tensor, "head dest src"]) -> Float[Tensor, "head dest 1"]:
        """The sink of each head, from the row of the pattern that lacks most; near -inf where rows sum to 1."""
        share = 1 - self.pattern.sum(-1).clamp(0, 1)
        sinks = logits.logsumexp(-1) + share.logit()
        row = share.argmax(-1, keepdim=True)
        return sinks.gather(-1, row)[..., None].expand(-1, logits.shape[1], -1)


def _declared_scales(attn: Any, cfg: Any, d_head: int) -> Iterator[float]:
    """Yield the scales that a model may use, the usual one first."""
    yield d_head**-0.5
    yield 1.0
    for holder in (attn, getattr(attn, "original_component", None)):
        if isinstance(scaling := getattr(holder, "scaling", None), float) and scaling > 0:
            yield scaling
    if isinstance(divisor := getattr(cfg, "attn_scale", None), float) and divisor > 0:
        yield 1 / divisor


def _declared_caps(attn: Any, cfg: Any) -> Iterator[float]:
    """Yield the soft-caps that a model names; only the pattern shows whether they are used."""
    for holder, name in (
        (cfg, "attn_scores_soft_cap"),
        (cfg, "attn_logit_softcapping"),
        (getattr(attn, "original_component", None), "attn_logit_softcapping"),
    ):
        if isinstance(cap := getattr(holder, name, None), (int, float)) and cap > 0:
            yield float(cap)
