"""All drawings, by matplotlib, once: Figures for curves.png and notebooks, and by `svg` for the report's page.

Every function gives a matplotlib.figure.Figure of its own: nothing has to be closed, no backend is chosen.
"""

from rankclip_jax.figures.confusion import confusion, shown_classes
from rankclip_jax.figures.curves import Line, bands, chart, colour, curves, intervals
from rankclip_jax.figures.embeddings import cosines, projection, similarities
from rankclip_jax.figures.gallery import choices, examples, gallery, matches, query
from rankclip_jax.figures.inline_svg import svg

__all__ = [
    "Line",
    "bands",
    "chart",
    "choices",
    "colour",
    "confusion",
    "cosines",
    "curves",
    "examples",
    "gallery",
    "intervals",
    "matches",
    "projection",
    "query",
    "shown_classes",
    "similarities",
    "svg",
]
