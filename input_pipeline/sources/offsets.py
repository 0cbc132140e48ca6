"""The rows of all shards of a set: which shard, where in it. Looked up, never held whole.

Index files on a disk are mapped, also into the graph; those in a bucket are read in chunks, when they are needed. What
was not verified on opening is verified on its first use: a shard whose records are damaged is scanned again.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from input_pipeline.graph import from_python
from input_pipeline.sources import index_file
from input_pipeline.sources.byte_ranges import tensor_list
from input_pipeline.sources.index_file import CHUNK
from input_pipeline.sources.index_places import Entry, Kind
from input_pipeline.sources.source import Lost
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.storage import MissingError, ReadAhead

_HELD = 256 << 20  # bytes of chunks of an index in a bucket


class OffsetIndex:
    """Samples of all shards, in order.

    Attributes:
      paths: the F shards.
      sizes: of each shard, bytes.
      starts: int64 (F,), the first row of each shard.
      size: number of rows.
      lost: unreachable samples.
      reads: of the shards and, where it is far, of the index.
      far: whether the index is in a bucket, and too large to be held.
    """

    def __init__(
        self,
        kind: Kind,
        paths: Sequence[str],
        sizes: Sequence[int],
        entries: Sequence[Entry],
        again: Callable[[int], np.ndarray],
        verified: bool,
    ):
        """`again`: number of a shard -> its records, scanned. `verified`: whether all records were compared."""
        self.paths, self.sizes = list(paths), list(sizes)
        ends_F = np.cumsum([0, *(entry.shard.rows for entry in entries)], dtype=np.int64)
        self.starts, self.size = ends_F[:-1], int(ends_F[-1])
        self.lost = [Lost(path, *one) for path, entry in zip(paths, entries, strict=True) for one in entry.shard.lost]
        self._kind, self._entries, self._again = kind, entries, again
        self._known_F = np.full(len(paths), verified)
        self._in_graph = None if verified else tf.Variable(self._known_F)
        self._lock = threading.Lock()
        self._chunks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._scanned: dict[int, np.ndarray] = {}  # of files in a bucket that proved damaged
        self.reads = ReadAhead()
        files = {id(entry.file): entry.file for entry in entries}
        mapped = [file.records for file in files.values() if file.records is not None]
        self.far = len(mapped) < len(files)
        if not self.far:
            numbers = {key: number for number, key in enumerate(files)}
            self._lists = tensor_list(mapped, tf.int64, [-1, 2 * kind.members])
            self._file_F = tf.constant([numbers[id(entry.file)] for entry in entries], tf.int32)
            self._first_F = tf.constant([entry.shard.first for entry in entries], tf.int64)
        self._starts = tf.constant(self.starts)

    def file_of(self, row: int) -> int:
        """The index of the shard with this row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def file_in_graph(self, row: tf.Tensor) -> tf.Tensor:
        """`file_of` as TensorFlow ops, int32."""
        return tf.searchsorted(self._starts, [row], side="right")[0] - 1

    def some_row_has(self, members: Iterable[int]) -> bool:
        """Whether a row has all of these members."""
        wanted, kinds = sum(1 << member for member in members), 0
        for entry in self._entries:
            kinds |= entry.shard.kinds
        return any(kinds >> pattern & 1 and pattern & wanted == wanted for pattern in range(1 << self._kind.members))

    def of_shard(self, file: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows begin to end of a shard: int64 (rows, 2 M), the first bytes and the lengths of its members, -1: none.

        Raises:
          InputError: its index is damaged, and the shard has other rows than when it was indexed.
        """
        rows = self._entries[file].shard.rows
        return self.of_rows(self.starts[file] + np.arange(begin, rows if end is None else min(end, rows)))[1]

    def of_rows(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(int64 (n,), the shard of each row; int64 (n, 2 M), as of_shard). Raises as of_shard."""
        rows = np.asarray(rows, np.int64).reshape(-1)
        file_N = np.searchsorted(self.starts, rows, side="right") - 1
        own_N = rows - self.starts[file_N]
        if self.far:
            for chunk in dict.fromkeys(zip(file_N.tolist(), (own_N // CHUNK).tolist(), strict=True)):
                self._start(*chunk)
        records_NxK = np.empty((len(rows), 2 * self._kind.members), np.int64)
        for file in np.unique(file_N).tolist():
            mine_N = file_N == file
            records, own = self._whole(file), own_N[mine_N]
            if records is None:
                records_NxK[mine_N] = [self._chunk(file, row // CHUNK)[row % CHUNK] for row in own.tolist()]
            else:
                records_NxK[mine_N] = records[own]
        return file_N, records_NxK

    def in_graph(self, row: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Ops, int64 scalar -> (the row's shard, int32; first bytes, int64 (M,); lengths, int64 (M,))."""
        row, members = tf.cast(row, tf.int64), self._kind.members
        file = self.file_in_graph(row)
        if not self.far:
            with tf.control_dependencies(self._checked_in_graph(file)):
                records = tf.raw_ops.TensorListGetItem(
                    input_handle=self._lists,
                    index=self._file_F[file],
                    element_shape=[-1, 2 * members],
                    element_dtype=tf.int64,
                )
            record = records[self._first_F[file] + row - self._starts[file]]
        else:
            text = from_python(lambda row: self.of_rows([row])[1].tobytes(), row)
            record = tf.ensure_shape(tf.io.decode_raw(text, tf.int64), [2 * members])
        return file, record[:members], record[members:]

    def _checked_in_graph(self, file):
        if self._in_graph is None:
            return []

        def check(file):
            self._whole(int(file))
            self._in_graph.scatter_update(tf.IndexedSlices(tf.constant([True]), [int(file)]))
            return b""

        known = self._in_graph.sparse_read([file])[0]
        return [tf.cond(known, lambda: tf.constant(b""), lambda: from_python(check, file))]

    def _whole(self, file: int) -> np.ndarray | None:
        """All records of a shard, verified; None: they are in a bucket."""
        source, shard = self._entries[file]
        if source.records is None:
            return self._scanned.get(file)
        records = source.records[shard.first : shard.first + shard.rows]
        if not self._known_F[file]:
            with self._lock:
                if not self._is_sound(file, records, shard.checks):
                    records[:] = self._anew(file)  # private: the file stays as it is
                self._known_F[file] = True
        return records

    def _start(self, file: int, number: int) -> None:
        remote = self._entries[file].file.records is None and file not in self._scanned
        if remote and (file, number) not in self._chunks:
            self.reads.start(*self._span(file, number))

    def _span(self, file: int, number: int) -> tuple[str, int, int]:
        source, shard = self._entries[file]
        first, end = number * CHUNK, min((number + 1) * CHUNK, shard.rows)
        begin = source.begin + (shard.first + first) * source.width * 8
        assert source.path is not None
        return source.path, begin, begin + (end - first) * source.width * 8

    def _chunk(self, file: int, number: int) -> np.ndarray:
        with self._lock:
            held = self._chunks.get((file, number))
            if held is not None:
                self._chunks.move_to_end((file, number))
                return held
        try:
            data = self.reads.take(*self._span(file, number))
        except MissingError:
            data = b""
        records = np.frombuffer(data, "<i8").reshape(-1, 2 * self._kind.members)
        if not self._is_sound(file, records, self._entries[file].shard.checks[number : number + 1]):
            with self._lock:
                if file not in self._scanned:
                    self._scanned[file] = self._anew(file)
            return self._scanned[file][number * CHUNK : (number + 1) * CHUNK]
        with self._lock:
            self._chunks[file, number] = records
            while len(self._chunks) * CHUNK * 16 * self._kind.members > _HELD:
                self._chunks.popitem(last=False)
        return records

    def _is_sound(self, file, records, checks):
        return index_file.sound(records, checks, self.sizes[file], self._kind.frame)

    def _anew(self, file: int) -> np.ndarray:
        source, shard = self._entries[file]
        records = self._again(file)
        if len(records) != shard.rows:
            raise InputError(
                f"{source.path} says that {self.paths[file]} has {shard.rows:,} rows, and it has {len(records):,}: "
                "delete that index, and start again"
            )
        return records

    # What identifies the rows

    def arrays(self) -> list[Any]:
        """The offsets, without the names of the shards: as fingerprints of before hash them (fingerprint.py)."""
        members, lengths = self._kind.members, np.dtype(self._kind.length_type)

        def pieces(columns: slice, dtype: np.dtype) -> Iterator[np.ndarray]:
            for file in range(len(self.paths)):
                yield np.ascontiguousarray(self.of_shard(file)[:, columns], dtype)

        begins = self.size * members * 8, pieces(slice(members), np.dtype("<i8"))
        return [self.starts, begins, (self.size * members * lengths.itemsize, pieces(slice(members, None), lengths))]

    def digest(self) -> list[np.ndarray]:
        """The same, by the checksums of the index."""
        checks = [entry.shard.checks for entry in self._entries]
        return [self.starts, np.concatenate([np.zeros(0, "<u4"), *checks]).astype("<u4")]
