"""Pictures and what a model finds for them: queries with their answers, search results, classes."""

import base64
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from PIL import Image

from rankclip_jax.common.pictures import read, rgb
from rankclip_jax.figures.inline_svg import PHOTOGRAPH
from rankclip_jax.figures.words import lines, literal, printable

_RIGHT, _PLAIN = "#168f52", "#c9d0da"  # a right answer's words and frame, and another's frame; on white and on dark
_WIDTH, _PICTURE, _LINE = 3.8, 0.7, 0.15  # inches: a query, a picture, a line of text
_LETTERS = {"answer": 40, "question": 54}  # a line
_MOST_COLUMNS, _MOST_PIXELS = 10, 65_000  # of search results; matplotlib draws up to 65,535


def query(asked: Mapping) -> Figure:
    """One query of a retrieval set and its answers, nearest first: a picture and captions, or a caption and pictures.

    Args:
      asked: {"picture", "answers": [{"caption", "right"}]} or {"caption", "answers": [{"picture", "right"}]}; pictures
        are JPEG in base64.
    """
    figure = Figure(figsize=(_WIDTH, _height(asked)), dpi=110)
    _draw(figure, asked)
    return literal(figure)


def gallery(found: Mapping[str, Sequence[Mapping]], queries: int = 4) -> Figure:
    """What is nearest to some pictures among all captions, and to some captions among all pictures.

    Args:
      found: what WORKDIR/eval/retrieval_NAME.json holds.
      queries: how many of each kind are shown, from the first.
    """
    halves = [found[way][:queries] for way in ("image_to_text", "text_to_image")]
    heights = [[_height(asked) for asked in half] for half in halves]
    title, height = 0.4, max(map(sum, heights))
    figure = Figure(figsize=(2 * _WIDTH + 0.6, title + height), dpi=110)
    sides, titles = figure.subfigures(1, 2, squeeze=False)[0], ("Picture to captions", "Caption to pictures")
    for side, words, half, tall in zip(sides, titles, halves, heights, strict=True):
        ratios = [title, *tall, max(height - sum(tall), 1e-6)]
        head, *places = side.subfigures(len(ratios), 1, height_ratios=ratios)
        head.text(0.5, 0.5, words, ha="center", va="center", fontsize=12)
        for place, asked in zip(places, half, strict=False):
            _draw(place, asked)
    return literal(figure)


def _height(asked: Mapping) -> float:
    """Inches of a query."""
    if "picture" in asked:
        return max(_PICTURE + 0.1, _LINE * sum(len(_answer(place, answer)) for place, answer in _numbered(asked)) + 0.1)
    return _LINE * len(_question(asked)) + _PICTURE + 0.15


def _numbered(asked):
    return list(enumerate(asked["answers"], 1))


def _answer(place: int, answer: Mapping) -> list[str]:
    *first, last = lines(f"{place}. {answer['caption']}", _LETTERS["answer"], 2)
    return [*first, f"{last} ✓" if answer["right"] else last]


def _question(asked: Mapping) -> list[str]:
    return lines(f"“{asked['caption']}”", _LETTERS["question"], 2)


def _draw(figure: FigureBase, asked: Mapping) -> None:
    """Places are inches from the upper left corner of the figure or subfigure."""
    width, height = _WIDTH, _height(asked)

    def write(x, line, words, **style):
        y = 1 - (0.05 + _LINE * (line + 0.5)) / height
        figure.text(x / width, y, words, va="center", fontsize=8, **style)

    def show(x, top, data, **frame):
        axes = figure.add_axes((x / width, 1 - (top + _PICTURE) / height, _PICTURE / width, _PICTURE / height))
        axes.set_anchor("NW")
        _picture(axes, np.asarray(read(base64.b64decode(data))), **frame)

    if "picture" in asked:
        show(0.05, 0.05, asked["picture"])
        line = 0
        for place, answer in _numbered(asked):
            style = dict(color=_RIGHT, weight="bold") if answer["right"] else {}
            for words in _answer(place, answer):
                write(_PICTURE + 0.15, line, words, **style)
                line += 1
        return
    for line, words in enumerate(_question(asked)):
        write(0.05, line, words)
    top = _LINE * len(_question(asked)) + 0.1
    for place, answer in enumerate(asked["answers"]):
        frame = _RIGHT if answer["right"] else _PLAIN
        show(0.05 + place * (_PICTURE + 0.03), top, answer["picture"], frame=frame)


def _picture(axes: Axes, pixels_HxWx3: np.ndarray, frame: str | None = None) -> None:
    axes.imshow(pixels_HxWx3, gid=PHOTOGRAPH)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(frame is not None)
    if frame:
        axes.spines[:].set(color=frame, linewidth=4 if frame == _RIGHT else 1)


def matches(texts: Sequence[str], pictures: Sequence[Sequence[np.ndarray]], notes: Sequence[Sequence[str]]) -> Figure:
    """The pictures found for each text, nearest first, ten in a row.

    Args:
      pictures: of each text as many: uint8 (H, W, 3).
      notes: what stands below each picture.
    """
    columns = min(len(pictures[0]), _MOST_COLUMNS)
    rows_each = -(-len(pictures[0]) // columns)
    deepest = max((note.count("\n") for some in notes for note in some), default=1)
    width, height = 1.7 * columns, (2.15 + 0.14 * deepest) * rows_each * len(texts)
    figure = Figure(figsize=(width, height), dpi=min(110, _MOST_PIXELS / height), layout="constrained")
    axes_RxC = figure.subplots(rows_each * len(texts), columns, squeeze=False)
    for axes in axes_RxC.flat:
        axes.axis("off")
    for axes_rows, text, images, below in zip(np.split(axes_RxC, len(texts)), texts, pictures, notes, strict=True):
        for axes, image, note in zip(axes_rows.flat, images, below, strict=False):
            axes.axis("on")
            _picture(axes, image, frame=_PLAIN)
            axes.set_xlabel(note, fontsize=8)
        axes_rows[0, 0].set_title(printable(text), loc="left", fontsize=10)
    return literal(figure)


def examples(found: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Pictures with the class that each is and the one that it was taken for: right ones above, wrong ones below.

    Args:
      found: what WORKDIR/eval/examples_NAME.json holds.
    """
    halves = {title: found[title] for title in ("right", "wrong") if found[title]}
    columns = max((len(some) for some in halves.values()), default=1)
    figure = Figure(figsize=(1.15 * columns + 0.2, 1.75 * max(1, len(halves))), dpi=110, layout="constrained")
    axes_RxC = figure.subplots(max(1, len(halves)), columns, squeeze=False)
    for axes in axes_RxC.flat:
        axes.axis("off")
    for axes_C, (title, some) in zip(axes_RxC, halves.items(), strict=False):
        for axes, example in zip(axes_C, some, strict=False):
            axes.axis("on")
            pixels = np.asarray(read(base64.b64decode(example["picture"])))
            _picture(axes, pixels, frame=_RIGHT if title == "right" else _PLAIN)
            said = lines(f"is {example['label']}", 17, 2)
            if title == "wrong":
                said += lines(f"taken for {example['predicted']}", 17, 2)
            axes.set_xlabel("\n".join(said), fontsize=8)
    return literal(figure)


def choices(image: Image.Image, classnames: Sequence[str], probabilities: np.ndarray, most: int = 5) -> Figure:
    """A picture and the classes that came first. probabilities: (classes,), as a row of Model.zero_shot."""
    order = np.argsort(-probabilities)[:most]
    figure = Figure(figsize=(8, 2.6), dpi=80, layout="constrained")
    picture, bars = figure.subplots(1, 2, width_ratios=(1, 2))
    _picture(picture, np.asarray(rgb(image)))
    percent = 100 * probabilities[order]
    drawn = bars.barh(range(len(order)), percent)
    bars.bar_label(drawn, [f"{value:.1f} %" for value in percent], padding=3)
    bars.set_yticks(range(len(order)), [printable(classnames[i]) for i in order])
    bars.invert_yaxis()
    bars.set(xlim=(0, 118), xticks=[])
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    return literal(figure)
