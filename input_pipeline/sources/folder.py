"""A folder of images, at any depth, each with a .txt of the same name next to it."""

import os

import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline.sources.packed_strings import PackedStrings
from input_pipeline.sources.paths import is_remote
from input_pipeline.sources.source import Lost, Source, read_captions
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import ENDINGS


def open_folder(spec: ConfigDict, path: str | os.PathLike) -> Source:
    """Opens a folder. Rows are in the order of the images' paths. A .txt without an image is reported as lost.

    `spec`: hint of config.data.

    Raises:
      InputError: no such folder, or no images.
    """
    root = os.fspath(path) if isinstance(path, str | os.PathLike) else repr(path)
    if not tf.io.gfile.isdir(root):
        raise InputError(f"{root} is not a folder" + (f"; {spec.hint}" if spec.get("hint") else ""))
    names = sorted(_files(root))
    images = [name for name in names if name.lower().endswith(ENDINGS)]
    if not images:
        raise InputError(f"{root} has no images ({', '.join(ENDINGS)})")
    stems = {os.path.splitext(name)[0] for name in images}
    alone = [name for name in names if name.endswith(".txt") and name[:-4] not in stems]
    lost = tuple(Lost(os.path.join(root, name), "a caption without an image", 1) for name in alone)
    size, images = len(images), PackedStrings([os.fsencode(name) for name in images])

    def read(row):
        image = tf.strings.join([root.rstrip("/") + "/", images.at(row)])
        return {
            "image": tf.io.read_file(image),
            "caption": tf.io.read_file(tf.strings.regex_replace(image, r"\.[^./]*$", ".txt")),
        }

    return Source(size, read, lambda row: os.path.join(root, images[row]), lambda: read_captions(read, size), lost=lost)


def _files(root):
    """Paths below `root`, relative to it, without hidden files; links are followed, each folder once."""
    seen = set()
    for folder, folders, files in tf.io.gfile.walk(root) if is_remote(root) else os.walk(root, followlinks=True):
        real = folder if is_remote(root) else os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        below = folder[len(root) :].lstrip("/")
        yield from (f"{below}/{name}" if below else name for name in files if not name.startswith("."))
