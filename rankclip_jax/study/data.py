"""Data sets that fit in memory, as arrays: read once by the input pipeline's sources, in whatever format they take.

A sample that cannot be read ends the study with its name: whoever compares objectives wants the same samples in all.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.progress import progress
from rankclip_jax.evaluation.prompts import prompts_of
from rankclip_jax.weights.view import View


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pictures on canvases, each at the top left, with their captions.

    Attributes:
      canvas: uint8 (N, C, C, 3).
      size: int32 (N, 2), height and width of each.
      captions: N, the first of each picture.
    """

    canvas: np.ndarray
    size: np.ndarray
    captions: list[str]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Pictures in the model's evaluation view, with labels.

    Attributes:
      images: uint8 (N, S, S, 3).
      labels: int64 (N,).
      names, templates: of the classes, and the prompts.
    """

    images: np.ndarray
    labels: np.ndarray
    names: list[str]
    templates: list[str]

    def part(self, rows: slice) -> "Labelled":
        """Some of the pictures."""
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows])


def read_pairs(
    data: ConfigDict,
    path: str | int | Sequence[str] | Mapping | None,
    *,
    side: int,
    canvas: int,
    split: str,
    limit: int | None = None,
) -> Pairs:
    """The pairs of config.data at `path`, its `train` or `val`, the first `limit` of them.

    Pictures larger than the canvas are shrunk to fit it. Raises InputError for what `open_source` refuses, a weighted
    mixture, or a sample that cannot be used.
    """
    from input_pipeline.sources import open_source

    source = open_source(data, path, image_side=side, split=split)
    if source.shares:
        raise InputError("config.data: a study reads every row once: leave the weights of the mixture's parts out")
    count = min(source.size, limit or source.size)
    pixels, size, captions = np.zeros((count, canvas, canvas, 3), np.uint8), np.zeros((count, 2), np.int32), []
    for row in _rows(source, count, lambda image: _shrunk(image, canvas), data.recover_truncated):
        size[row.number] = row.image.shape[:2]
        pixels[row.number, : row.image.shape[0], : row.image.shape[1]] = row.image
        captions.append(row.captions[0])
    return Pairs(pixels, size, captions)


def spoiled(pairs: Pairs, mismatched: float, duplicates: float) -> Pairs:
    """The pairs as the web has them: shares of them are mismatched, or nearly repeat another pair.

    The captions of the mismatched ones change places among themselves. A duplicate has the caption of one of the other
    pairs, and its picture with noise of at most 8 grey levels. Which ones is the same in every run. Raises InputError
    where the shares are more than all, or leave no pair to repeat.
    """
    rng, count = np.random.default_rng(0), len(pairs.captions)
    rows_N = rng.permutation(count)
    first, second = round(mismatched * count), round(duplicates * count)
    if first + second > count or second == count:
        raise InputError("config.study: mismatched and duplicates are more than all pairs, or duplicates are all")
    from_N = np.arange(count)
    from_N[rows_N[:first]] = np.roll(rows_N[:first], 1)
    captions = [pairs.captions[row] for row in from_N]
    canvas, size = pairs.canvas.copy(), pairs.size.copy()
    others = np.concatenate([rows_N[first + second :], rows_N[:first]])  # which stay as they are
    for row, other in zip(rows_N[first : first + second], np.resize(others, second), strict=True):
        height, width = size[row] = pairs.size[other]
        picture = pairs.canvas[other, :height, :width] + rng.integers(-8, 9, (height, width, 3))
        canvas[row] = 0
        canvas[row, :height, :width] = picture.clip(0, 255)
        captions[row] = captions[other]
    return Pairs(canvas, size, captions)


def truth_of(data: ConfigDict, count: int) -> np.ndarray | None:
    """How alike two of the first validation pairs are, (count, count) in [0, 1]; None where captions do not say."""
    if data.format != "shapes" or not str(data.val).startswith("stated:"):
        return None
    from input_pipeline.graded import truth

    return truth("val", count)


def view_of(pairs: Pairs, side: int, squash: str = "no") -> np.ndarray:
    """The pairs' pictures in the evaluation view, uint8 (N, side, side, 3). `squash`: config.data.squash, settled."""
    view = View(side, side, squash=squash)
    return np.stack([view(c[:h, :w]) for c, (h, w) in zip(pairs.canvas, pairs.size, strict=True)])


def read_labelled(name: str, spec: ConfigDict, *, side: int, squash: str = "no") -> Labelled:
    """The set config.eval.zero_shot.NAME, in the view of `view_of`.

    Raises InputError for what `open_labelled` refuses, or as `read_pairs`.
    """
    from input_pipeline.labelled import open_labelled

    found = open_labelled(spec, image_side=side)
    classes, view = prompts_of(name, spec, found), View(side, side, squash=squash)
    images_N, labels_N = [], []
    for row in _rows(found.source, found.source.size, view):
        label = int(classes.class_of_label[row.label])
        if label >= 0:  # a protocol may leave classes out
            images_N.append(row.image)
            labels_N.append(label)
    return Labelled(np.stack(images_N), np.array(labels_N), classes.names, classes.templates)


def _rows(source: Any, count: int, made: Callable, recover: bool = False) -> Iterator:
    """The first rows, their images `made` of uint8 (H, W, 3) where they are read: many wait in memory."""
    from input_pipeline.decode import decoded_to
    from input_pipeline.rows import read_rows

    def read(row):
        sample = source.read(row)
        return sample | {"image": decoded_to(made, sample["image"], recover)}

    if source.lost:
        raise InputError(f"{source.lost[0].where}: {source.lost[0].reason}; a study needs every sample")
    with progress("reading", count) as bar:
        for row in read_rows(dataclasses.replace(source, read=read), range(count)):
            if row.reason:
                why = f"{row.detail}; {row.reason}" if row.detail else row.reason
                raise InputError(f"{source.where(row.number)}: {why}; a study needs every sample")
            bar.update(1)
            yield row


def _shrunk(pixels_HxWx3, canvas):
    longest = max(pixels_HxWx3.shape)
    if longest <= canvas:
        return pixels_HxWx3
    height, width = (max(1, int(side * canvas / longest)) for side in pixels_HxWx3.shape[:2])
    return np.asarray(Image.fromarray(pixels_HxWx3).resize((width, height), Image.Resampling.BICUBIC))
