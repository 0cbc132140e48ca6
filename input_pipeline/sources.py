"""Where samples come from. A source answers any row by number, so the pipeline can shuffle and resume for free.

`open_source` is the one entry. A source has

  size          number of rows
  read(row)     TensorFlow ops: int64 scalar -> {"image": encoded bytes or uint8 (H, W, 3), "caption": string}
                (labelled sets add "label": int32)
  where(row)    str that names a row for a person: file, row, image
  captions()    iterable of the captions, for training a tokenizer
  labels        int32 (size,) of a labelled csv
"""

import csv
import dataclasses
import glob
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf

from input_pipeline import shapes
from rankclip_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of images and captions by number; see the module's docstring."""

    size: int
    read: Callable
    where: Callable[[int], str]
    captions: Callable[[], Iterable[str]]
    labels: np.ndarray | None = None


def open_source(spec, path, *, image_side: int, split: str = "train") -> Source:
    """Opens config.data's `train` or `val`, or a labelled set of config.eval.zero_shot.

    Args:
      spec: has `format`, and for csv `image_key`, `caption_key` (or `label_key`) and `delimiter`.
      path: csv: the file. shapes: the number of scenes, or the name of a labelled split.
      image_side: pixels; side of the scenes that `shapes` draws.
      split: train | val; which stream of scenes `shapes` draws from.

    Raises:
      InputError: unknown format, missing file or column, or no rows.
    """
    match spec.format:
        case "csv":
            return _csv(spec, path)
        case "shapes":
            return _shapes(path, image_side, split)
    raise InputError(f"config.data.format must be csv or shapes; got {spec.format!r}")


def _csv(spec, path) -> Source:
    label_key = spec.get("label_key")
    text_key = label_key or spec.caption_key
    files = sorted(glob.glob(str(path))) if path else []
    if not files:
        hint = spec.get("hint") or f"give a csv with columns {spec.image_key},{text_key} (config.data.train, .val)"
        raise InputError(f"no such file: {path}; {hint}")
    images, texts, wheres = [], [], []
    for file in files:
        with open(file, newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if file.endswith(".tsv") else spec.delimiter)
            for key in (spec.image_key, text_key):
                if key not in (reader.fieldnames or ()):
                    columns = ", ".join(reader.fieldnames or ()) or "none"
                    raise InputError(f"{file} has no column {key!r}; its columns are: {columns}")
            for row in reader:
                # os.path semantics: an absolute path stays as it is, a relative one starts at the csv's folder.
                images.append(str(Path(file).parent / (row[spec.image_key] or "")))
                texts.append(row[text_key] or "")
                wheres.append(f"{file} row {reader.line_num - 2}")
    if not images:
        raise InputError(f"{path} has no rows below its header")
    labels = _class_numbers(texts, path, label_key) if label_key else None
    images_N, texts_N = tf.constant(images), tf.constant(texts)

    def read(row):
        sample = {"image": tf.io.read_file(images_N[row]), "caption": texts_N[row]}
        if label_key:
            sample["label"] = tf.constant(labels)[row]
        else:
            tf.debugging.assert_greater(tf.strings.length(tf.strings.strip(texts_N[row])), 0, "empty caption")
        return sample

    return Source(len(images), read, lambda row: f"{wheres[row]}: {images[row]}", lambda: texts, labels)


def _class_numbers(texts, path, label_key):
    try:
        return np.array([int(text) for text in texts], np.int32)
    except ValueError as error:
        raise InputError(f"{path}: column {label_key!r} must hold class numbers: {error}") from None


def _shapes(path, side: int, split: str) -> Source:
    if path in ("seen", "held_out"):
        split, size = path, 16 * len(shapes.SEEN if path == "seen" else shapes.HELD_OUT)
    elif isinstance(path, int) and path > 0:
        size = path
    else:
        raise InputError(f"shapes: give a number of scenes, or seen or held_out; got {path!r}")

    def read(row):
        def draw(row):
            image, caption, label = shapes.draw(split, int(row), side)
            return image, caption.encode(), np.int32(label)

        image, caption, label = tf.numpy_function(draw, [row], (tf.uint8, tf.string, tf.int32))
        return {"image": tf.ensure_shape(image, (side, side, 3)), "caption": caption, "label": label}

    captions = lambda: (shapes.draw(split, row, 8)[1] for row in range(min(size, 10_000)))  # noqa: E731
    return Source(size, read, lambda row: f"shapes {split} scene {row}", captions)


def open_labelled(spec, *, image_side: int) -> tuple[Source, list[str], list[str] | None]:
    """A set of config.eval.zero_shot: its source, class names in label order, and prompts (None: not given).

    Raises:
      InputError: as `open_source`; or the class names are missing, or fewer than the labels need.
    """
    source = open_source(spec, spec.path, image_side=image_side)
    if spec.format == "shapes":
        return source, shapes.CLASS_NAMES, shapes.TEMPLATES
    classes = _json_list(spec.classes, "classes")
    if source.labels.min() < 0 or source.labels.max() >= len(classes):
        wrong = source.labels[(source.labels < 0) | (source.labels >= len(classes))][0]
        raise InputError(f"{spec.path} has label {wrong}, but {spec.classes} names {len(classes)} classes")
    return source, classes, _json_list(spec.templates, "templates")


def _json_list(path, key):
    if path is None and key == "templates":
        return None
    if not path or not Path(path).is_file():
        raise InputError(f"config.eval.zero_shot: {key} must be a JSON file with a list of strings; no file {path}")
    items = json.loads(Path(path).read_text())
    if not (isinstance(items, list) and items and all(isinstance(item, str) for item in items)):
        raise InputError(f"{path} must hold a JSON list of strings")
    return items
