"""Where index files lie, which of them are valid, and writing new ones.

Beside the shards (`.rankclip_index`, where it can be written); in config.data.cache_dir, if that is given, or the
user's cache; of a run of many processes also in its workdir.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from input_pipeline.sources import index_file
from input_pipeline.sources.index_file import IndexFile, Shard
from rankclip_jax.common import storage
from rankclip_jax.common.cache import user_cache
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole
from rankclip_jax.common.ownership import INDEX

AT_ONCE = 64 << 20  # bytes of records: up to here an index is read whole and verified before it is used
_EVERY = 300  # seconds; what was scanned before is kept if a process is killed
_READS = 32


class Kind(NamedTuple):
    """What an index is of.

    Attributes:
      name: identifies its contents.
      members: M, byte ranges per row.
      frame: bytes around each of them.
      length_type: of the lengths in fingerprints of before.
      scan: (bytes by slices, size, path) -> Scan.
    """

    name: str
    members: int
    frame: int
    length_type: str
    scan: Callable


class Place(NamedTuple):
    """A folder of index files. Shards below `base` are named relative to it, so that they can be moved together."""

    folder: str
    base: str | None = None

    def name(self, path: str) -> str:
        """What a shard (an absolute path) is called in the files."""
        below = f"{self.base}/"
        return path[len(below) :] if self.base is not None and path.startswith(below) else path


class Entry(NamedTuple):
    """Where the records of a shard are."""

    file: IndexFile
    shard: Shard


def cache_folder(cache_dir: str | None) -> str:
    """config.data.cache_dir, or the user's cache."""
    return cache_dir or str(user_cache() / "rankclip_jax")


def places(path: str, cache_dir: str | None) -> tuple[list[Place], list[Place]]:
    """(where to look for an index; where to write one: the first that can be written). `path`: of the first shard."""
    cache, folder = Place(cache_folder(cache_dir)), storage.parent(path)
    beside = [] if storage.is_http(path) else [Place(storage.join(folder, INDEX), folder)]
    return [*beside, cache], [cache] if cache_dir else [*beside, cache]


class Found:
    """The valid entries of shards in some places, and the files in which there was none."""

    def __init__(self, kind: Kind, where: Iterable[Place]):
        self._kind = kind
        self._by_place = [(place, self._files(place)) for place in where]

    def _files(self, place: Place) -> list[IndexFile]:
        def read(item):
            try:
                return index_file.read(*item, self._kind.name, 2 * self._kind.members)
            except index_file.DAMAGED:  # built again
                return None

        with ThreadPoolExecutor(_READS) as pool:
            return [file for file in pool.map(read, _listed(place.folder, self._kind.name)) if file]

    def entries(self, paths: Sequence[str], stamps_F: Sequence[tuple[int, int]]) -> tuple[list[Entry | None], bool]:
        """(the entry of each shard with this size and time, or None; whether the records are verified)."""
        found: dict[str, Entry] = {}
        stamp_of = dict(zip(paths, stamps_F, strict=True))
        for place, files in self._by_place:
            wanted = {(place.name(path), *stamp): path for path, stamp in stamp_of.items()}
            for file in files:
                for shard in file.shards:
                    path = wanted.get((shard.name, shard.size, shard.time))
                    if path is not None:
                        found.setdefault(path, Entry(file, shard))
        used = {id(entry.file): entry.file for entry in found.values()}
        wanted = sum(shard.rows for _, shard in found.values()) * self._kind.members * 16
        verify = max(wanted, sum(file.nbytes for file in used.values())) <= AT_ONCE
        with ThreadPoolExecutor(_READS) as pool:
            ready = dict(zip(used, pool.map(functools.partial(_ready, whole=verify), used.values()), strict=True))
        valid: dict[str, Entry] = {}
        for path, (listed, shard) in found.items():
            file = ready[id(listed)]
            if file and (not verify or self._is_sound(file, shard)):
                valid[path] = Entry(file, shard)
        return [valid.get(path) for path in paths], verify

    def _is_sound(self, file: IndexFile, shard: Shard) -> bool:
        assert file.records is not None
        mine = file.records[shard.first : shard.first + shard.rows]
        return index_file.sound(mine, shard.checks, shard.size, self._kind.frame)

    def remove_replaced(self, paths: Sequence[str], entries: Sequence[Entry | None]) -> None:
        """Removes the files that describe nothing but these shards, as they were."""
        used = {entry.file.path for entry in entries if entry}
        for place, files in self._by_place:
            if place.base is None:  # others may keep their own there
                continue
            names = set(map(place.name, paths))
            for file in files:
                if file.path and file.path not in used and all(shard.name in names for shard in file.shards):
                    with contextlib.suppress(OSError, InputError):
                        storage.delete(file.path)


def _ready(file: IndexFile, whole: bool) -> IndexFile | None:
    """The file, mapped; of a bucket, if it is wanted `whole`, read. None: it went."""
    try:
        if file.records is None and whole:
            data = storage.read(str(file.path), file.begin, file.begin + file.nbytes)
            return dataclasses.replace(file, memory=np.frombuffer(data, "<i8").reshape(file.total, file.width))
        return file
    except index_file.DAMAGED:
        return None


def _listed(folder: str, kind: str) -> list[tuple[str, int]]:
    """(path, size) of the index files of a kind; none where the folder cannot be read."""
    found = []
    try:
        if storage.is_remote(folder):
            found = [(file.path, file.size) for file in storage.files_in(folder)]
        for item in () if storage.is_remote(folder) else os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):  # another run has replaced it just now
                found += [(item.path, item.stat().st_size)] if item.is_file() else []
    except (OSError, InputError):
        return []
    return sorted(item for item in found if index_file.is_named(storage.name_of(item[0]), kind))


class Writer:
    """Writes index files as their shards are scanned. `entries`: path -> Entry of what was added, after `flush`."""

    def __init__(self, kind: Kind, where: Sequence[Place]):
        """`where`: the first that can be written is used; in none of them, what is added stays in memory."""
        self.entries: dict[str, Entry] = {}
        self._kind, self._where = kind, where
        self._flushed = time.monotonic()
        self._bytes = self._kept = 0  # waiting; held in memory though they are written, since a bucket is far
        self._waiting: list[tuple[str, tuple[int, int], np.ndarray, tuple[tuple[str, int], ...]]] = []

    def add(
        self, path: str, stamp: tuple[int, int], records_RxK: np.ndarray, lost: tuple[tuple[str, int], ...]
    ) -> None:
        """`lost`: (reason, samples)."""
        self._waiting.append((path, stamp, records_RxK, lost))
        self._bytes += records_RxK.nbytes
        if self._bytes >= AT_ONCE or time.monotonic() - self._flushed >= _EVERY:
            self.flush()

    def flush(self) -> None:
        """Writes what was added since the last time."""
        waiting, self._waiting, self._bytes, self._flushed = self._waiting, [], 0, time.monotonic()
        if not waiting:
            return
        records = [np.ascontiguousarray(one, "<i8") for _, _, one, _ in waiting]
        width = 2 * self._kind.members
        firsts = np.cumsum([0, *map(len, records)]).tolist()
        for place in [*self._where, None]:
            shards = tuple(
                index_file.described(place.name(path) if place else path, stamp, one, lost)._replace(first=first)
                for first, one, (path, stamp, _, lost) in zip(firsts[:-1], records, waiting, strict=True)
            )
            path, begin = None, 0
            if place:
                head = index_file.table(self._kind.name, width, shards)
                path, begin = storage.join(place.folder, index_file.file_name(self._kind.name, head)), len(head)
                if not _written(path, [head, *records]):
                    continue
            memory = None
            if path is None or (storage.is_remote(path) and self._kept <= AT_ONCE):
                memory = np.concatenate(records)
                self._kept += memory.nbytes
            file = IndexFile(path, begin, firsts[-1], width, shards, memory)
            self.entries |= {path: Entry(file, shard) for (path, *_), shard in zip(waiting, shards, strict=True)}
            return


def _written(path, pieces):
    try:
        if storage.is_remote(path):
            storage.write(path, b"".join(bytes(piece) for piece in pieces))
            return True
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part, open(part, "wb") as out:
            for piece in pieces:
                out.write(memoryview(piece).cast("B") if len(piece) else b"")
        return True
    except (OSError, InputError):
        return False
