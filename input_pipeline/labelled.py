"""Evaluation sets: images with labels, or with one or more captions each.

  csv             a column of images and a column of class numbers (or captions); `classes` is a JSON list of names
  folder          one folder per class, with the class's name; classes in order of the names
  clip_benchmark  CLIP_benchmark's WebDataset layout: classnames.txt, zeroshot_classification_templates.txt,
                  test/nshards.txt, and test/0.tar ... with an image and .cls (or .txt, one caption per line) per sample
  tfds            NAME[/CONFIG]:SPLIT of tensorflow-datasets, prepared in `data_dir`
  shapes          the built-in demo
"""

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import cpu_only, shapes, transforms
from input_pipeline.sources import Source, open_source, tar, tfds
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import ENDINGS


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
        found = dataclasses.replace(found, names=_json_list(spec.classes, "classes"), from_file=True)
    if spec.templates:
        found = dataclasses.replace(found, templates=_json_list(spec.templates, "templates"))
    labels = found.source.labels
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < len(found.names):
        row = int(np.flatnonzero((labels < 0) | (labels >= len(found.names)))[0])
        raise InputError(
            f"{spec.path} has label {labels[row]} ({found.source.where(row)}), "
            f"but {spec.classes or 'the set'} names {len(found.names)} classes"
        )
    return found


def open_train_and_test(spec: ConfigDict, *, image_side: int) -> tuple[LabelledSet, LabelledSet]:
    """Opens a set of config.eval.linear_probe: `train` and `path`. Raises InputError as `open_labelled`."""
    train, test = (_open_labelled(spec, path, image_side) for path in (spec.train, spec.path))
    if spec.format == "csv":  # it has only numbers, and one of the two may lack the last class
        names = max(train.names, test.names, key=len)
        train, test = (dataclasses.replace(found, names=names) for found in (train, test))
    if train.names != test.names:
        raise InputError(
            f"{spec.train} ({len(train.names)} classes) and {spec.path} ({len(test.names)}) have different classes; "
            "a linear probe needs the same"
        )
    return train, test


def _open_labelled(spec: ConfigDict, path: str | None, image_side: int) -> LabelledSet:
    cpu_only()
    if path is None:
        raise InputError(f"a set of format {spec.format!r} needs a path{_hint(spec)}")
    match spec.format:
        case "csv":
            source = open_source(spec, path, image_side=image_side)
            assert source.labels is not None  # spec has label_key
            if not (spec.classes or spec.protocol or "train" in spec):
                _json_list(None, "classes")
            return LabelledSet(source, [str(i) for i in range(int(source.labels.max()) + 1)], None, False)
        case "folder":
            return _folder(spec, path)
        case "clip_benchmark":
            return _clip_benchmark(spec, path)
        case "tfds":
            source, names = tfds.open_labels(path, spec.data_dir)
            return LabelledSet(source, names, None, False)
        case "shapes":
            source = open_source(spec, path, image_side=image_side)
            return LabelledSet(source, shapes.CLASS_NAMES, shapes.TEMPLATES, True)
    raise InputError(f"unknown format {spec.format!r}. Expected csv, folder, clip_benchmark, tfds or shapes")


def _folder(spec: ConfigDict, path: str) -> LabelledSet:
    root = Path(path)
    classes = sorted(item.name for item in root.iterdir() if item.is_dir()) if root.is_dir() else []
    if not classes:
        raise InputError(f"{path} is not a folder with one folder per class{_hint(spec)}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(str(file) for file in (root / name).rglob("*") if file.suffix.lower() in ENDINGS)
        files += found
        labels += [label] * len(found)
    if not files:
        raise InputError(f"{path}: no images in the class folders ({', '.join(ENDINGS)})")
    return LabelledSet(_files(files, np.array(labels, np.int32)), classes, None, False)


def _files(files: list[str], labels_N: np.ndarray) -> Source:
    files_N, labels = tf.constant(files), tf.constant(labels_N)

    def read(row):
        return {"image": tf.io.read_file(files_N[row]), "caption": "", "label": labels[row]}

    return Source(size=len(files), read=read, where=lambda row: files[row], captions=lambda: (), labels=labels_N)


def _clip_benchmark(spec: ConfigDict, path: str) -> LabelledSet:
    root, members, classes = _shards(spec, path, "cls")
    labels = np.array([_class_number(text, members, row) for row, text in enumerate(classes)], np.int32)

    def read(row):
        sample = members.read(row)
        number = tf.strings.to_number(tf.strings.strip(sample["cls"]), tf.int32)
        return {"image": sample["image"], "caption": "", "label": number}

    names, templates = (_lines(root / f) for f in ("classnames.txt", "zeroshot_classification_templates.txt"))
    return LabelledSet(
        _of_members(members, read, labels),
        names or [str(i) for i in range(int(labels.max()) + 1)],
        templates and [template.replace("{c}", "{}") for template in templates],
        bool(names),
    )


def _shards(spec: ConfigDict, path: str, text_member: str) -> tuple[Path, tar.Members, list[str]]:
    """(the set's folder, its images and text members, the texts). `path`: that folder, or a split in it."""
    root = Path(path)
    split, root = (root, root.parent) if (root / "nshards.txt").is_file() else (root / "test", root)
    counted = split / "nshards.txt"
    if not counted.is_file():
        raise InputError(f"no such file: {counted}; CLIP_benchmark's layout needs it{_hint(spec)}")
    text = counted.read_text()
    if not text.strip().isdigit() or int(text) < 1:
        raise InputError(f"{counted}: expected the number of shards; got {text[:20]!r}")
    shards = [split / f"{number}.tar" for number in range(int(text))]
    lacking = [shard for shard in shards if not shard.is_file()]
    if lacking:
        raise InputError(f"no such file: {lacking[0]}, one of the {len(shards)} shards of {counted}")
    shards = [str(shard) for shard in shards]
    endings = {"image": tuple(suffix[1:] for suffix in ENDINGS), text_member: (text_member,)}
    members = tar.open_members(shards, endings)
    whole = (members.index.columns["length"] >= 0).all(axis=1)
    if not whole.all():
        where = members.where(int(np.flatnonzero(~whole)[0]))
        raise InputError(f"{where} has no image or no .{text_member}")
    # The texts are opened separately, so that reading them does not read the images between them.
    texts = tar.open_members(shards, {text_member: (text_member,)})
    rows = tf.data.Dataset.range(texts.index.size).map(lambda row: texts.read(row)[text_member])
    return root, members, [text.decode(errors="replace") for text in rows.as_numpy_iterator()]


def _of_members(members: tar.Members, read: Callable, labels_N: np.ndarray | None = None) -> Source:
    lost = tuple(members.index.lost)
    return Source(members.index.size, read, members.where, captions=lambda: (), labels=labels_N, lost=lost)


def _class_number(text: str, members: tar.Members, row: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{members.where(row)}: expected a class number in .cls; got {text[:20]!r}") from None


def _lines(path: Path) -> list[str] | None:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else None


def open_captioned(spec: ConfigDict, *, image_side: int) -> CaptionedSet:
    """Opens a set of config.eval.retrieval or .geometry. In a csv, the rows of one image are its captions.

    Raises:
      InputError: nothing at `spec.path`, another format, or an image without a caption.
    """
    cpu_only()
    match spec.format:
        case "csv":
            return _captioned_csv(spec)
        case "clip_benchmark":
            _, members, texts = _shards(spec, spec.path or "", "txt")

            def read(row):
                return {"image": members.read(row)["image"], "caption": ""}

            return _captioned(_of_members(members, read), [text.split("\n") for text in texts])
        case "tfds":
            source = tfds.open_tfds(ConfigDict({"data_dir": spec.data_dir}), spec.path)
            return _captioned(source, _all_captions(source))
        case "shapes":
            source = open_source(spec, spec.path, image_side=image_side, split="val")
            return _captioned(source, [[shapes.draw("val", row, 8)[1]] for row in range(source.size)])
    raise InputError(f"unknown format {spec.format!r}. Expected csv, clip_benchmark, tfds or shapes")


def _all_captions(source: Source) -> list[list[str]]:
    rows = tf.data.Dataset.range(source.size).map(lambda row: tf.reshape(source.read(row)["caption"], [-1]))
    captions: list[list[str]] = []
    try:
        for texts in rows.as_numpy_iterator():
            captions.append([text.decode(errors="replace") for text in texts])
    except tf.errors.OpError as error:
        raise InputError(f"{source.where(len(captions))} cannot be read ({type(error).__name__})") from None
    return captions


def _captioned(source: Source, captions: list[list[str]]) -> CaptionedSet:
    captions = [[text.strip() for text in texts if text.strip()] for texts in captions]
    for row, texts in enumerate(captions):
        if not texts:
            raise InputError(f"{source.where(row)}: an image without a caption; every image needs one")
    image_of_text = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    return CaptionedSet(source, [text for texts in captions for text in texts], image_of_text)


def _captioned_csv(spec: ConfigDict) -> CaptionedSet:
    path = Path(spec.path or "")
    if not path.is_file():
        raise InputError(f"no such file: {spec.path}{_hint(spec)}")
    captions_of: dict[str, list[str]] = {}
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else spec.delimiter)
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns  # Flickr30k's own file has a space after each delimiter
        for key in (spec.image_key, spec.caption_key):
            if key not in columns:
                raise InputError(f"{path} has no column {key!r}; its columns are: {', '.join(columns) or 'none'}")
        for row in reader:
            image, caption = (row[spec.image_key] or "").strip(), row[spec.caption_key] or ""
            captions_of.setdefault(str(path.parent / (spec.image_folder or "") / image), []).append(caption)
    if not captions_of:
        raise InputError(f"{path} has no rows after its header")
    files = list(captions_of)
    return _captioned(_files(files, np.full(len(files), -1, np.int32)), list(captions_of.values()))


def thumbnail(source: Source, row: int, side: int = 112) -> bytes:
    """A sample's image as a JPEG of at most `side` pixels."""
    pixels = np.asarray(transforms.decode(source.read(tf.constant(row, tf.int64))["image"]))
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def _hint(spec: ConfigDict) -> str:
    return f"; {spec.hint}" if spec.get("hint") else ""


def _json_list(path: str | None, key: str) -> list[str]:
    if not path or not Path(path).is_file():
        raise InputError(f"{key}={path}: expected an existing JSON file with a list of strings")
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not (isinstance(items, list) and items and all(isinstance(item, str) for item in items)):
        raise InputError(f"{path}: expected a JSON list of strings")
    return items
