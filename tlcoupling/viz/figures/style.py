"""The style of figures, text from models and prompts in them, and saving.

The style applies only while a figure is made or saved. It does not change matplotlib's global settings.
"""

from __future__ import annotations

import functools
import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from tlcoupling.errors import ArgumentError, ResultFileError
from tlcoupling.text import visible
from tlcoupling.viz.page import asset

WIDTH = 7.0  # inches: the text width of a page
FORMATS = ("png", "svg", "pdf")
# The page's light colours: orange, blue and violet can be told apart with any colour vision. The null is grey, dashed.
_PAGE: dict[str, str] = dict(re.findall(r"--([\w-]+): ([^;]+);", asset("page.css").partition("}")[0]))
_RAMP, _NEGATIVE = _PAGE["ramp"].split(), _PAGE["ramp-negative"].split()
SUBLAYER_COLORS = {"block": _PAGE["ink"], "attn": _PAGE["attn"], "mlp": _PAGE["mlp"]}
TRAINED, RANDOM, NULL, FAINT = _PAGE["accent"], _PAGE["fresh"], "#707070", "#B0B0B0"
FIT = SUBLAYER_COLORS["attn"]
SEQUENTIAL = LinearSegmentedColormap.from_list("sequential", _RAMP)
DIVERGING = LinearSegmentedColormap.from_list("diverging", [*reversed(_NEGATIVE), *_RAMP[1:]])
NO_VALUE = "#DCDCDC"
_FONT = "DejaVu Sans"  # comes with matplotlib, so a figure looks the same everywhere
_GENERIC = {"serif", "sans-serif", "sans", "monospace", "cursive", "fantasy"}
_MISSING = "□"
_STYLE: dict[str, Any] = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#404040",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 7.0,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "figure.dpi": 110.0,
    "savefig.dpi": 300.0,
    "text.parse_math": False,  # a token may hold dollar signs
    "svg.fonttype": "none",  # text stays text
    "pdf.fonttype": 42,
    "svg.hashsalt": "tlcoupling",  # equal figures give equal files
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the library's matplotlib settings within a ``with`` block."""
    # start from matplotlib's defaults: a dark style of the user would put white text on white
    with matplotlib.style.context(["default", {**_STYLE, "font.family": list(_families())}]):
        yield


class TextFigure(Figure):
    """A figure that displays itself in a notebook and keeps its text as text when it is saved."""

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        """Save like ``matplotlib.figure.Figure.savefig``, in the library's style."""
        with style():
            super().savefig(fname, **kwargs)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> TextFigure:
    """Make an empty figure of a size in inches, independent of pyplot."""
    figure = TextFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file: PNG at 300 dots per inch, or SVG or PDF with text as text.

    Equal figures give equal files, because no date is written.

    Args:
        figure: any matplotlib figure.
        path: the file to write; its suffix sets the format.

    Returns:
        The path written.

    Raises:
        ArgumentError: the suffix is not one of these.
        ResultFileError: the file cannot be written; the message says why.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ArgumentError("path", str(path), f"a name that ends in {', '.join('.' + name for name in FORMATS)}")
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    try:
        with style():
            figure.savefig(path, format=kind, metadata=undated)
    except OSError as error:
        raise ResultFileError(f"cannot write the figure to {str(path)!r}: {error}") from error
    return path


def label(text: str, longest: int = 40) -> str:
    """Return text from a model or prompt in a form that a figure can draw.

    Line breaks and invisible characters become visible signs, as on the report page. Characters that no font has become
    an empty box. The fonts are those of ``matplotlib.rcParams["font.family"]`` (unless that is generic, as by default)
    and DejaVu Sans, which comes with matplotlib. Add a font there for scripts that DejaVu Sans lacks.
    """
    known = _known(_families())
    shown = "".join(char if ord(char) in known else _MISSING for char in visible(text))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def token_label(pos: int, text: str, longest: int = 24) -> str:
    """Return a token as titles show it."""
    return f"token {pos} “{label(text, longest)}”"


def depth_colors() -> Colormap:
    """Return the sequential colour map without its light end, which is invisible as lines on white."""
    return LinearSegmentedColormap.from_list("depth", _RAMP[2:])


def matrix_colors(colors: Colormap) -> Colormap:
    """Return a colour map that draws cells without a value in grey."""
    return colors.with_extremes(bad=NO_VALUE)


def plain_log(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers."""
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def heading(figure: Figure, title: str, below: str) -> None:
    """Write a title at the top of the figure and, in small print below it, what was measured."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(below, round(20 * width))
    left, top, space = 0.06 / width, 1 - 0.06 / height, 0.24 + 0.14 * len(lines)
    figure.text(left, top, title, va="top", fontsize=9, fontweight="bold", in_layout=False)
    figure.text(
        left,
        top - 0.18 / height,
        "\n".join(lines),
        va="top",
        fontsize=7,
        color="#404040",
        linespacing=1.4,
        in_layout=False,
    )
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, 1 - space / height))


def settle(figure: Figure) -> None:
    """Compute the layout once and fix it, so every resolution is saved with the same layout, and quickly."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


@functools.cache
def _known(families: tuple[str, ...]) -> frozenset[int]:
    """Return the code points that at least one of the fonts has."""
    return frozenset().union(*(get_font(findfont(FontProperties(family=name))).get_charmap() for name in families))


def _families() -> tuple[str, ...]:
    """Return the user's installed fonts, and DejaVu Sans."""
    named = [name for name in matplotlib.rcParams["font.family"] if name not in _GENERIC and name != _FONT]
    return (*filter(_installed, named), _FONT)


@functools.cache
def _installed(name: str) -> bool:
    try:
        findfont(FontProperties(family=name), fallback_to_default=False)
    except ValueError:
        return False
    return True
