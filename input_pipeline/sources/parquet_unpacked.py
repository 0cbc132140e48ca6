"""Parquet files unpacked once into tars, which the graph reads by row (tar.py).

The tars are next to the data, or in config.data.cache_dir, and take as much space as the images.
"""

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

from tqdm import tqdm

from input_pipeline.sources.offset_index import local_folders
from input_pipeline.sources.parquet_columns import Columns, caption_of, image_of
from input_pipeline.sources.paths import stamps
from input_pipeline.sources.row_groups import opened
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole
from rankclip_jax.common.progress import progress

_ROWS = 256  # rows unpacked at a time


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
        if all((folder / name).exists() for name in names):
            return [str(folder / name) for name in names]
    folder = next((folder for folder in folders if _writable(folder)), None)
    if folder is None:
        raise InputError(f"{files[0]} must be unpacked, but {folders[0]} is not writable; set config.data.cache_dir")
    missing = [i for i, name in enumerate(names) if not (folder / name).exists()]
    rows = needed = 0
    for i in missing:
        with opened(files[i]) as parquet:
            rows += parquet.metadata.num_rows
            for group in map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups)):
                needed += sum(group.column(c).total_uncompressed_size for c in range(group.num_columns))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"unpacking {files[0]} and the others takes {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB "
            "free; set config.data.cache_dir to a larger disk"
        )
    print(f"unpacking {len(missing):,} Parquet files, {needed / 1e9:.3g} GB, once, into {folder}", flush=True)
    with progress("unpack Parquet", rows, unit="rows") as bar:
        for i in missing:
            _unpack(files[i], columns[i], folder / names[i], bar)
    return [str(folder / name) for name in names]


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
