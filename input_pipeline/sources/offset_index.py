"""The index of a set: taken from index files, or made by scanning the shards, each process its share.

A shard with the same size and modification time (in a bucket: the same generation) counts as unchanged. Only changed
shards are scanned again.
"""

import contextlib
import hashlib
import json
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.sources.index_file import DAMAGED, fits
from input_pipeline.sources.index_places import Found, Kind, Place, Writer, cache_folder, places
from input_pipeline.sources.offsets import OffsetIndex
from input_pipeline.sources.paths import stamps
from input_pipeline.sources.source import Lost
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import INDEX
from rankclip_jax.common.progress import progress

Scanned = tuple[np.ndarray, tuple[tuple[str, int], ...]]
Bytes = Any  # gives [begin:end] of a file: mmap, memoryview or _Window
_REMOTE_WINDOW = 8 << 20  # bytes per request to a bucket; local files are memory-mapped


class Scan(NamedTuple):
    """Contents of one shard.

    Attributes:
      begin, length: integers (rows,) or (rows, M), the members of each row; -1: it has none.
      lost: each `where` is the shard.
    """

    begin: np.ndarray
    length: np.ndarray
    lost: tuple[Lost, ...] = ()


class Peers(NamedTuple):
    """The processes of a run, each of which indexes its share.

    Attributes:
      process: (the index of this one, how many there are).
      folder: that all of them share.
      all_of: an integer (0 <= value < 2^62) of each process -> those of all, in order; waits for all of them.
    """

    process: tuple[int, int]
    folder: str
    all_of: Callable[[int], list[int]]


def offset_index(
    kind: Kind, paths: Sequence[str], cache_dir: str | None = None, peers: Peers | None = None
) -> OffsetIndex:
    """Reads or makes the index of `paths`.

    Args:
      cache_dir: config.data.cache_dir.
      peers: None: this process is alone.
    """
    shards = _Shards(kind, paths, cache_dir, peers)
    if peers and peers.process[1] > 1:
        shards.exchange(peers)
    shards.scan(shards.missing())
    entries = [entry for entry in shards.entries if entry is not None]  # all of them
    return OffsetIndex(kind, paths, shards.sizes, entries, shards.records_of, shards.verified)


class Indexer:
    """Writes the index of a folder's shards as they are finished, beside them: `add` each, then `close`."""

    def __init__(self, kind: Kind, folder: str | os.PathLike, finished: Sequence[str] = ()):
        """`finished`: names of shards that are there already."""
        self._kind, self._folder = kind, str(folder) if storage.is_remote(folder) else os.path.abspath(folder)
        place = Place(storage.join(self._folder, INDEX), self._folder)
        self._writer = Writer(kind, [place])
        self._paths = [storage.join(self._folder, name) for name in finished]
        self._found = Found(kind, [place])
        self._entries, _ = self._found.entries(self._paths, stamps(self._paths))
        for name, entry in zip(finished, self._entries, strict=True):
            if entry is None:
                self.add(name)

    def add(self, name: str, found: Scanned | None = None) -> None:
        """A shard that is there now. Whether it can be read at all is for others to say. `found`: as of `scanned`."""
        path = storage.join(self._folder, name)
        self._paths.append(path)
        with contextlib.suppress(InputError):
            (stamp,) = stamps([path])
            self._writer.add(path, stamp, *(found or scanned(self._kind, path, stamp[0])))

    def close(self) -> None:
        """Writes what is left, and removes what described these shards before."""
        self._writer.flush()
        self._found.remove_replaced(self._paths, [*self._entries, *self._writer.entries.values()])


class _Shards:
    """The shards of a set, and what is known of each.

    Attributes:
      sizes: bytes.
      entries: where the records of each are, or None.
      verified: whether all records that were found were compared with their checksums.
    """

    def __init__(self, kind: Kind, paths: Sequence[str], cache_dir: str | None, peers: Peers | None):
        self._kind, self._given, self._cache_dir = kind, paths, cache_dir
        self._stamps = stamps(paths)
        self.sizes = [size for size, _ in self._stamps]
        self._paths = [path if storage.is_remote(path) else os.path.abspath(path) for path in paths]
        self._read, self._write = places(self._paths[0], cache_dir)
        if peers:
            self._read.append(Place(peers.folder))
        self._found = Found(kind, self._read)
        self.entries, self.verified = self._found.entries(self._paths, self._stamps)

    def missing(self) -> list[int]:
        return [number for number, entry in enumerate(self.entries) if entry is None]

    def records_of(self, number: int) -> np.ndarray:
        """The records of a shard, scanned."""
        return scanned(self._kind, self._given[number], self.sizes[number])[0]

    def scan(self, numbers: Sequence[int]) -> None:
        """Scans these shards and writes their index."""
        if not numbers:
            return
        writer, before = Writer(self._kind, self._write), _of_before(self._kind, self._given, self._cache_dir)

        def records(number):
            known = before.get((self._given[number], *self._stamps[number]))
            return known or scanned(self._kind, self._given[number], self.sizes[number])

        with progress("index", len(numbers), unit="files") as bar, ThreadPoolExecutor() as pool:
            for number, (found, lost) in zip(numbers, pool.map(records, numbers), strict=True):
                writer.add(self._paths[number], self._stamps[number], found, lost)
                bar.update()
        writer.flush()
        for number in numbers:
            self.entries[number] = writer.entries[self._paths[number]]
        self._found.remove_replaced(self._paths, self.entries)

    def exchange(self, peers: Peers) -> None:
        """Scans this process's share of what is missing, and learns the others'.

        What a process finds on its machine alone (a cache) others may lack. Then each passes on all of its share.
        """
        missing = self.missing()
        said = peers.all_of(2 * zlib.crc32(repr(missing).encode()) + 1 if missing else 0)
        if not any(said):
            return
        alike = len(set(said)) == 1
        index, count = peers.process
        share = (missing if alike else range(len(self._paths)))[index::count]
        self.scan([number for number in share if self.entries[number] is None])
        writer = Writer(self._kind, [Place(peers.folder)])
        for number in share:
            entry = self.entries[number]
            assert entry is not None  # scanned above
            file, shard = entry
            if file.records is not None and not (file.path and storage.is_remote(file.path)):  # a bucket is seen by all
                records = file.records[shard.first : shard.first + shard.rows]
                writer.add(self._paths[number], self._stamps[number], records, shard.lost)
        writer.flush()
        peers.all_of(0)
        self._found = Found(self._kind, self._read)
        entries, self.verified = self._found.entries(self._paths, self._stamps)
        self.entries = [new or old for new, old in zip(entries, self.entries, strict=True)]


def open_slices(path: str, size: int) -> contextlib.AbstractContextManager:
    """A context manager whose value supports [begin:end] of a file's bytes."""
    if storage.is_remote(path):
        return _Window(path, size)
    if not size:
        return memoryview(b"")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Window:
    """Slices of a file in a bucket, fetched in large requests."""

    def __init__(self, path: str, size: int):
        self._path, self._size, self._begin, self._bytes = path, size, 0, b""

    def __getitem__(self, span: slice) -> bytes:
        inside = self._begin <= span.start and span.stop <= self._begin + len(self._bytes)
        if not inside:
            end = min(max(span.start + _REMOTE_WINDOW, span.stop), self._size)
            self._begin, self._bytes = span.start, storage.read(self._path, span.start, end)
        return self._bytes[span.start - self._begin : span.stop - self._begin]

    def __enter__(self) -> "_Window":
        return self

    def __exit__(self, *_: object) -> None:
        self._bytes = b""


def local_folders(paths: Sequence[str], cache_dir: str | None) -> list[Path]:
    """Local folders for data derived from the shards, in order of preference."""
    own = Path(cache_folder(None if cache_dir and storage.is_remote(cache_dir) else cache_dir))
    beside = [] if storage.is_remote(paths[0]) else [Path(paths[0]).parent / INDEX]
    return [own] if cache_dir else [*beside, own]


def scanned(kind: Kind, path: str, size: int) -> Scanned:
    """(the records of a shard, int64 (rows, 2 M); (reason, samples) of what is lost)"""
    with open_slices(path, size) as data:
        begin, length, lost = kind.scan(data, size, path)
    records = np.concatenate([one.reshape(-1, kind.members) for one in (begin, length)], axis=1, dtype=np.int64)
    return records, tuple((one.reason, one.samples) for one in lost)


def _of_before(kind, paths, cache_dir):
    """(path, size, time) -> as `scanned`, of an index of an earlier version; empty if none can be read."""
    name = hashlib.sha256("\n".join([kind.name, *paths]).encode()).hexdigest()[:20] + ".npz"
    for folder in local_folders(paths, cache_dir):
        try:
            with np.load(folder / name, allow_pickle=False) as stored:
                meta = json.loads(stored["meta"].tobytes())
                columns = [stored[key].reshape(-1, kind.members) for key in ("begin", "length")]
            records = np.concatenate(columns, axis=1, dtype=np.int64)
            if len(records) != sum(rows for *_, rows in meta["files"]):
                continue
            known, start = {}, 0
            for path, size, time, rows in meta["files"]:
                lost = tuple((str(one["reason"]), int(one["samples"])) for one in meta["lost"] if one["where"] == path)
                if fits(records[start : start + rows], size, kind.frame):
                    known[path, size, time] = records[start : start + rows], lost
                start += rows
            return known
        except (*DAMAGED, EOFError, zipfile.BadZipFile):
            continue
    return {}
