"""Writes TFRecord shards that get their names only when complete."""

import contextlib
import errno
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from input_pipeline.sources import tfrecord
from input_pipeline.sources.offset_index import Scanned, scanned
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import files, storage


def example(features: dict) -> bytes:
    """A serialised tf.train.Example; values are bytes, str, int, or sequences of str or of int."""

    def feature(value):
        values = [value] if isinstance(value, bytes | str | int) else list(value)
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        values = [value.encode() if isinstance(value, str) else value for value in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    named = {key: feature(value) for key, value in features.items()}
    # Otherwise the order of the features depends on the process.
    return tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString(deterministic=True)


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


def put_shard(path: str, records: Iterable[bytes]) -> tuple[dict, Scanned | None]:
    """As `write_shard`, also to a bucket, by way of this machine's disk; and the records' places, for the index.

    Raises:
      InputError: as `write_shard`, or the bucket cannot be written.
    """
    with contextlib.ExitStack() as stack:
        local = Path(path)
        if storage.is_remote(path):
            local = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rankclip_jax.")), local.name)
        written = write_shard(local, records)
        if not written["samples"]:
            return written, None
        if storage.is_remote(path):
            storage.write(path, local.read_bytes())
        return written, scanned(tfrecord.kind(), str(local), written["bytes"])


def part_of(path: Path) -> Path:
    """The file name of an incomplete shard."""
    return path.with_name(path.name + ".part")
