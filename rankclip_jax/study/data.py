"""Data sets that fit in memory, read whole by PIL: no TensorFlow, no input pipeline, no second pass.

A picture that cannot be read ends the study with its name: whoever compares objectives wants the same samples in all.
"""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import ENDINGS
from rankclip_jax.common.progress import progress
from rankclip_jax.weights.view import View


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pictures on canvases, each at the top left, with their captions.

    Attributes:
      canvas: uint8 (N, C, C, 3).
      size: int32 (N, 2), height and width of each.
      captions: N.
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


def read_pairs(data: ConfigDict, path: Any, *, side: int, canvas: int, split: str, limit: int | None = None) -> Pairs:
    """The pairs of config.data (format csv or shapes) at `path`: a csv, or the number of scenes of `split`.

    `limit`: only so many, from the first. Pictures larger than the canvas are shrunk to fit it. Raises InputError for
    another format, no such file or column, or a picture that cannot be read.
    """
    if data.format == "shapes":
        images, captions, _ = _scenes(split, min(int(path), limit or int(path)), side)
        return Pairs(images, np.full((len(images), 2), side, np.int32), captions)
    if data.format != "csv":
        raise InputError(f"a study reads csv and shapes, not config.data.format = {data.format!r}")
    caption_key = data.caption_key or "caption"
    files, captions = _columns(path, data.image_key or "image", caption_key, data.delimiter, data.hint)
    files, captions = files[:limit], captions[:limit]
    pixels, size = np.zeros((len(files), canvas, canvas, 3), np.uint8), np.zeros((len(files), 2), np.int32)
    with progress("reading", len(files)) as bar:
        for row, file in enumerate(files):
            picture = _read(file, canvas)
            size[row] = picture.shape[:2]
            pixels[row, : size[row, 0], : size[row, 1]] = picture
            bar.update(1)
    return Pairs(pixels, size, captions)


def view_of(pairs: Pairs, side: int) -> np.ndarray:
    """The pairs' pictures in the evaluation view, uint8 (N, side, side, 3)."""
    view = View(side, side)
    return np.stack([view(c[:h, :w]) for c, (h, w) in zip(pairs.canvas, pairs.size, strict=True)])


def read_labelled(spec: ConfigDict, *, side: int) -> Labelled:
    """A set of config.eval.zero_shot (format csv, folder or shapes) at spec.path.

    shapes: a split of input_pipeline.shapes, or SPLIT:COUNT. Raises InputError as `read_pairs`.
    """
    path = spec.path
    names, templates = (_json(spec.get(key)) for key in ("classes", "templates"))
    if spec.format == "shapes":
        from input_pipeline import shapes

        split, _, count = str(path).partition(":")
        images, _, labels = _scenes(split, int(count or 16 * len(shapes.SPLITS[split][1])), side)
        names, templates = names or shapes.CLASS_NAMES, templates or shapes.TEMPLATES
    elif spec.format == "csv":
        files, labels = _columns(path, spec.get("image_key") or "image", spec.get("label_key") or "label",
                                 spec.get("delimiter") or ",", spec.get("hint"))  # fmt: skip
        images = _views(files, side)
        names = names or [str(i) for i in range(1 + max(int(x) for x in labels))]
    elif spec.format == "folder":
        root = Path(path)
        names = names or sorted(item.name for item in root.glob("*") if item.is_dir())
        found = [(file, k) for k, name in enumerate(names) for file in sorted((root / name).rglob("*"))]
        files, labels = zip(*[(f, k) for f, k in found if f.suffix.lower() in ENDINGS], strict=True) or ((), ())
        images = _views(files, side)
    else:
        raise InputError(f"a study reads labelled sets of format csv, folder or shapes, not {spec.format!r}")
    return Labelled(images, np.array(labels, np.int64), list(names), list(templates or ["a photo of a {}."]))


def _scenes(split, count, side):
    from input_pipeline import shapes  # NumPy alone

    drawn = []
    with progress("drawing", count) as bar:
        for index in range(count):
            drawn.append(shapes.draw(split, index, side))
            bar.update(1)
    images, captions, labels = zip(*drawn, strict=True)
    return np.stack(images), list(captions), list(labels)


def _columns(path, image_key, text_key, delimiter, hint):
    path = Path(str(path))
    if not path.is_file():
        raise InputError(f"no such file: {path}; {hint or f'give a csv with columns {image_key},{text_key}'}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else delimiter)
        lacking = [key for key in (image_key, text_key) if key not in (reader.fieldnames or ())]
        if lacking:
            raise InputError(f"{path} has no column {lacking[0]!r}, only {', '.join(reader.fieldnames or ())}")
        rows = [(path.parent / row[image_key], row[text_key]) for row in reader]
    if not rows:
        raise InputError(f"{path} has no rows below its header")
    files, texts = zip(*rows, strict=True)
    return list(files), list(texts)


def _read(file, canvas):
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{file}: {reason}; a study needs every picture") from None
    if max(picture.size) > canvas:
        factor = canvas / max(picture.size)
        picture = picture.resize([max(1, int(s * factor)) for s in picture.size], Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _views(files, side):
    view, images = View(side, side), np.zeros((len(files), side, side, 3), np.uint8)
    with progress("reading", len(files)) as bar:
        for row, file in enumerate(files):
            images[row] = view(file)
            bar.update(1)
    return images


def _json(path):
    if not path:
        return None
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}, a JSON list of class names or prompts")
    return json.loads(Path(path).read_text())
