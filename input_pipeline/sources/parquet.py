"""Parquet files with a column of encoded images and a column of captions.

Parquet compresses hundreds of rows together, so reading one row costs as much as its whole group. In the order of
blocks the groups are the blocks, and the files are read as they are (row_groups.py). In the order of rows every file is
unpacked once into a tar (parquet_unpacked.py).
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from input_pipeline.graph import from_python
from input_pipeline.sources import row_groups
from input_pipeline.sources.byte_ranges import Files
from input_pipeline.sources.parquet_columns import Columns, caption_of, columns_of, image_of, may_hold_paths
from input_pipeline.sources.parquet_unpacked import unpacked
from input_pipeline.sources.paths import expand, stamps
from input_pipeline.sources.row_groups import opened
from input_pipeline.sources.source import Ahead, Blocks, Reading, Source, all_ahead, captions_in_json, keys
from input_pipeline.sources.tar import open_members
from input_pipeline.sources.together import Together
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError


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
        columns_of(file, schema, image_keys, caption_keys, captions)
        for file, (_, _, schema) in zip(files, heads, strict=True)
    ]
    if spec.get("shuffle") == "blocks":
        rows = _as_it_is(files, heads, columns, spec)
    else:
        rows = _unpacked_rows(files, columns, spec, captions)
    if not rows.size:
        raise InputError(f"{files[0]} has no rows")
    reader = _Reader(files, rows, columns, captions, spec.get("max_file_mb"))
    return Source(
        rows.size,
        reader.read,
        reader.where,
        captions=lambda: (),
        index=rows.arrays,
        digest=rows.digest,
        ahead=reader.ahead,
        text=Reading(lambda row: reader.caption(rows.texts.read(row)), rows.texts.ahead),
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


class _Reader:
    """Samples from rows: paths of images are followed, lists of captions are taken apart.

    Attributes:
      ahead: as a Source's.
    """

    def __init__(
        self, files: list[str], rows: _Rows, columns: list[Columns], captions: bool, max_file_mb: int | None
    ):
        self._files, self._rows, self._captions = files, rows, captions
        self._several, self._inside = any(one.several for one in columns), columns[0].inside
        self._folders_F = tf.constant([f"{file.rpartition('/')[0]}/" if "/" in file else "" for file in files])
        self._starts_F = tf.constant(rows.starts)
        self._pictures = Files(remote=rows.has_paths, max_mb=max_file_mb)  # which may lie anywhere
        path_of = tf.function(self._path, [tf.TensorSpec([], tf.int64)], autograph=False)
        self.ahead = all_ahead([rows.ahead, self._pictures.ahead(lambda row: path_of(row).numpy())])

    def read(self, row: tf.Tensor, *given: tf.Tensor) -> dict[str, tf.Tensor]:
        """As a Source's."""
        sample = self._rows.read(row, *given)
        image = sample["image"]
        if self._rows.has_paths:
            image = tf.cond(
                tf.strings.length(sample["path"]) > 0,
                lambda: from_python(self._pictures.read, self._path(row)),
                lambda: sample["image"],
            )
        return {"image": image} | (self.caption(sample) if self._captions else {})

    def caption(self, sample: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """One caption, or a list where any file has lists."""
        caption, captions = sample["caption"], sample["captions"]
        if self._several:
            caption = tf.cond(
                tf.strings.length(captions) > 0,
                lambda: captions_in_json(captions, self._inside),
                lambda: tf.reshape(sample["caption"], [1]),
            )
        return {"caption": caption}

    def where(self, row: int) -> str:
        """File and row."""
        file = int(np.searchsorted(self._rows.starts, row, side="right")) - 1
        return f"{self._files[file]} row {row - self._rows.starts[file]}"

    def _path(self, row):
        path = self._rows.paths(row)["path"]
        absolute = tf.strings.regex_full_match(path, r"(?s)(/|\w+://).*")
        file = tf.searchsorted(self._starts_F, [row], side="right")[0] - 1
        folder = tf.where(tf.strings.length(path) > 0, self._folders_F[file], "")
        return tf.where(absolute, path, tf.strings.join([folder, path]))


def _unpacked_rows(files: list[str], columns: list[Columns], spec: ConfigDict, captions: bool) -> _Rows:
    kinds, cache_dir = ("image", "path", "caption", "captions"), spec.get("cache_dir")
    tars = unpacked(files, columns, cache_dir)
    members = open_members(tars, {kind: (kind,) for kind in kinds}, cache_dir, optional=kinds, spec=spec)
    index, paths, texts = members.index, members.alone(["path"]).read, members.alone(["caption", "captions"])
    has_paths = index.some_row_has([kinds.index("path")])
    read = members.read if captions else members.alone(["image", "path"]).read
    return _Rows(index.size, index.starts, has_paths, read, paths, texts, index.arrays, index.digest)


def _as_it_is(files: list[str], heads: list[_Head], columns: list[Columns], spec: ConfigDict) -> _Rows:
    def known(path, head, one):
        named = {"image": one.image, "path": one.image, "caption": one.caption, "captions": one.caption}
        strings = {one.image: image_of, one.caption: functools.partial(caption_of, columns=one)}
        named, strings = ({k: v for k, v in given.items() if k and v} for given in (named, strings))
        return row_groups.File(path, head.size, head.metadata, named, strings)

    groups = row_groups.RowGroups(list(map(known, files, heads, columns)), spec)
    pictures, arrays = groups.pictures, groups.arrays
    has_paths = any(may_hold_paths(head.schema.field(one.image).type) for head, one in zip(heads, columns, strict=True))
    reads = pictures.read, pictures.read, groups.texts
    of_source = pictures.ahead, groups.blocks, groups.together
    return _Rows(groups.size, groups.starts_F, has_paths, *reads, arrays, None, *of_source)


def _head(file: str, size: int) -> _Head:
    with opened(file, size) as parquet:
        return _Head(size, parquet.metadata, parquet.schema_arrow)
