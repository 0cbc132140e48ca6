"""Parquet files unpacked once into tars, which the graph reads by row (tar.py).

The tars are next to the data, or in config.data.cache_dir, and take as much space as the images. Processes that need
the same tars, of one run or of several, divide the work by locks, which need no agreement: some have another disk.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from input_pipeline.sources.offset_index import local_folders
from input_pipeline.sources.parquet_columns import Columns, caption_of, image_of
from input_pipeline.sources.paths import stamps
from input_pipeline.sources.row_groups import opened
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole
from rankclip_jax.common.progress import progress

_ROWS = 256  # rows unpacked at a time
_LEFT = re.compile(r"\.([0-9a-f]{20}\.tar)\.[0-9a-f]{16}\.part")  # what a kill leaves (common/files.py)
_STALE = 600  # seconds without a write; a file system without locks does not tell who is still at work
_LOCKS = ".unpacking"  # beside the tars; each has a byte of it


def _cache_key(columns: Columns) -> tuple:
    """Never changes, so that existing tars are found."""
    key = (columns.image + columns.image_kind, columns.caption)
    return (*key, columns.inside, columns.several) if columns.several else key


def unpacked(files: list[str], columns: list[Columns], cache_dir: str | None) -> list[str]:
    """Paths of the tars; missing ones are written.

    Raises:
      InputError: no folder can be written, or the disk is too small.
    """
    folders = local_folders(files, cache_dir)
    names = [
        hashlib.sha256(repr((file, stamp, _cache_key(one))).encode()).hexdigest()[:20] + ".tar"
        for file, stamp, one in zip(files, stamps(files), columns, strict=True)
    ]
    for folder in folders:
        _remove_left(folder, set(names))
        if all((folder / name).exists() for name in names):
            return [str(folder / name) for name in names]
    folder = next((folder for folder in folders if _writable(folder)), None)
    if folder is None:
        raise InputError(f"{files[0]} must be unpacked, but {folders[0]} is not writable; set config.data.cache_dir")
    missing = [i for i, name in enumerate(names) if not (folder / name).exists()]
    rows, needed = {}, 0
    for i in missing:
        with opened(files[i]) as parquet:
            rows[i] = parquet.metadata.num_rows
            for group in map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups)):
                needed += sum(group.column(c).total_uncompressed_size for c in range(group.num_columns))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"unpacking {files[0]} and the others takes {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB "
            "free; set config.data.cache_dir to a larger disk"
        )
    print(f"unpacking {len(missing):,} Parquet files, {needed / 1e9:.3g} GB, once, into {folder}", flush=True)
    with progress("unpack Parquet", sum(rows.values()), unit="rows") as bar, _locks(folder / _LOCKS) as locks:
        for wait in (False, True):  # last what others are at, who may not come to its end
            for i in list(rows):
                with _turn(locks, names[i], wait) as ours:
                    if ours:
                        count, target = rows.pop(i), folder / names[i]
                        if target.exists():  # by another
                            bar.update(count)
                        else:
                            _unpack(files[i], columns[i], target, bar)
    return [str(folder / name) for name in names]


def _remove_left(folder: Path, names: set[str]) -> None:
    """Removes what killed processes left of these tars."""
    with contextlib.suppress(OSError):  # no such folder, or another's
        for entry in list(os.scandir(folder)):
            part = _LEFT.fullmatch(entry.name)
            if part and part[1] in names and time.time() - entry.stat().st_mtime > _STALE:
                os.unlink(entry)


def _locks(path: Path) -> BinaryIO:
    try:
        return open(path, "ab")
    except PermissionError:  # of another user: without locks
        return open(path, "rb")


@contextlib.contextmanager
def _turn(locks: BinaryIO, name: str, wait: bool) -> Iterator[bool]:
    """Whether it is this process's turn to unpack a tar, until the end of the block; always with `wait`."""
    import fcntl  # Windows has none

    place = int(name[:8], 16)
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
    except (BlockingIOError, PermissionError):  # a system may say either; some have no locks, and say the second
        yield wait
        return
    except OSError:  # a file system without locks: each process unpacks what is missing at its turn
        yield True
        return
    try:
        yield True
    finally:
        fcntl.lockf(locks, fcntl.LOCK_UN, 1, place)


def _unpack(file: str, columns: Columns, target: Path, bar: tqdm) -> None:
    names = [columns.image, *([columns.caption] if columns.caption else [])]
    with whole(target) as part, opened(file) as parquet, tarfile.open(part, "w") as tar:
        row = 0
        groups = range(parquet.num_row_groups)  # one at a time, since prefetched groups stay in memory to the end
        for batch in (one for group in groups for one in parquet.iter_batches(_ROWS, [group], names)):
            images = batch.column(names[0]).to_pylist()
            captions = batch.column(columns.caption).to_pylist() if columns.caption else [None] * len(images)
            for image, caption in zip(images, captions, strict=True):
                for ending, data in (image_of(image), caption_of(caption, columns)):
                    member = tarfile.TarInfo(f"{row:09}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                row += 1
            bar.update(len(images))


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False
