"""A result in a notebook: a small table and a thumbnail, as HTML without scripts, requests or style sheets.

Colours are transparent tints on the notebook's own background, and text has the notebook's colour: light and dark need
no knowledge of the host.
"""

from __future__ import annotations

import html
import math
from typing import Any

import torch
from torch import Tensor

from tlcoupling.results.base import Result
from tlcoupling.text import visible
from tlcoupling.viz.shown import MOST_LINES, MOST_ROWS, Lines, Matrix, shown

CELLS = 32  # rows and columns of a thumbnail, at most: more are pooled
POINTS = 120  # of a curve, at most
WIDTH, HEIGHT = 260, 110
ABOVE, BELOW, LEVELS = "#3b8bd0", "#d8832a", 12
_PAD = "padding:2px 10px 2px 0"
COLORS = (ABOVE, BELOW, "#9a6fc0", "#4fa36b")


def html_of(result: Result) -> str:
    """Return the headline numbers of a result, with their chance level, and its thumbnail; 30 kB at most."""
    one = shown(result)
    head = "".join(
        f'<th style="{_PAD};text-align:{"right" if at else "left"}">{_text(name)}</th>'
        for at, name in enumerate(one.columns)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in one.rows[:MOST_ROWS])
    more = f"{len(one.rows) - MOST_ROWS} more rows. " if len(one.rows) > MOST_ROWS else ""
    small = f'<div style="opacity:.75;font-size:.9em;max-width:60ch">{_text(more + one.note)}</div>'
    picture = _picture(one.pictures[0]) if one.pictures else ""
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:12px 28px;align-items:flex-start"><div>'
        f"<strong>{type(result).__name__}</strong> "
        f'<span style="opacity:.75">{_text(result.provenance.model_name)} · {_text(one.below)}</span>'
        f'<table style="border-collapse:collapse;margin:6px 0"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
        f"{small if more or one.note else ''}</div>{picture}</div>"
    )


def _cell(value: Any) -> str:
    """Return one cell of a table: text to the left, numbers to the right."""
    if isinstance(value, str):
        return f'<td style="{_PAD};text-align:left">{_text(value, 60)}</td>'
    return f'<td style="{_PAD};text-align:right">{number(value)}</td>'


def number(value: float | int | bool) -> str:
    """Return a number as a table shows it, four decimals where that is enough; a dash where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not math.isfinite(value):
        return "–"
    plain = str(value) if isinstance(value, int) else f"{value:.4f}"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e5:
        plain = f"{value:.3g}"
    return plain.replace("-", "−")


def _text(text: Any, longest: int = 400) -> str:
    """Return text of a model or a prompt: visible, not too long, and without markup."""
    text = visible(str(text)) if text else ""
    return html.escape(text if len(text) <= longest else f"{text[: longest - 1]}…")


def _picture(picture: Matrix | Lines) -> str:
    """Return a thumbnail with its title."""
    drawing, scale = _matrix(picture) if isinstance(picture, Matrix) else _lines(picture)
    return (
        f'<figure style="margin:0"><figcaption style="font-size:.9em;opacity:.75;max-width:{WIDTH}px">'
        f"{_text(picture.title)}</figcaption>{drawing}"
        f'<div style="font-size:.8em;opacity:.75;max-width:{WIDTH}px">{_text(scale)}</div></figure>'
    )


def _matrix(picture: Matrix) -> tuple[str, str]:
    """Return a heat map as SVG, one path for each tint, and its scale in words."""
    values = _pooled(picture.values)
    finite = values[values.isfinite()]
    if not len(finite):
        return "", "no pair to show"
    low, high = finite.min().item(), finite.max().item()
    start, most = (0.0, max(abs(low), abs(high))) if picture.centred else (low, high - low)
    tints = ((values - start) / (most or 1) * LEVELS).round()
    rows, columns = values.shape
    paths = []
    for tint in sorted(set(tints[tints.isfinite()].tolist()) - {0.0}):
        runs = "".join(f"M{x} {y}h{n}v1H{x}z" for y, row in enumerate(tints) for x, n in _runs(row == tint))
        paths.append(
            f'<path fill="{ABOVE if tint > 0 else BELOW}" fill-opacity="{abs(tint) / LEVELS:.2f}" d="{runs}"/>'
        )
    side = 150 / max(rows, columns)
    frame = f'<rect width="{columns}" height="{rows}" fill="none" stroke="currentColor" stroke-opacity=".4"/>'
    drawing = (
        f'<svg role="img" aria-label="{_text(picture.title)}" width="{side * columns:.0f}" height="{side * rows:.0f}" '
        f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" shape-rendering="crispEdges" '
        f'style="overflow:visible" stroke-width="{max(rows, columns) / 150:.3f}">{"".join(paths)}{frame}</svg>'
    )
    meaning = f"; blue above {picture.zero}, orange below" if picture.centred else ""
    return drawing, f"{picture.axes[0]} ↓ {picture.axes[1]} →, {number(low)} to {number(high)}{meaning}"


def _pooled(values: Tensor) -> Tensor:
    """Return a matrix of at most ``CELLS`` rows and columns, by means over neighbours."""
    for axis in (0, 1):
        parts = values.tensor_split(min(CELLS, values.shape[axis]), dim=axis)
        values = torch.stack([part.nanmean(axis) for part in parts], dim=axis)
    return values


def _runs(marked: Tensor) -> list[tuple[int, int]]:
    """Return start and length of each run of marked cells in a row."""
    edges = torch.diff(marked.long(), prepend=torch.zeros(1, dtype=torch.long), append=torch.zeros(1, dtype=torch.long))
    starts, stops = ((edges == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return [(start, stop - start) for start, stop in zip(starts, stops, strict=True)]


def _lines(picture: Lines) -> tuple[str, str]:
    """Return curves as SVG, and what they are in words."""
    drawn = dict(list(picture.values.items())[:MOST_LINES])
    chance = {} if picture.chance is None else {"chance": picture.chance}
    ends = {} if picture.band is None else dict(zip(("low", "high"), picture.band, strict=True))
    every = max(1, math.ceil(len(picture.labels) / POINTS))
    curves = {name: each.double()[::every] for name, each in {**drawn, **chance, **ends}.items()}
    scaled = {
        name: each.where(each > 0, torch.nan).log() if picture.logarithmic else each for name, each in curves.items()
    }
    cloud = torch.cat(list(scaled.values()))
    cloud = cloud[cloud.isfinite()]
    if not len(cloud):
        return "", "no number to show"
    low, high = cloud.min().item(), cloud.max().item()
    size = len(next(iter(scaled.values())))

    def points(name: str) -> list[str]:
        heights = 4 + (high - scaled[name]) / ((high - low) or 1) * (HEIGHT - 8)
        step = WIDTH / max(size - 1, 1)
        return [f"{at * step:.1f},{y:.1f}" for at, y in enumerate(heights.tolist()) if math.isfinite(y)]

    parts = []
    if ends:
        parts.append(
            f'<polygon fill="{ABOVE}" fill-opacity=".2" points="{" ".join([*points("low"), *points("high")[::-1]])}"/>'
        )
    style = 'fill="none" stroke-width="1.5"'
    parts += [
        f'<polyline {style} stroke="{color}" points="{" ".join(points(name))}"/>'
        for name, color in zip(drawn, COLORS, strict=False)
    ]
    if chance:
        dashed = f'{style} stroke="currentColor" stroke-opacity=".6" stroke-dasharray="4 3"'
        parts.append(f'<polyline {dashed} points="{" ".join(points("chance"))}"/>')
    drawing = (
        f'<svg role="img" aria-label="{_text(picture.title)}" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" style="border-bottom:1px solid">{"".join(parts)}</svg>'
    )
    ends_of = [float(min(each[each.isfinite()].min() for each in curves.values() if each.isfinite().any()))]
    ends_of += [float(max(each[each.isfinite()].max() for each in curves.values() if each.isfinite().any()))]
    dash = "; dashed: chance" if chance else ""
    names = f"{', '.join(drawn)}; " if len(drawn) > 1 else ""
    return drawing, f"{names}{picture.axis} →, {number(ends_of[0])} to {number(ends_of[1])}{dash}"
