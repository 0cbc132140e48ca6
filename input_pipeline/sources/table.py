"""Tables of image paths with captions or labels: csv, tsv, .jsonl, COCO's captions (rankclip_jax/common/tables.py)."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline.sources.packed_strings import PackedLists, PackedStrings
from input_pipeline.sources.paths import expand, is_remote
from input_pipeline.sources.source import Lost, Source, keys
from rankclip_jax.common import tables


@dataclasses.dataclass(frozen=True)
class Rows:
    """The good rows of one or more tables, in order.

    Attributes:
      images: the paths as in the tables.
      texts: large_string, or large_list of several a row.
      path: ops, row (int64 scalar) -> the path of its image.
      where: row -> file, number in the file, path.
      lost: the bad rows.
    """

    images: PackedStrings
    texts: pa.ChunkedArray
    path: Callable
    where: Callable[[int], str]
    lost: tuple[Lost, ...]


def open_table(spec: ConfigDict, path: str | Sequence[str]) -> Source:
    """Opens one table, or several, of images and captions.

    `spec`: delimiter, encoding, image_key, caption_key, image_folder, hint of config.data. Bad rows are lost.

    Raises:
      InputError: as tables.read_table.
    """
    rows = open_rows(spec, path, keys(spec.get("caption_key"), tables.CAPTION_KEYS))
    several = pa.types.is_large_list(rows.texts.type)
    texts = PackedLists(rows.texts) if several else PackedStrings(rows.texts)

    def read(row):
        return {"image": tf.io.read_file(rows.path(row)), "caption": texts.at(row)}

    return Source(len(texts), read, rows.where, lambda: texts, lost=rows.lost)


def open_rows(spec: ConfigDict, path: str | Sequence[str], text_keys: tuple[str, ...]) -> Rows:
    """Reads tables; `spec` as above, `text_keys` instead of caption_key. Raises as above."""
    image_keys = keys(spec.get("image_key"), tables.IMAGE_KEYS)
    hint = spec.get("hint") or f"give a csv with columns {image_keys[0]},{text_keys[0]} (config.data.train, .val)"
    files = expand(path, endings=tables.ENDINGS, hint=hint)
    read = [
        tables.read_table(
            file,
            image_keys,
            text_keys,
            delimiter=spec.delimiter,
            encoding=spec.get("encoding"),
            image_folder=spec.get("image_folder"),
            data=tf.io.gfile.GFile(file, "rb").read() if is_remote(file) else None,
        )
        for file in files
    ]
    images = PackedStrings(_joined([table.images for table in read]))
    numbers_N = np.concatenate([table.numbers for table in read])
    starts_F = np.cumsum([0] + [len(table.numbers) for table in read[:-1]])
    folders_F = tf.constant([f"{table.folder.rstrip('/')}/" if table.folder else "" for table in read])

    def path_of(row):
        image = images.at(row)
        folder = folders_F[tf.searchsorted(starts_F, [row], side="right")[0] - 1]
        # As tables.image_path.
        return tf.where(tf.strings.regex_full_match(image, r"(?s)(/|\w+://).*"), image, tf.strings.join([folder, image]))

    def where(row):
        file = files[int(np.searchsorted(starts_F, row, side="right")) - 1]
        image = path_of(tf.constant(row, tf.int64)).numpy().decode(errors="replace")
        return f"{file} row {numbers_N[row]}: {image}"

    lost = [
        Lost(f"{file} row {row}", reason, 1)
        for file, table in zip(files, read, strict=True)
        for row, reason in table.bad
    ]
    return Rows(images, _joined([table.texts for table in read]), path_of, where, tuple(lost))


def _joined(columns: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    """The columns of several tables one below the other; lists if there is one of lists."""
    lists = [pa.types.is_large_list(column.type) for column in columns]
    if any(lists):
        columns = [column if is_list else _each_alone(column) for column, is_list in zip(columns, lists, strict=True)]
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)


def _each_alone(column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = column.combine_chunks()
    return pa.chunked_array([pa.LargeListArray.from_arrays(pa.array(range(len(values) + 1), pa.int64()), values)])
