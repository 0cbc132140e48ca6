"""Reads byte ranges of many local files inside the graph; and whole files.

TensorFlow has no op for ranges: tf.io.read_file reads whole files, and a FixedLengthRecordDataset reads everything
before the range (measured: 9 ms for 40 MB). So local files are memory-mapped once as uint8 tensors in a TensorList. A
range is a slice of one of them and takes 52 us of CPU for 20 kB, as tf.io.read_file does for a file of that size.

What is not local is read by Python (common/storage), whose microseconds are negligible compared with the network's
milliseconds. Reads are started ahead (`Ahead`), so that no thread waits for each.
"""

import functools
import os
from collections.abc import Callable, Sequence

import numpy as np

from input_pipeline.sources.mapping import mapped
from input_pipeline.sources.source import Ahead
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import MAX_FILE_MB, read_file
from rankclip_jax.common.storage import ReadAhead, is_remote

_LONGEST = 4096  # bytes of a path, on Linux
_GROUP = 128  # arrays of a list that are added one by one


class Files:
    """Whole files by path, in Python: tf.io.read_file would wait at a named pipe, and it reads files of any size."""

    def __init__(self, remote: bool, max_mb: int | None = None):
        """`remote`: whether some are not local. `max_mb`: config.data.max_file_mb, of local files; None: default."""
        self._reads, self._remote, self._max_mb = ReadAhead(), remote, max_mb or MAX_FILE_MB

    def read(self, path: bytes, max_bytes: int | None = None) -> bytes:
        """The bytes of a file. Raises InputError. `max_bytes`: of a local file, instead of `max_mb`."""
        name = os.fsdecode(np.asarray(path, object).item())
        if len(name) > _LONGEST:
            why = "not a path but perhaps an image in base64, which is not read"
            raise InputError(f"{name[:40]}... ({len(name):,} letters); {why}")
        if is_remote(name):
            return self._reads.take(name)
        try:
            return read_file(name, self._max_mb * 1_000_000 if max_bytes is None else max_bytes)
        except FileNotFoundError:
            raise InputError(f"{name}; no such file") from None
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise InputError(f"{name}; {getattr(error, 'strerror', None) or error}") from None

    def ahead(self, path_of: Callable[[int], bytes]) -> Ahead | None:
        """As a Source's. `path_of`: row -> path."""

        def start(rows):
            for row in rows:
                self._reads.start(os.fsdecode(path_of(row)))

        return Ahead(start, self._reads.check) if self._remote else None


def ahead_of(paths: Sequence[str], reads: ReadAhead, start: Callable[[np.ndarray], None], far: bool) -> Ahead | None:
    """An Ahead with `start`; None if all files are local, and (not `far`) so is their index and no blocks are held."""
    return Ahead(start, reads.check) if far or any(map(is_remote, paths)) else None


def tensor_list(arrays: Sequence[np.ndarray], dtype: tf.DType, shape: list[int]) -> tf.Tensor:
    """A TensorList of arrays, without a copy of those that are mapped. `shape`: of each, -1 where it varies."""

    def listed(some):
        made = tf.raw_ops.EmptyTensorList(element_shape=shape, max_num_elements=-1, element_dtype=dtype)
        for array in some:
            # DLPack shares a mapping; tf.constant and ImmutableConst copy the file into memory.
            shared = array.base is not None and array.flags.writeable
            one = tf.experimental.dlpack.from_dlpack(array.__dlpack__()) if shared else tf.constant(array, dtype)
            made = tf.raw_ops.TensorListPushBack(input_handle=made, tensor=one)
        return made

    # Each operation copies the list: in groups, since one by one 40,000 files would take a minute.
    groups = [listed(arrays[at : at + _GROUP]) for at in range(0, len(arrays), _GROUP)] or [listed([])]
    join = functools.partial(tf.raw_ops.TensorListConcatLists, element_dtype=dtype)
    while len(groups) > 1:
        pairs = zip(groups[::2], groups[1::2], strict=False)
        groups = [join(input_a=a, input_b=b) for a, b in pairs] + (groups[-1:] if len(groups) % 2 else [])
    return groups[0]


def byte_ranges(paths: Sequence[str]) -> Callable:
    """Of local files: ops (file, int32; begin, int64; length, int64) -> string scalar. They must not shrink later."""
    files = tensor_list([mapped(path) for path in paths], tf.uint8, [-1])

    def read(file, begin, length):
        whole = tf.raw_ops.TensorListGetItem(input_handle=files, index=file, element_shape=[-1], element_dtype=tf.uint8)
        # There is no op from uint8 to string, but a serialised tensor ends with its raw bytes.
        span = tf.io.serialize_tensor(tf.slice(whole, [begin], [length]))
        return tf.strings.substr(span, tf.cast(tf.strings.length(span), tf.int64) - length, length)

    return read
