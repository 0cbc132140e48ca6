"""Parquet files with a column of encoded images and a column of captions.

Parquet compresses hundreds of rows together, so reading one row costs as much as its whole group. In the order of
blocks the groups are the blocks, and the files are read as they are (row_groups.py). In the order of rows every file is
unpacked once into a tar, which the graph reads by row (tar.py). The tars are next to the data, or in
config.data.cache_dir, and take as much space as the images.
"""

import functools
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf
from ml_collections import ConfigDict
from tqdm import tqdm

from input_pipeline.graph import from_python
from input_pipeline.sources import row_groups
from input_pipeline.sources.byte_ranges import Files
from input_pipeline.sources.offset_index import local_folders
from input_pipeline.sources.paths import expand, stamps
from input_pipeline.sources.row_groups import opened
from input_pipeline.sources.source import Ahead, Blocks, Reading, Source, all_ahead, captions_in_json, keys
from input_pipeline.sources.tar import open_members
from input_pipeline.sources.together import Together
from rankclip_jax.common.errors import InputError, printable
from rankclip_jax.common.files import whole
from rankclip_jax.common.progress import progress

_ROWS = 256  # rows unpacked at a time


class _Columns(NamedTuple):
    """The columns of a file that are unpacked.

    Attributes:
      image: the column.
      caption: the column; "": none.
      inside: path of the caption in the column's structs or JSON.
      several: whether captions are lists, or JSON with such.
      image_kind: .bytes or .path for a struct with only that field, :path for a column of paths; part of the cache key.
    """

    image: str
    caption: str
    inside: str | None = None
    several: bool = False
    image_kind: str = ""


def open_parquet(spec: ConfigDict, path: str | Sequence[str], captions: bool = True) -> Source:
    """Opens files. An image is bytes, a path (relative to the file), or a struct of both, as Hugging Face's datasets
    write it. A caption is a string, a list of strings, or the value at a path: meta:caption in a struct or in JSON.
    captions=False: no file needs such a column.

    `spec`: image_key, caption_key, hint, cache_dir, shuffle, window_mb, max_file_mb of config.data.

    Raises:
      InputError: no such file or column, a column of another type, no rows, or not enough disk space to unpack.
    """
    files = expand(path, endings=(".parquet",), hint=spec.get("hint"))
    image_keys = keys(spec.get("image_key"), ("image", "jpg"))
    caption_keys = keys(spec.get("caption_key"), ("caption", "txt", "text"))
    with ThreadPoolExecutor(32) as pool:
        heads = list(pool.map(_head, files, (size for size, _ in stamps(files))))
    columns = [
        _columns(file, schema, image_keys, caption_keys, captions)
        for file, (_, _, schema) in zip(files, heads, strict=True)
    ]
    if spec.get("shuffle") == "blocks":
        rows = _as_it_is(files, heads, columns, spec)
    else:
        rows = _unpacked_rows(files, columns, spec, captions)
    if not rows.size:
        raise InputError(f"{files[0]} has no rows")
    folders_F = tf.constant([f"{file.rpartition('/')[0]}/" if "/" in file else "" for file in files])
    several, inside = any(one.several for one in columns), columns[0].inside
    starts_F = tf.constant(rows.starts)

    def path_of(row):
        path = rows.paths(row)["path"]
        absolute = tf.strings.regex_full_match(path, r"(?s)(/|\w+://).*")
        file = tf.searchsorted(starts_F, [row], side="right")[0] - 1
        folder = tf.where(tf.strings.length(path) > 0, folders_F[file], "")
        return tf.where(absolute, path, tf.strings.join([folder, path]))

    pictures = Files(remote=rows.has_paths, max_mb=spec.get("max_file_mb"))  # which may lie anywhere
    eager_path_of = tf.function(path_of, [tf.TensorSpec([], tf.int64)])

    def caption_of(sample):
        caption, captions = sample["caption"], sample["captions"]
        if several:
            caption = tf.cond(
                tf.strings.length(captions) > 0,
                lambda: captions_in_json(captions, inside),
                lambda: tf.reshape(caption, [1]),
            )
        return {"caption": caption}

    def read(row, *given):
        sample = rows.read(row, *given)
        image = sample["image"]
        if rows.has_paths:
            image = tf.cond(
                tf.strings.length(sample["path"]) > 0, lambda: from_python(pictures.read, path_of(row)), lambda: image
            )
        return {"image": image} | (caption_of(sample) if captions else {})

    def where(row):
        file = int(np.searchsorted(rows.starts, row, side="right")) - 1
        return f"{files[file]} row {row - rows.starts[file]}"

    return Source(
        rows.size,
        read,
        where,
        captions=lambda: (),
        index=rows.arrays,
        digest=rows.digest,
        ahead=all_ahead([rows.ahead, pictures.ahead(lambda row: eager_path_of(row).numpy())]),
        text=Reading(lambda row: caption_of(rows.texts.read(row)), rows.texts.ahead),
        blocks=rows.blocks,
        together=rows.together,
    )


class _Head(NamedTuple):
    """What the footer of a file says, and its bytes."""

    size: int
    metadata: pq.FileMetaData
    schema: pa.Schema


class _Rows(NamedTuple):
    """Rows of files by number: of unpacked ones, or of row groups.

    Attributes:
      read, paths, texts: give the strings image, path, caption and captions; path; caption and captions.
      starts, has_paths: the first row of each file; whether images may be given as paths.
      arrays: a Source's index.
      size, digest, ahead, blocks, together: as a Source's.
    """

    size: int
    starts: np.ndarray
    has_paths: bool
    read: Callable
    paths: Callable
    texts: Reading
    arrays: Callable[[], list[Any]]
    digest: Callable[[], list[np.ndarray]] | None = None
    ahead: Ahead | None = None
    blocks: Blocks | None = None
    together: Together | None = None


def _unpacked_rows(files: list[str], columns: list[_Columns], spec: ConfigDict, captions: bool) -> _Rows:
    kinds, cache_dir = ("image", "path", "caption", "captions"), spec.get("cache_dir")
    tars = _unpacked(files, columns, cache_dir)
    members = open_members(tars, {kind: (kind,) for kind in kinds}, cache_dir, optional=kinds, spec=spec)
    index, paths, texts = members.index, members.alone(["path"]).read, members.alone(["caption", "captions"])
    has_paths = index.some_row_has([kinds.index("path")])
    read = members.read if captions else members.alone(["image", "path"]).read
    return _Rows(index.size, index.starts, has_paths, read, paths, texts, index.arrays, index.digest)


def _as_it_is(files: list[str], heads: list[_Head], columns: list[_Columns], spec: ConfigDict) -> _Rows:
    def known(path, head, one):
        named = {"image": one.image, "path": one.image, "caption": one.caption, "captions": one.caption}
        strings = {one.image: _image, one.caption: functools.partial(_caption, columns=one)}
        named, strings = ({k: v for k, v in given.items() if k and v} for given in (named, strings))
        return row_groups.File(path, head.size, head.metadata, named, strings)

    groups = row_groups.RowGroups(list(map(known, files, heads, columns)), spec)
    pictures, arrays = groups.pictures, groups.arrays
    has_paths = any(_has_paths(head.schema.field(one.image).type) for head, one in zip(heads, columns, strict=True))
    reads = pictures.read, pictures.read, groups.texts
    of_source = pictures.ahead, groups.blocks, groups.together
    return _Rows(groups.size, groups.starts_F, has_paths, *reads, arrays, None, *of_source)


def _has_paths(kind: pa.DataType) -> bool:
    kind = _values_of(kind)
    return _is_string(kind) or (pa.types.is_struct(kind) and kind.get_field_index("path") >= 0)


def _head(file: str, size: int) -> _Head:
    with opened(file, size) as parquet:
        return _Head(size, parquet.metadata, parquet.schema_arrow)


def _columns(
    file: str, schema: pa.Schema, image_keys: tuple[str, ...], caption_keys: tuple[str, ...], captions: bool
) -> _Columns:
    image, kind = _column(file, schema, image_keys, "image_key")
    image, image_kind = image if image in schema.names else image.partition(":")[0], ""
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: _values_of(kind.field(i).type) for i in range(kind.num_fields)}
        if _is_bytes(fields.get("bytes")):
            image_kind = "" if _is_string(fields.get("path")) else ".bytes"
        elif _is_string(fields.get("path")):
            image_kind = ".path"
        else:
            raise _wrong_type(file, image, kind, "bytes, a path, or a struct of bytes and path")
    elif _is_string(kind):
        image_kind = ":path"
    elif not _is_bytes(kind):
        raise _wrong_type(file, image, kind, "bytes, a path, or a struct of bytes and path")
    if not captions and not any(key.partition(":")[0] in schema.names for key in caption_keys):
        return _Columns(image, "", image_kind=image_kind)
    caption, kind = _column(file, schema, caption_keys, "caption_key")
    if caption not in schema.names:
        column, _, inside = caption.partition(":")
        return _Columns(image, column, inside, True, image_kind)
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    several = any(is_list(kind) for is_list in lists)
    one = _values_of(kind.value_type) if several else kind
    if not (_is_string(one) or (_is_bytes(one) and not several)):
        raise _wrong_type(file, caption, kind, "strings or lists of strings; a field inside is COLUMN:FIELD")
    return _Columns(image, caption, None, several, image_kind)


def _column(file: str, schema: pa.Schema, wanted: tuple[str, ...], option: str) -> tuple[str, pa.DataType]:
    """(the first of the wanted keys whose column is there, the type of the column's values)"""
    for key in wanted:
        name = key if key in schema.names else key.partition(":")[0]
        if (count := schema.names.count(name)) > 1:
            raise InputError(f"{file} has {count} columns {name!r}; rename all but one")
        if count:
            return key, _values_of(schema.field(name).type)
    names = printable(", ".join(schema.names)[:300])
    raise InputError(f"{file} has no column {' or '.join(wanted)}; its columns are: {names}; set config.data.{option}")


def _wrong_type(file: str, column: str, kind: pa.DataType, expected: str) -> InputError:
    return InputError(f"{file}: column {column} has type {kind}. Expected {expected}")


def _values_of(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_string(kind: pa.DataType | None) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_bytes(kind: pa.DataType | None) -> bool:
    known = (pa.binary(), pa.large_binary(), pa.binary_view())
    return kind is not None and (kind in known or pa.types.is_fixed_size_binary(kind))


def _cache_key(columns: _Columns) -> tuple:
    """Never changes, so that existing tars are found."""
    key = (columns.image + columns.image_kind, columns.caption)
    return (*key, columns.inside, columns.several) if columns.several else key


def _unpacked(files: list[str], columns: list[_Columns], cache_dir: str | None) -> list[str]:
    """Paths of the tars; missing ones are written."""
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


def _unpack(file: str, columns: _Columns, target: Path, bar: tqdm) -> None:
    names = [columns.image, *([columns.caption] if columns.caption else [])]
    with whole(target) as part, opened(file) as parquet, tarfile.open(part, "w") as tar:
        row = 0
        groups = range(parquet.num_row_groups)  # one at a time, since prefetched groups stay in memory to the end
        for batch in (one for group in groups for one in parquet.iter_batches(_ROWS, [group], names)):
            images = batch.column(names[0]).to_pylist()
            captions = batch.column(columns.caption).to_pylist() if columns.caption else [None] * len(images)
            for image, caption in zip(images, captions, strict=True):
                for ending, data in (_image(image), _caption(caption, columns)):
                    member = tarfile.TarInfo(f"{row:09}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                row += 1
            bar.update(len(images))


def _image(value: Any) -> tuple[str, bytes]:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return ("path", value.encode()) if isinstance(value, str) else ("image", value or b"")


def _caption(value: Any, columns: _Columns) -> tuple[str, bytes]:
    if isinstance(value, dict | list) or (columns.several and value is None):
        return "captions", json.dumps(value, default=str).encode()
    return "captions" if columns.several else "caption", value.encode() if isinstance(value, str) else value or b""


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False
