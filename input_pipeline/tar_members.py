"""Samples of a tar by number: an index of where their images lie, made from the headers alone."""

import tarfile
from pathlib import Path

import numpy as np
import tensorflow as tf

from input_pipeline.sources import Source
from rankclip_jax.errors import InputError


def index(path, image_suffixes: tuple[str, ...]) -> list[dict]:
    """Samples of one tar, in its order: members whose names differ in their suffix alone.

    Returns dicts of "file" (str), "offset" and "size" (int, of the image), "texts" (suffix -> str of every other small
    member), "where" (str for a person).

    Raises:
      InputError: no such file, no tar or a torn one, or a sample without an image.
    """
    samples: dict[str, dict] = {}
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                key = f"{folder}/{stem}"
                sample = samples.setdefault(key, {"file": str(path), "texts": {}, "where": f"{path}: {stem}"})
                if (dot + suffix).lower() in image_suffixes:
                    sample |= {"offset": member.offset_data, "size": member.size}
                elif member.size < 1 << 20:
                    sample["texts"][dot + suffix] = tar.extractfile(member).read().decode(errors="replace")
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} cannot be read as an uncompressed tar: {error}") from None
    end = Path(path).stat().st_size
    for sample in samples.values():
        if "offset" not in sample:
            raise InputError(f"{sample['where']} has no image ({', '.join(image_suffixes)})")
        if sample["offset"] + sample["size"] > end:
            raise InputError(f"{path} is torn: {sample['where']} ends beyond the file; fetch it again")
    return list(samples.values())


def open_members(samples: list[dict], image_suffixes: tuple[str, ...], labels_N: np.ndarray | None) -> Source:
    """A source of the images of indexed samples."""
    labels = tf.constant(np.full(len(samples), -1, np.int32) if labels_N is None else labels_N)

    def ranged_read(row):
        sample = samples[int(row)]
        with open(sample["file"], "rb") as file:
            file.seek(sample["offset"])
            return file.read(sample["size"])

    def read(row):
        image = tf.ensure_shape(tf.numpy_function(ranged_read, [row], tf.string), ())
        return {"image": image, "caption": "", "label": labels[row]}

    where = lambda row: samples[row]["where"]  # noqa: E731
    return Source(size=len(samples), read=read, where=where, captions=lambda: (), labels=labels_N)
