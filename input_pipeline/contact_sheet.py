"""Draws a sheet of example images with their captions, by matplotlib."""

import textwrap
import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

_COLUMNS, _ROWS = 6, 4
EXAMPLES = _COLUMNS * _ROWS
_LINES, _LETTERS = 4, 30  # of a caption below its image
# Inches: an image's box, a line of a caption, the gap between columns, the margins, the title's band.
_BOX, _LINE, _GAP, _MARGIN, _TITLE = 1.9, 0.13, 0.14, 0.2, 0.45


def draw(path: Path, title: str, examples: list[tuple[Image.Image, str, str]]) -> None:
    """Writes a PNG of at least one example: (RGB image, caption, note in small print)."""
    wrapped = [_wrapped(caption) for _, caption, _ in examples]
    rows = -(-len(examples) // _COLUMNS)
    pitch = _BOX + _LINE * (3 + max(len(lines) for lines in wrapped))  # from one row of images to the next
    width, height = 2 * _MARGIN + _COLUMNS * (_BOX + _GAP) - _GAP, _TITLE + rows * pitch
    figure = Figure(figsize=(width, height), dpi=100)

    def write(x, y, words, **style):
        figure.text(x / width, y / height, words, va="top", parse_math=False, **style)

    write(_MARGIN, height - 0.14, title, fontsize=12)
    for place, ((image, _, note), lines) in enumerate(zip(examples, wrapped, strict=True)):
        row, column = divmod(place, _COLUMNS)
        left, bottom = _MARGIN + column * (_BOX + _GAP), height - _TITLE - row * pitch - _BOX
        axes = figure.add_axes((left / width, bottom / height, _BOX / width, _BOX / height))
        axes.axis("off")
        axes.set_anchor("SW")  # on the caption, at its left edge
        small = image.copy()
        small.thumbnail((2 * _BOX * 100,) * 2, Image.Resampling.BICUBIC)
        # A tiny image is shown pixel by pixel.
        axes.imshow(np.asarray(small), interpolation="nearest" if max(image.size) < 64 else "antialiased")
        write(left, bottom - 0.06, "\n".join(lines), fontsize=7.5, linespacing=1.2)
        write(left, bottom - 0.1 - _LINE * len(lines), note, fontsize=6, color="0.5")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box is drawn in its place
        figure.savefig(path, format="png")


def _wrapped(caption):
    printable = "".join(character if character.isprintable() else " " for character in caption[:1000])
    return textwrap.wrap(printable, _LETTERS, max_lines=_LINES, placeholder=" ...")
