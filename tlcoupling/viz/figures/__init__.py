"""Figures of results for papers and talks.

Each function takes a result and returns a matplotlib ``Figure``. It does not use pyplot or change matplotlib's
settings. A figure displays itself in a notebook. ``save`` (or the figure's own ``savefig``) writes PNG, SVG and PDF; in
SVG and PDF, text stays text. Colours can be told apart with any colour vision. All panels of a figure share stated
scales, and every coupling is drawn with its null.

``matrices`` draws layer x layer matrices, ``atlas`` those of slices, ``depth`` curves against depth and distance,
``clouds`` points with names, ``distributions`` histograms, and ``training`` curves over training steps.
``point_labels`` writes names beside points; ``style`` sets the look of all figures.
"""

from tlcoupling.viz.figures.atlas import sensitivity_atlas
from tlcoupling.viz.figures.clouds import coupling_against_score, trajectories
from tlcoupling.viz.figures.depth import coupling_by_distance, singular_values
from tlcoupling.viz.figures.distributions import distributions
from tlcoupling.viz.figures.matrices import depth_coupling, projected_jacobians
from tlcoupling.viz.figures.pictures import pictures
from tlcoupling.viz.figures.style import save, style
from tlcoupling.viz.figures.training import training

__all__ = [
    "coupling_against_score",
    "coupling_by_distance",
    "depth_coupling",
    "distributions",
    "pictures",
    "projected_jacobians",
    "save",
    "sensitivity_atlas",
    "singular_values",
    "style",
    "training",
    "trajectories",
]
