"""Many strings in one buffer: a path takes its length plus eight bytes, instead of a Python object."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import tensorflow as tf


class PackedStrings:
    """Strings (N,) by number, as TensorFlow ops (`at`) or str."""

    def __init__(self, strings: pa.ChunkedArray | pa.Array | list[bytes]):
        """`strings`: a pyarrow array (any binary or string type; null becomes empty), or a list."""
        array = pa.array(strings, pa.large_binary()) if isinstance(strings, list) else _whole(strings)
        array = array.cast(pa.large_binary()).fill_null(b"")
        _, offsets, blob = array.buffers()
        self._offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        self._blob = tf.constant(blob.to_pybytes() if blob else b"")
        self._offsets_in_graph = tf.constant(self._offsets)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def at(self, row: tf.Tensor) -> tf.Tensor:
        """String number `row` (int64 scalar), as TensorFlow ops."""
        begin, end = tf.unstack(tf.slice(self._offsets_in_graph, [row], [2]))
        return tf.strings.substr(self._blob, begin, end - begin)

    def __getitem__(self, row: int) -> str:
        return self.at(tf.constant(row, tf.int64)).numpy().decode(errors="replace")

    def buffers(self) -> list[np.ndarray]:
        """[offsets of the strings, int64; their bytes, uint8]: equal for equal strings."""
        bytes_ = np.frombuffer(self._blob.numpy(), np.uint8)
        return [self._offsets - self._offsets[0], bytes_[self._offsets[0] : self._offsets[-1]]]

    def __iter__(self) -> Iterator[str]:
        blob = memoryview(self._blob.numpy())
        for begin, end in zip(self._offsets, self._offsets[1:], strict=False):
            yield str(blob[begin:end], "utf-8", "replace")


class PackedLists:
    """Lists of strings (N,) by number, as TensorFlow ops. Iteration yields all strings, one by one."""

    def __init__(self, lists: pa.ChunkedArray):
        """`lists`: a pyarrow array of large_list, without null."""
        array = _whole(lists)
        self._strings, self._offsets = PackedStrings(array.flatten()), tf.constant(array.offsets.to_numpy())
        self._offsets -= self._offsets[0]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def at(self, row: tf.Tensor) -> tf.Tensor:
        """The strings of list number `row` (int64 scalar), string (n,), as TensorFlow ops."""
        rows = tf.range(self._offsets[row], self._offsets[row + 1])
        return tf.map_fn(self._strings.at, rows, fn_output_signature=tf.string)

    def buffers(self) -> list[np.ndarray]:
        """The offsets of the lists, then as PackedStrings.buffers."""
        return [self._offsets.numpy(), *self._strings.buffers()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._strings)


def _whole(array):
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
