"""Parquet files as they are: a row group is read in one request, decoded once, and its rows are taken from memory.

The rows are those of unpacked files: some of the strings image, path, caption, captions, empty where there is none.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from input_pipeline.graph import all_from_python
from input_pipeline.sources.paths import stamps
from input_pipeline.sources.shard_blocks import largest
from input_pipeline.sources.source import Ahead, Blocks, Reading
from input_pipeline.sources.together import Together, given_or_alone, row_by_row
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError, one_line

_TEXTS = ("caption", "captions")
_ALL = ("image", "path", *_TEXTS)
_RECENT_ROWS = 1024  # kept of what is read beside the blocks: one after the other, for captions and validation


class DamagedError(InputError):
    """What cannot be decoded: trying again does not help."""


class File(NamedTuple):
    """A file, and how the strings of a row are made.

    Attributes:
      columns: name of such a string -> the column.
      strings: of the values of a column -> (name, bytes).
    """

    path: str
    size: int
    metadata: pq.FileMetaData
    columns: Mapping[str, str]
    strings: Mapping[str, Callable[[Any], tuple[str, bytes]]]


@contextlib.contextmanager
def opened(path: str, size: int | None = None, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """The open file, of which the whole is never in memory. What is known of it, in bytes and metadata, is not asked.

    Raises:
      DamagedError: it is no Parquet, also where that shows only as it is read.
    """
    try:
        if storage.is_remote(path):
            file = pa.PythonFile(storage.RemoteFile(path, size or stamps([path])[0][0]))
            with pq.ParquetFile(file, metadata=metadata, pre_buffer=True) as parquet:
                yield parquet
        else:
            with pq.ParquetFile(path, metadata=metadata) as parquet:
                yield parquet
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the system, not from Parquet's decoder
        raise DamagedError(f"{path} cannot be read as Parquet: {one_line(error)}") from None


class RowGroups:
    """The rows of files by number, and their G groups as blocks.

    Attributes:
      size: rows.
      starts_F: int64, the first row of each file.
      blocks, together: as a Source's.
      pictures: Reading of all strings, also of what `together` gave; `texts`: of caption and captions alone.
    """

    def __init__(self, files: Sequence[File], spec: Mapping[str, Any]):
        """`spec`: config.data.

        Raises:
          InputError: a group is too large for a window.
        """
        rows_F = [file.metadata.num_rows for file in files]
        self.size, self.starts_F = sum(rows_F), np.cumsum([0, *rows_F[:-1]], dtype=np.int64)
        groups = [(file, g) for file in files for g in range(file.metadata.num_row_groups)]
        groups = [(file, g) for file, g in groups if file.metadata.row_group(g).num_rows]
        self._rows_G = np.array([file.metadata.row_group(g).num_rows for file, g in groups], np.int64)
        first_G = np.cumsum(self._rows_G) - self._rows_G
        # A tokenizer is trained on a few rows of each of many groups, whose captions are small.
        pictures, texts = _Groups(groups, first_G, _ALL, spare=4), _Groups(groups, first_G, _TEXTS, spare=64)
        size = sum(_checked_size(file, g, spec) for file, g in groups)
        self.blocks = Blocks(first_G, self._rows_G, size, pictures.held.hold, pictures.held.drop)
        self.pictures, self.texts, self.together = pictures.reading(), texts.reading(), pictures.together()

    def arrays(self) -> list[np.ndarray]:
        """For a Source's index."""
        return [self.starts_F, self._rows_G]


def _checked_size(file, g, spec):
    group = file.metadata.row_group(g)
    chunks = [group.column(c) for c in range(group.num_columns)]
    wanted = set(file.columns.values())
    inside = [c for c in chunks if c.path_in_schema in wanted or c.path_in_schema.partition(".")[0] in wanted]
    size = sum(chunk.total_uncompressed_size for chunk in inside)
    if size > largest(spec):
        raise InputError(
            f"{file.path}: row group {g} takes {size / 2**20:,.1f} MiB, more than a sixteenth of "
            f"config.data.window_mb={spec['window_mb']}. Make shards: python -m input_pipeline.prepare {file.path} "
            "OUT_DIR; or give a larger window, or config.data.shuffle=rows, which unpacks it"
        )
    return size


class _Groups:
    """Row groups of some files, `held` as tables of the columns that some strings are made of."""

    def __init__(self, groups: Sequence[tuple[File, int]], first_G: np.ndarray, names: Sequence[str], spare: int):
        """`spare`: groups that are kept in any case, once they were read."""
        self._groups, self._first_G, self._names = groups, first_G, names
        self.held, self._failed = storage.Held(self._table), None
        self._recent, self._lock = OrderedDict[int, None](), threading.Lock()
        self._most = spare + _RECENT_ROWS * len(groups) // max(int(first_G.max(initial=0)), 1)

    def reading(self) -> Reading:
        def by_name(strings):
            return dict(zip(self._names, strings, strict=True))

        def alone(row):
            return by_name(all_from_python(self._row, [()] * len(self._names), row))

        def read(row, given=None):
            return given_or_alone(
                given, lambda given_K: by_name(tf.unstack(given_K, len(self._names))), lambda: alone(row)
            )

        return Reading(read, Ahead(self._start, self._check))

    def together(self) -> Together:
        return row_by_row(len(self._names), self._row)

    def _table(self, group):
        file, g = self._groups[group]
        columns = [file.columns[name] for name in self._names if name in file.columns]
        try:
            with opened(file.path, file.size, file.metadata) as parquet:
                return parquet.read_row_group(g, columns=list(dict.fromkeys(columns)))
        except OSError as error:
            raise DamagedError(f"{file.path} cannot be read: {error.strerror}") from None

    def _group_of(self, row):
        return int(np.searchsorted(self._first_G, row, side="right")) - 1

    def _row(self, row):
        self._check()
        group, found = self._group_of(row), dict.fromkeys(self._names, b"")
        try:
            while (table := self.held.get(group)) is None:
                self._start([row])
            file, i = self._groups[group][0], int(row - self._first_G[group])
            columns = zip(table.column_names, table.columns, strict=True)
            found |= dict(file.strings[name](column[i].as_py()) for name, column in columns)
        except UnicodeDecodeError:
            raise InputError("the text is not UTF-8") from None
        except InputError as error:
            if not isinstance(error, storage.MissingError | DamagedError):
                self._failed = error
            raise
        return [found[name] for name in self._names]

    def _start(self, rows):
        for group in dict.fromkeys(self._group_of(row) for row in rows):
            with self._lock:
                self._recent[group] = None
                self._recent.move_to_end(group)
                self.held.hold(group, "recent")
                if len(self._recent) > self._most:
                    self.held.drop(self._recent.popitem(last=False)[0], "recent")

    def _check(self):
        if self._failed:
            raise self._failed
