"""Figures for papers and talks: what the results look like in print.

Each function takes a result and returns a matplotlib ``Figure``, made apart from pyplot and without a change to
matplotlib's settings. A figure shows itself in a notebook; ``save`` (or the figure's own ``savefig``) writes PNG, SVG
and PDF, the latter two with text as text. Colours are told apart with any colour vision; scales are shared within a
figure and stated; chance stands beside coupling.

``matrices`` has layer by layer matrices, ``depth`` curves against depth and distance, ``clouds`` points with names,
``distributions`` histograms, ``training`` curves along it; ``style`` is how all of them look.
"""

from tlcoupling.viz.figures.clouds import coupling_against_score, trajectories
from tlcoupling.viz.figures.depth import coupling_by_distance, singular_values
from tlcoupling.viz.figures.distributions import distributions
from tlcoupling.viz.figures.matrices import depth_coupling, projected_jacobians
from tlcoupling.viz.figures.style import save, style
from tlcoupling.viz.figures.training import training

__all__ = [
    "coupling_against_score",
    "coupling_by_distance",
    "depth_coupling",
    "distributions",
    "projected_jacobians",
    "save",
    "singular_values",
    "style",
    "training",
    "trajectories",
]
