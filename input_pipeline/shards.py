"""Writes TFRecord shards that get their names only when complete."""

import errno
import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import tensorflow as tf

from rankclip_jax.common import files


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


def name(number: int) -> str:
    """The file name of a shard."""
    return f"{number:05d}.tfrecord"


def names(rows: int, shard_size: int) -> list[str]:
    """The file names of all shards of `rows` rows, in order."""
    return [name(number) for number in range(-(-rows // shard_size))]


def write_shard(path: Path, records: Iterable[bytes]) -> dict:
    """Writes a TFRecord file, which gets its name only when it is completely on disk.

    Until then its name is `path` with .part added, which the caller must also own. Returns {"samples", "bytes",
    "sha256"}. Without records no file is written.

    Raises:
      InputError: the disk is full or not writable.
    """
    records = iter(records)
    first = list(itertools.islice(records, 1))
    if not first:
        return {"samples": 0, "bytes": 0, "sha256": None}
    samples = 0
    with files.whole(path, part=part_of(path)) as part:
        try:
            with tf.io.TFRecordWriter(str(part)) as writer:
                for record in itertools.chain(first, records):
                    writer.write(record)
                    samples += 1
        except tf.errors.OpError as error:  # "file; No space left on device"
            why = error.message.rpartition("; ")[2]
            raise OSError(next((n for n in errno.errorcode if os.strerror(n) == why), 0), why) from None
        with open(part, "rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
            size = written.tell()
    return {"samples": samples, "bytes": size, "sha256": digest}


def part_of(path: Path) -> Path:
    """The file name of an incomplete shard."""
    return path.with_name(path.name + ".part")
