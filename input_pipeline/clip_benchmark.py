"""CLIP_benchmark's WebDataset layout: classnames.txt, zeroshot_classification_templates.txt, test/nshards.txt, and
test/0.tar ... with an image and .cls (or .txt, one caption per line) per sample."""

import numpy as np

from input_pipeline.labelled_tables import MOST_CLASSES
from input_pipeline.rows import read_each
from input_pipeline.sources import Source, tar
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import ENDINGS


def labels(path: str, hint: str) -> tuple[Source, list[str] | None, list[str] | None]:
    """(images with "label", class names or None, prompts or None) of the set in a folder, or of one of its splits.

    Raises:
      InputError: another layout, or a label that is no number.
    """
    root, members, classes = _shards(path, "cls", hint)
    labels_N = np.array([_class_number(text, members, row) for row, text in enumerate(classes)], np.int32)
    names, templates = (
        _lines(storage.join(root, f)) for f in ("classnames.txt", "zeroshot_classification_templates.txt")
    )
    templates = templates and [template.replace("{c}", "{}") for template in templates]
    return _source(members, labels_N), names, templates


def captions(path: str, hint: str) -> tuple[Source, list[list[str]]]:
    """(images, the captions of each image). Raises as above."""
    _, members, texts = _shards(path, "txt", hint)
    return _source(members, np.full(members.index.size, -1, np.int32)), [text.split("\n") for text in texts]


def _shards(path: str, text_member: str, hint: str) -> tuple[str, tar.Members, list[str]]:
    """(the set's folder, its images and text members, the texts)"""
    root = path.rstrip("/")
    one_split = storage.exists(storage.join(root, "nshards.txt"))
    split, root = (root, storage.parent(root)) if one_split else (storage.join(root, "test"), root)
    counted = storage.join(split, "nshards.txt")
    if not storage.exists(counted):
        raise InputError(f"no such file: {counted}; CLIP_benchmark's layout needs it{hint}")
    text = storage.read(counted).decode(errors="replace")
    if not text.strip().isdigit() or int(text) < 1:
        raise InputError(f"{counted}: expected the number of shards; got {text[:20]!r}")
    shards = [storage.join(split, f"{number}.tar") for number in range(int(text))]
    lacking = [shard for shard, found in zip(shards, storage.stat(shards), strict=True) if found is None]
    if lacking:
        raise InputError(f"no such file: {lacking[0]}, one of the {len(shards)} shards of {counted}")
    endings = {"image": tuple(suffix[1:] for suffix in ENDINGS), text_member: (text_member,)}
    members = tar.open_members(shards, endings)
    for file, start in enumerate(members.index.starts):
        lacking_N = np.flatnonzero((members.index.of_shard(file) < 0).any(axis=1))
        if len(lacking_N):
            raise InputError(f"{members.where(int(start + lacking_N[0]))} has no image or no .{text_member}")
    texts = members.alone([text_member])
    found: list[str] = []
    for sample in read_each(texts.read, members.index.size, members.where, texts.ahead):
        try:
            found.append(sample[text_member].decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            where = members.where(len(found))
            raise InputError(f"{where}: .{text_member} is not UTF-8 at byte {error.start}; write it as UTF-8") from None
    return root, members, found


def _source(members: tar.Members, labels_N: np.ndarray) -> Source:
    images, labels = members.alone(["image"]), tf.constant(labels_N)

    def read(row):
        row = tf.cast(row, tf.int64)
        return images.read(row) | {"caption": "", "label": labels[row]}

    size, lost = members.index.size, tuple(members.index.lost)
    return Source(size, read, members.where, captions=lambda: (), labels=labels_N, lost=lost, ahead=images.ahead)


def _class_number(text: str, members: tar.Members, row: int) -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20 and int(digits) < MOST_CLASSES):
        raise InputError(
            f"{members.where(row)}: expected a class number in .cls; got {text[:20]!r}: not a whole number from "
            f"0, below {MOST_CLASSES:,}"
        )
    return int(digits)


def _lines(path: str) -> list[str] | None:
    if not storage.exists(path):
        return None
    try:
        return storage.read(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}; write it as UTF-8") from None
