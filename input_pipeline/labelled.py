"""Evaluation sets: images with labels, or with one or more captions each.

csv             any table (rankclip_jax/common/tables.py): a column of images, and one of captions, of class names, or
                of class numbers with a JSON list of names in `classes`
folder          one folder per class, with the class's name (common/folders.py)
clip_benchmark  CLIP_benchmark's WebDataset layout (clip_benchmark.py)
tfds            NAME[/CONFIG]:SPLIT of tensorflow-datasets, prepared in `data_dir`
shapes          the built-in demo
"""

import dataclasses
import io
import os
import sys

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import clip_benchmark, cpu_only, shapes
from input_pipeline import labelled_tables as tables
from input_pipeline.decode import decode
from input_pipeline.labelled_tables import numbered_names, of_files, read_list, tell_first
from input_pipeline.rows import read_each
from input_pipeline.sources import Source, open_source, tfds
from input_pipeline.sources.packed_strings import PackedStrings
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import folders, storage
from rankclip_jax.common.errors import InputError, located
from rankclip_jax.common.pictures import ENDINGS

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "dev"}


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """Images with labels.

    Attributes:
      source: rows with "label".
      names: the set's own label names, in label order; "0", "1" ... if it has none.
      templates: prompts of the set with {} for the name; None: none.
      from_file: the names were given or came with the data, and are used in prompts as they are.
    """

    source: Source
    names: list[str]
    templates: list[str] | None
    from_file: bool


@dataclasses.dataclass(frozen=True)
class CaptionedSet:
    """Images, each once, and their captions.

    Attributes:
      source: rows of images.
      captions: all captions.
      image_of_text: int64 (captions,), the row of each caption's image.
    """

    source: Source
    captions: list[str]
    image_of_text: np.ndarray


def open_labelled(spec: ConfigDict, *, image_side: int) -> LabelledSet:
    """Opens a set of config.eval.zero_shot.

    Raises:
      InputError: nothing at `spec.path`, another format, or a label without a class name.
    """
    found = _open_labelled(spec, spec.path, image_side)
    if spec.classes:
        names = read_list(spec.classes, "classes")
        if set(found.names) <= set(names) and found.names not in (names, numbered_names(len(found.names))):
            found = _with_numbers_of(found, names)
        found = dataclasses.replace(found, names=names, from_file=True)
    if spec.templates:
        found = dataclasses.replace(found, templates=read_list(spec.templates, "templates"))
    _check_labels(found, spec.path, spec.classes or "the set")
    return found


def _check_labels(found: LabelledSet, path: str, names_of: str) -> None:
    labels = found.source.labels
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < len(found.names):
        row = int(np.flatnonzero((labels < 0) | (labels >= len(found.names)))[0])
        raise InputError(
            f"{path} has label {labels[row]} ({found.source.where(row)}), "
            f"but {names_of} names {len(found.names)} classes"
            + ("; class numbers start at 0, and these seem to start at 1" if labels.min() == 1 else "")
        )


def open_train_and_test(spec: ConfigDict, *, image_side: int) -> tuple[LabelledSet, LabelledSet]:
    """Opens a set of config.eval.linear_probe: `train` and `path`. Raises InputError as `open_labelled`."""
    train, test = (_open_labelled(spec, path, image_side) for path in (spec.train, spec.path))
    if spec.format == "csv":
        train, test = _with_names_of_both(train, test)
    if train.names != test.names:
        raise InputError(
            f"{spec.train} ({len(train.names)} classes) and {spec.path} ({len(test.names)}) have different classes; "
            "a linear probe needs the same"
        )
    for found, path in ((train, spec.train), (test, spec.path)):
        _check_labels(found, path, "the set")
    return train, test


def _with_names_of_both(train: LabelledSet, test: LabelledSet) -> tuple[LabelledSet, LabelledSet]:
    """Either table may lack some classes: of numbers the last, of names any."""
    if all(found.names == numbered_names(len(found.names)) for found in (train, test)):
        names = max(train.names, test.names, key=len)
        return dataclasses.replace(train, names=names), dataclasses.replace(test, names=names)
    if not set(test.names) <= set(train.names):
        return train, test
    return train, _with_numbers_of(test, train.names)


def _with_numbers_of(found: LabelledSet, names: list[str]) -> LabelledSet:
    """The same set, whose labels are places in `names`, which has all of its names."""
    number_of = np.array([names.index(name) for name in found.names], np.int32)
    labels = found.source.labels
    read, of = found.source.read, tf.constant(number_of)

    def renumbered(row):
        sample = read(row)
        return sample | {"label": of[sample["label"]]}

    source = dataclasses.replace(found.source, read=renumbered, labels=None if labels is None else number_of[labels])
    return dataclasses.replace(found, names=names, source=source)


def _open_labelled(spec: ConfigDict, path: str | None, image_side: int) -> LabelledSet:
    cpu_only()
    if path is None:
        raise InputError(f"a set of format {spec.format!r} needs a path{_hint(spec)}")
    match spec.format:
        case "csv":
            return LabelledSet(*tables.labels(spec, path), None, False)
        case "folder":
            return _folder(spec, path)
        case "clip_benchmark":
            source, names, templates = clip_benchmark.labels(path, _hint(spec))
            assert source.labels is not None
            tell_first(path, source.labels)
            return LabelledSet(source, names or numbered_names(int(source.labels.max()) + 1), templates, bool(names))
        case "tfds":
            source, names = tfds.open_labels(path, spec.data_dir)
            return LabelledSet(source, names, None, False)
        case "shapes":
            source = open_source(spec, path, image_side=image_side)
            return LabelledSet(source, shapes.CLASS_NAMES, shapes.TEMPLATES, True)
    raise InputError(f"unknown format {spec.format!r}. Expected csv, folder, clip_benchmark, tfds or shapes")


def _folder(spec: ConfigDict, path: str) -> LabelledSet:
    classes = folders.class_folders(path) if storage.is_folder(path) else []
    if not classes:
        raise InputError(f"{located(path)} is not a folder with one folder per class{_hint(spec)}")
    if {name.lower() for name in classes} <= _SPLITS:
        raise InputError(f"{path}: its folders {', '.join(classes)} are splits, no classes; give one of them")
    roots = [os.path.join(path, name) for name in classes]
    files = [[os.path.join(root, file) for file in folders.pictures_below(root)] for root in roots]
    if not any(files):
        raise InputError(f"{path}: no images in the class folders ({', '.join(ENDINGS)})")
    if storage.is_remote(path):
        names = [storage.name_of(file.path) for file in storage.files_in(path)]
    else:
        names = os.listdir(path)
    without = sum(folders.is_picture(name) and not folders.is_leftover(name) for name in names)
    if without:
        print(f"{path}: {without:,} pictures next to the class folders have no class: left out", file=sys.stderr)
    labels_N = np.repeat(np.arange(len(classes), dtype=np.int32), [len(some) for some in files])
    paths = PackedStrings([os.fsencode(file) for some in files for file in some])
    return LabelledSet(of_files(paths, labels_N, paths.__getitem__), classes, None, False)


def open_captioned(spec: ConfigDict, *, image_side: int) -> CaptionedSet:
    """Opens a set of config.eval.retrieval or .geometry. In a table, the rows of one image are its captions.

    Rows of a table without a caption are lost.

    Raises:
      InputError: nothing at `spec.path`, another format, or an image without a caption.
    """
    cpu_only()
    if spec.path is None:
        raise InputError(f"a set of format {spec.format!r} needs a path{_hint(spec)}")
    match spec.format:
        case "csv":
            return CaptionedSet(*tables.captions(spec))
        case "clip_benchmark":
            return _captioned(*clip_benchmark.captions(spec.path, _hint(spec)))
        case "tfds":
            source = tfds.open_tfds(ConfigDict({"data_dir": spec.data_dir}), spec.path)
            return _captioned(source, _all_captions(source))
        case "shapes":
            source = open_source(spec, spec.path, image_side=image_side, split="val")
            return _captioned(source, [[shapes.draw("val", row, 8)[1]] for row in range(source.size)])
    raise InputError(f"unknown format {spec.format!r}. Expected csv, clip_benchmark, tfds or shapes")


def _all_captions(source: Source) -> list[list[str]]:
    def read(row):
        return tf.reshape(source.read(row)["caption"], [-1])

    return [[text.decode() for text in texts] for texts in read_each(read, source.size, source.where, source.ahead)]


def _captioned(source: Source, captions: list[list[str]]) -> CaptionedSet:
    captions = [[text.strip() for text in texts if text.strip()] for texts in captions]
    for row, texts in enumerate(captions):
        if not texts:
            raise InputError(f"{source.where(row)}: an image without a caption; every image needs one")
    image_of_text = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    return CaptionedSet(source, [text for texts in captions for text in texts], image_of_text)


def thumbnail(source: Source, row: int, side: int = 112) -> bytes:
    """A sample's image as a JPEG of at most `side` pixels."""
    pixels = np.asarray(decode(source.read(tf.constant(row, tf.int64))["image"]))
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def _hint(spec: ConfigDict) -> str:
    return f"; {spec.hint}" if spec.get("hint") else ""
