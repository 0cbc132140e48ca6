"""The offset of each sample in its shard: found once by scanning the shards, then cached in a file next to them.

The index of a set is one .npz in `.rankclip_index` of the first shard's folder. If that is not writable, and for
buckets, it is in the user's cache folder. A shard with the same size and modification time counts as unchanged. Only
changed shards are scanned again.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from input_pipeline.sources.paths import stamps
from input_pipeline.sources.source import Lost
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole
from rankclip_jax.common.progress import progress

Bytes = Any  # gives [begin:end] of a file: mmap, memoryview or _Window
_REMOTE_WINDOW = 8 << 20  # bytes per request to a bucket; local files are memory-mapped


@dataclasses.dataclass(frozen=True)
class Scan:
    """Contents of one shard. `columns`: arrays with one item per sample; `lost`: each `where` is the shard."""

    columns: dict[str, np.ndarray]
    lost: tuple[Lost, ...] = ()


@dataclasses.dataclass(frozen=True)
class OffsetIndex:
    """Samples of all shards, in order.

    Attributes:
      paths: the F shards.
      sizes: of each shard, bytes.
      starts: int64 (F,), the first row of each shard.
      columns: arrays (rows, ...), as in `Scan`.
      lost: unreachable samples.
    """

    paths: list[str]
    sizes: list[int]
    starts: np.ndarray
    columns: dict[str, np.ndarray]
    lost: list[Lost]

    @property
    def size(self) -> int:
        return len(next(iter(self.columns.values())))

    def arrays(self) -> list[np.ndarray]:
        """The offsets, without the names of the shards."""
        return [self.starts, *self.columns.values()]

    def file_of(self, row: int) -> int:
        """The index of the shard with this row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def file_in_graph(self, row: tf.Tensor) -> tf.Tensor:
        """`file_of` as TensorFlow ops, int32."""
        return tf.searchsorted(self.starts, [row], side="right")[0] - 1


def offset_index(kind: str, paths: Sequence[str], scan: Callable, cache_dir: str | None = None) -> OffsetIndex:
    """Reads or builds the index of `paths`.

    Args:
      kind: identifies the content of the index; part of the file name.
      scan: (bytes by slices, size, path) -> Scan.
      cache_dir: folder for the index, instead of the defaults.
    """
    stamps_F = stamps(paths)
    name = hashlib.sha256("\n".join([kind, *paths]).encode()).hexdigest()[:20] + ".npz"
    known = _load(name, paths, cache_dir)
    scans = [known.get((path, *stamp)) for path, stamp in zip(paths, stamps_F, strict=True)]
    new = [i for i, one in enumerate(scans) if one is None]
    if new:

        def scan_shard(i):
            with open_slices(paths[i], stamps_F[i][0]) as data:
                return scan(data, stamps_F[i][0], paths[i])

        with progress("index", len(new), unit="files") as bar, ThreadPoolExecutor() as pool:
            for i, result in zip(new, pool.map(scan_shard, new), strict=True):
                scans[i] = result
                bar.update()
    index = OffsetIndex(
        list(paths),
        [size for size, _ in stamps_F],
        np.cumsum([0] + [_rows(one) for one in scans[:-1]], dtype=np.int64),
        {key: np.concatenate([one.columns[key] for one in scans]) for key in scans[0].columns},
        [lost for one in scans for lost in one.lost],
    )
    if new:
        files = [[p, *s, _rows(one)] for p, s, one in zip(paths, stamps_F, scans, strict=True)]
        _store(name, index, files, cache_dir)
    return index


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


def _rows(scan):
    return len(next(iter(scan.columns.values())))


def cache_folders(paths: Sequence[str], cache_dir: str | None) -> list[Path]:
    """Folders for data derived from the shards, in order of preference."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankclip_jax"
    beside = [] if storage.is_remote(paths[0]) else [Path(paths[0]).parent / ".rankclip_index"]
    return [Path(cache_dir)] if cache_dir else [*beside, home]


def _load(name, paths, cache_dir):
    """(path, size, time) -> Scan of the cached index; empty if there is none, or it is unreadable."""
    for folder in cache_folders(paths, cache_dir):
        try:
            with np.load(folder / name, allow_pickle=False) as stored:
                columns = {key: stored[key] for key in stored.files if key != "meta"}
                meta = json.loads(stored["meta"].tobytes())
            lost = [Lost(**one) for one in meta["lost"]]
            known, start = {}, 0
            for path, size, time, rows in meta["files"]:
                part = {key: column[start : start + rows] for key, column in columns.items()}
                known[path, size, time] = Scan(part, tuple(one for one in lost if one.where == path))
                start += rows
            return known
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            continue
    return {}


def _store(name, index, files, cache_dir):
    meta = json.dumps(dict(files=files, lost=[dataclasses.asdict(one) for one in index.lost])).encode()
    for folder in cache_folders(index.paths, cache_dir):
        # Several processes may do this at once: each writes its own file, and the last rename wins.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole(folder / name) as part, open(part, "wb") as out:
                np.savez(out, meta=np.frombuffer(meta, np.uint8), **index.columns)
            return
        except (OSError, InputError):
            continue
    # No writable folder: the next start builds it again.
