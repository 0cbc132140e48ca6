"""Many strings in one buffer: a path takes its length plus eight bytes, instead of a Python object."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa


class PackedStrings:
    """Strings (N,) by number, as bytes (`at`) or str."""

    def __init__(self, strings: pa.ChunkedArray | pa.Array | list[bytes]):
        """`strings`: a pyarrow array (any binary or string type; null becomes empty), or a list."""
        array = pa.array(strings, pa.large_binary()) if isinstance(strings, list) else _whole(strings)
        array = array.cast(pa.large_binary()).fill_null(b"")
        _, offsets, blob = array.buffers()
        self._offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        self._blob = memoryview(blob or b"")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def at(self, row: int) -> bytes:
        """String number `row`."""
        return self._blob[self._offsets[row] : self._offsets[row + 1]].tobytes()

    def __getitem__(self, row: int) -> str:
        return self.at(row).decode(errors="replace")

    def buffers(self) -> list[np.ndarray]:
        """[offsets of the strings, int64; their bytes, uint8]: equal for equal strings."""
        bytes_ = np.frombuffer(self._blob, np.uint8)
        return [self._offsets - self._offsets[0], bytes_[self._offsets[0] : self._offsets[-1]]]

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


class PackedLists:
    """Lists of strings (N,) by number, as bytes (`at`). Iteration yields all strings, one by one."""

    def __init__(self, lists: pa.ChunkedArray):
        """`lists`: a pyarrow array of large_list, without null."""
        array = _whole(lists)
        self._strings, self._offsets = PackedStrings(array.flatten()), array.offsets.to_numpy()
        self._offsets = self._offsets - self._offsets[0]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def at(self, row: int) -> list[bytes]:
        """The strings of list number `row`."""
        return [self._strings.at(number) for number in range(self._offsets[row], self._offsets[row + 1])]

    def buffers(self) -> list[np.ndarray]:
        """The offsets of the lists, then as PackedStrings.buffers."""
        return [self._offsets, *self._strings.buffers()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._strings)


def _whole(array):
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
