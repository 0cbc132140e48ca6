"""Many strings in one buffer: a path takes its length plus eight bytes, instead of a Python object."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import tensorflow as tf


class PackedStrings:
    """Strings (N,) by number, as TensorFlow ops (`at`) or str."""

    def __init__(self, strings: pa.ChunkedArray | pa.Array | list[bytes]):
        """`strings`: a pyarrow array (any binary or string type; null becomes empty), or a list."""
        array = (
            strings.combine_chunks() if isinstance(strings, pa.ChunkedArray) else pa.array(strings, pa.large_binary())
        )
        array = array.cast(pa.large_binary()).fill_null(b"")
        _, offsets, blob = array.buffers()
        self._offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        self._blob = tf.constant(blob.to_pybytes() if blob else b"")
        self._offsets_in_graph = tf.constant(self._offsets)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def at(self, row: tf.Tensor) -> tf.Tensor:
        """String number `row` (int64 scalar), as TensorFlow ops."""
        begin, end = self._offsets_in_graph[row], self._offsets_in_graph[row + 1]
        return tf.strings.substr(self._blob, begin, end - begin)

    def __getitem__(self, row: int) -> str:
        return self.at(tf.constant(row, tf.int64)).numpy().decode(errors="replace")

    def __iter__(self) -> Iterator[str]:
        blob = memoryview(self._blob.numpy())
        for begin, end in zip(self._offsets, self._offsets[1:], strict=False):
            yield str(blob[begin:end], "utf-8", "replace")
