"""Tables of image paths with captions or labels: csv, tsv, .jsonl, COCO's captions (rankclip_jax/common/tables.py)."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ml_collections import ConfigDict

from input_pipeline.graph import all_from_python
from input_pipeline.sources.byte_ranges import Files
from input_pipeline.sources.captioned_files import captioned_files
from input_pipeline.sources.packed_strings import PackedLists, PackedStrings
from input_pipeline.sources.paths import expand
from input_pipeline.sources.source import Lost, Reading, Source, keys
from rankclip_jax.common import storage, tables
from rankclip_jax.common.delimited import NoColumnError
from rankclip_jax.common.errors import InputError, check_utf8

_LIST = r"""(?s)^\[\s*(".*"|'.*')\s*\]$"""  # as pandas writes lists into a csv: ['a cat', 'a pet']


@dataclasses.dataclass(frozen=True)
class Rows:
    """The good rows of one or more tables, in order.

    Attributes:
      texts: large_string, or large_list of several a row.
      path: row -> the path of its image.
      paths: () -> the paths of all images, large_string.
      where: row -> file, number in the file, path.
      where_of: row -> file and number alone.
      lost: the bad rows.
      images: the paths as written.
      remote: whether some images are not local.
    """

    texts: pa.Array
    path: Callable[[int], bytes]
    paths: Callable[[], pa.Array]
    where: Callable[[int], str]
    where_of: Callable[[int], str]
    lost: tuple[Lost, ...]
    images: PackedStrings
    remote: bool


def open_table(spec: ConfigDict, path: str | Sequence[str]) -> Source:
    """Opens one table, or several, of images and captions.

    `spec`: delimiter, encoding, image_key, caption_key, image_folder, hint of config.data. Bad rows are lost.

    Raises:
      InputError: as tables.read_table.
    """
    caption_keys = keys(spec.get("caption_key"), tables.CAPTION_KEYS)
    image_keys = keys(spec.get("image_key"), tables.IMAGE_KEYS)
    hint = f"give a csv with columns {image_keys[0]},{caption_keys[0]} (config.data.train, .val)"
    try:
        rows = open_rows(spec, path, caption_keys, hint)
    except NoColumnError as error:
        option = "image_key" if error.names == image_keys else "caption_key"
        raise InputError(f"{error}; set config.data.{option}") from None
    several = pa.types.is_large_list(rows.texts.type)
    if not several and (pc.mean(pc.match_substring_regex(rows.texts[:100], _LIST)).as_py() or 0) > 0.5:
        raise InputError(
            f"{rows.where_of(0)}: the captions are lists written as text ({rows.texts[0].as_py()[:40]!r} ...). Save "
            "the table as Parquet or JSON lines, where lists stay lists, or a row for each (data.explode in pandas)"
        )
    shapes = [(None,) if several else ()]
    texts = PackedLists(rows.texts) if several else PackedStrings(rows.texts)

    files = Files(rows.remote, spec.get("max_file_mb"))
    image = lambda row, most=None: files.read(rows.path(row), most)  # noqa: E731
    read, together = captioned_files(image, lambda row, _=None: texts.at(row), several)

    return Source(
        len(texts),
        read,
        rows.where,
        captions=lambda: texts,
        lost=rows.lost,
        index=lambda: [*rows.images.buffers(), *texts.buffers()],
        ahead=files.ahead(rows.path),
        text=Reading(lambda row: {"caption": all_from_python(lambda row: [texts.at(row)], shapes, row)[0]}),
        together=None if rows.remote else together,
    )


def open_rows(spec: ConfigDict, path: str | Sequence[str], text_keys: tuple[str, ...], hint: str | None = None) -> Rows:
    """Reads tables; `spec` as above, `text_keys` instead of caption_key. Raises as above."""
    files = expand(path, endings=tables.ENDINGS, hint=spec.get("hint") or hint)
    read = [
        tables.read_table(
            file,
            keys(spec.get("image_key"), tables.IMAGE_KEYS),
            text_keys,
            delimiter=spec.get("delimiter") or ",",
            encoding=spec.get("encoding"),
            image_folder=spec.get("image_folder"),
            data=storage.read(file) if storage.is_remote(file) else None,
        )
        for file in files
    ]
    images = PackedStrings(_joined([table.images for table in read]))
    numbers_N = np.concatenate([table.numbers for table in read])
    starts_F = np.cumsum([0] + [len(table.numbers) for table in read[:-1]])
    folders = [f"{table.folder.rstrip('/')}/" if table.folder else "" for table in read]
    for folder in folders:
        check_utf8(folder)
    folders_F, absolute = [folder.encode() for folder in folders], re.compile(tables.ABSOLUTE.encode())

    def path_of(row):
        image = images.at(row)
        if absolute.match(image):
            return image
        return folders_F[np.searchsorted(starts_F, row, side="right") - 1] + image

    def paths():
        parts, large = [], lambda text: pa.scalar(text, pa.large_string())
        for table, folder in zip(read, folders, strict=True):
            image = table.images
            below = pc.binary_join_element_wise(large(folder), image, large(""))
            parts.append(pc.if_else(pc.match_substring_regex(image, f"^({tables.ABSOLUTE})"), image, below))
        return pa.concat_arrays(parts)

    def where_of(row):
        return f"{files[int(np.searchsorted(starts_F, row, side='right')) - 1]} row {numbers_N[row]}"

    def where(row):
        path = path_of(row).decode(errors="replace")
        return f"{where_of(row)}: {path if len(path) < 1000 else path[:40] + '...'}"

    lost = [
        Lost(f"{file} row {row}", reason, 1)
        for file, table in zip(files, read, strict=True)
        for row, reason in table.bad
    ]
    remote = any(map(storage.is_remote, folders)) or any(
        pc.any(pc.match_substring_regex(table.images, r"^\w+://")).as_py() for table in read
    )
    return Rows(_joined([table.texts for table in read]), path_of, paths, where, where_of, tuple(lost), images, remote)


def _joined(columns: list[pa.Array]) -> pa.Array:
    """The columns of several tables, concatenated; as lists if any of them has lists."""
    lists = [pa.types.is_large_list(column.type) for column in columns]
    if any(lists):
        columns = [column if is_list else _each_alone(column) for column, is_list in zip(columns, lists, strict=True)]
    return pa.concat_arrays(columns)


def _each_alone(values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(range(len(values) + 1), pa.int64()), values)
