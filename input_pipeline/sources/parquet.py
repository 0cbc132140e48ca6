"""Parquet files with a column of encoded images and a column of captions.

Parquet compresses hundreds of rows together, so reading one row costs as much as its whole group. So every file is
unpacked once into a tar, which the graph reads by row (tar.py). The tars are next to the data, or in
config.data.cache_dir, and take as much space as the images.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf
from ml_collections import ConfigDict
from tqdm import tqdm

from input_pipeline.sources.offset_index import cache_folders
from input_pipeline.sources.paths import expand, is_remote, stamps
from input_pipeline.sources.source import Source, keys, read_captions
from input_pipeline.sources.tar import open_members
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import whole
from rankclip_jax.common.progress import progress

_ROWS = 256  # rows unpacked at a time


def open_parquet(spec: ConfigDict, path: str | Sequence[str]) -> Source:
    """Opens files. An image is bytes, or a struct with a field `bytes`, as written by Hugging Face's datasets.

    `spec`: image_key, caption_key, hint, cache_dir of config.data.

    Raises:
      InputError: no such file or column, a column of another type, no rows, or not enough disk space to unpack.
    """
    files = expand(path, endings=(".parquet",), hint=spec.get("hint"))
    columns = [
        _columns(file, keys(spec.get("image_key"), ("image", "jpg")), keys(spec.get("caption_key"), ("caption", "txt")))
        for file in files
    ]
    cache_dir = spec.get("cache_dir")
    tars = _unpacked(files, columns, cache_dir)
    members = open_members(tars, {"image": ("image",), "caption": ("caption",)}, cache_dir)

    def where(row):
        file = members.index.file_of(row)
        return f"{files[file]} row {row - members.index.starts[file]}"

    size = members.index.size
    return Source(size, members.read, where, lambda: read_captions(members.read, size))


def _columns(file: str, image_keys: tuple[str, ...], caption_keys: tuple[str, ...]) -> tuple[str, str]:
    """Names of the image column (with .bytes for a struct) and the caption column."""
    with _opened(file) as parquet:
        schema = parquet.schema_arrow
    found = []
    for wanted in (image_keys, caption_keys):
        name = next((key for key in wanted if key in schema.names), None)
        if name is None:
            raise InputError(f"{file} has no column {' or '.join(wanted)}; its columns are: {', '.join(schema.names)}")
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            name, kind = f"{name}.bytes", kind.field("bytes").type
        if kind not in (pa.binary(), pa.large_binary(), pa.string(), pa.large_string()):
            raise InputError(
                f"{file}: column {name} has type {kind}. Expected bytes or strings, or a struct with bytes"
            )
        found.append(name)
    return found[0], found[1]


@contextlib.contextmanager
def _opened(file):
    try:
        # A file in a bucket is fetched whole, because nearly all of it is needed.
        where = pa.BufferReader(tf.io.gfile.GFile(file, "rb").read()) if is_remote(file) else file
        with pq.ParquetFile(where) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the system, not from Parquet's decoder
        raise InputError(f"{file} cannot be read as Parquet: {one_line(error)}") from None


def _unpacked(files: list[str], columns: list[tuple[str, str]], cache_dir: str | None) -> list[str]:
    """Paths of the tars; missing ones are written."""
    folders = cache_folders(files, cache_dir)
    names = [
        hashlib.sha256(repr((file, stamp, column)).encode()).hexdigest()[:20] + ".tar"
        for file, stamp, column in zip(files, stamps(files), columns, strict=True)
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
        with _opened(files[i]) as parquet:
            rows += parquet.metadata.num_rows
            for group in map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups)):
                needed += sum(group.column(c).total_uncompressed_size for c in range(group.num_columns))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"unpacking {files[0]} and the others takes {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB "
            "free; set config.data.cache_dir to a larger disk"
        )
    with progress(f"unpack Parquet into {folder} ({needed / 1e9:.1f} GB)", rows, unit="rows") as bar:
        for i in missing:
            _unpack(files[i], columns[i], folder / names[i], bar)
    return [str(folder / name) for name in names]


def _unpack(file: str, columns: tuple[str, str], target: Path, bar: tqdm) -> None:
    with whole(target) as part, _opened(file) as parquet, tarfile.open(part, "w") as tar:
        row = 0
        for batch in parquet.iter_batches(_ROWS, columns=list(columns)):
            images, captions = (_values(batch, column) for column in columns)
            for image, caption in zip(images, captions, strict=True):
                for ending, value in (("image", image), ("caption", caption)):
                    member = tarfile.TarInfo(f"{row:09}.{ending}")
                    data = value.encode() if isinstance(value, str) else value or b""
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                row += 1
            bar.update(len(images))


def _values(batch, column):
    name, _, field = column.partition(".")
    values = batch.column(name)
    return (values.field(field) if field else values).to_pylist()


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False
