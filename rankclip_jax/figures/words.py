"""Captions, names of classes and of runs in a drawing: whatever stands in them is shown as it is."""

import contextlib
import textwrap
import warnings
from collections.abc import Iterator
from unicodedata import east_asian_width

from matplotlib.figure import Figure
from matplotlib.text import Text


def printable(text: str) -> str:
    """`text` with a space for what no font can show: control characters, halves of a character."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def lines(text: str, width: int, most: int) -> list[str]:
    """`text` in at most `most` lines of `width` letters; a Chinese, Japanese or Korean one is as wide as two."""
    spread = "".join(f"{letter}\0" if east_asian_width(letter) in "WF" else letter for letter in printable(text))
    found = textwrap.wrap(spread, width, max_lines=most, placeholder=" …")
    return [line.replace("\0", "") for line in found]


def literal(figure: Figure) -> Figure:
    """The figure, in which a $ is a dollar: matplotlib would read what stands between two as a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


@contextlib.contextmanager
def any_script() -> Iterator[None]:
    """Without a warning for each letter that matplotlib's font lacks: a box in its place says as much."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield
