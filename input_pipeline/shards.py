"""Files that are complete under their names, or not there: TFRecord shards and the texts beside them."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import tensorflow as tf

from rankclip_jax.errors import InputError


def example(features: dict) -> bytes:
    """A serialised tf.train.Example; values are bytes, str, int, or sequences of str or of int."""

    def feature(value):
        values = [value] if isinstance(value, bytes | str | int) else list(value)
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        values = [value.encode() if isinstance(value, str) else value for value in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    named = {key: feature(value) for key, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString()


def write_shard(path: Path, records: Iterable[bytes]) -> dict:
    """Writes a TFRecord file; it gets its name only when all of it is on the disk.

    Returns {"samples", "bytes", "sha256"}; without records no file is written.

    Raises:
      InputError: the disk is full or cannot be written.
    """
    part = path.with_name(path.name + ".part")
    samples = 0
    try:
        with tf.io.TFRecordWriter(str(part)) as writer:
            for record in records:
                writer.write(record)
                samples += 1
        if not samples:
            part.unlink()
            return {"samples": 0, "bytes": 0, "sha256": None}
        with open(part, "rb") as written:
            os.fsync(written.fileno())
            digest = hashlib.file_digest(written, "sha256").hexdigest()
            size = written.tell()
        replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, tf.errors.OpError):  # "file; No space left on device"
            raise InputError(cannot_write(part, error.message.rpartition("; ")[2])) from None
        if isinstance(error, OSError):
            raise InputError(cannot_write(part, error.strerror)) from None
        raise
    return {"samples": samples, "bytes": size, "sha256": digest}


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
      InputError: the disk is full or cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        replace(part, path)
    except OSError as error:
        raise InputError(cannot_write(part, error.strerror)) from None


def replace(part: Path, path: Path) -> None:
    """Renames, and brings the rename itself to the disk."""
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def cannot_write(path: Path, why: str) -> str:
    """The line for a disk that is full or may not be written."""
    return f"cannot write {path}: {why}; finished shards are kept, and the same command goes on after them"
