"""The one reader of tables: images, each with captions or a label; csv, tsv, .jsonl, COCO's captions; also .gz.

A row is good, or it is bad and has a number and a reason. No row vanishes, and no letter is replaced.
"""

import dataclasses
import gzip
import itertools
import mmap
import os
import posixpath
import re
import urllib.parse
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rankclip_jax.common.delimited import Rows, first_rows, read_delimited
from rankclip_jax.common.encoded_text import EncodedText
from rankclip_jax.common.errors import InputError, located, one_line
from rankclip_jax.common.json_rows import json_items, json_rows
from rankclip_jax.common.regular_files import open_regular

ENDINGS = tuple(ending + gz for ending in (".csv", ".tsv", ".jsonl", ".json") for gz in ("", ".gz"))
# Usual names of the columns; those of Hugging Face's metadata come second.
IMAGE_KEYS, CAPTION_KEYS = ("image", "file_name"), ("caption", "text")
ABSOLUTE = r"/|\w+://"  # how a path begins that is not relative to the table's folder
_FILE = r"^(?i:file://(localhost)?)"
_FIRST = 1000  # rows of `read_first`


@dataclasses.dataclass(frozen=True)
class Table:
    """The good rows of a table, in order.

    Attributes:
      folder: what the paths of images are relative to.
      images: large_string (N,): paths as they are in the table.
      texts: large_string (N,), or large_list (N,) for several a row; None: not asked for.
      numbers: int64 (N,): the rows' numbers in the file, from 0 below the header, without empty lines.
      bad: (number, reason) of the other rows.
    """

    folder: str
    images: pa.Array
    texts: pa.Array | None
    numbers: np.ndarray
    bad: list[tuple[int, str]]


def read_table(
    file: str,
    image_keys: Sequence[str] = IMAGE_KEYS,
    text_keys: Sequence[str] | None = CAPTION_KEYS,
    *,
    delimiter: str = ",",
    encoding: str | None = None,
    image_folder: str | None = None,
    data: bytes | None = None,
    names: Sequence[str] | None = None,
) -> Table:
    """Reads a table.

    Args:
      image_keys, text_keys: possible names of the two columns; the first that the table has is used. In JSON: paths,
        see json_rows.find. text_keys=None: images alone.
      delimiter: of a csv; a .tsv has tabs. If only another one gives these columns, it is used, and stderr says so.
      encoding: of a file without a byte order mark; rows that it cannot decode are bad. None: UTF-8.
      image_folder: what the paths of images are relative to, itself relative to the file. None: the file's folder; for
        COCO's captions also the usual folders beside it.
      data: the bytes of a file that is not local.
      names: of the columns of a csv or tsv without a header.

    Raises:
      InputError: no such file or column, no good row, or, without an encoding, a row that is not UTF-8.
    """
    text, ending = _text(file, encoding, data), _ending(file)
    wanted = [tuple(image_keys), *([tuple(text_keys)] if text_keys else [])]
    folder = posixpath.join(posixpath.dirname(file), image_folder or "")
    if ending in (".json", ".jsonl"):
        columns, numbers, bad, coco = _json_columns(file, text, wanted)
        if coco and not image_folder and len(numbers):
            folder = _coco_folder(file, columns[0][:100].to_pylist())
    else:
        columns, numbers, bad = read_delimited(file, text, "\t" if ending == ".tsv" else delimiter, wanted, names)
    images = _local(pc.ascii_trim_whitespace(columns[0]))
    filled = pc.greater(pc.binary_length(images), 0)
    if not pc.all(filled, min_count=0).as_py():
        kept = filled.to_numpy(zero_copy_only=False)
        bad = sorted([*bad, *((int(number), "no image path") for number in numbers[~kept])])
        images, columns, numbers = images.filter(filled), [column.filter(filled) for column in columns], numbers[kept]
    if not len(numbers):
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        why = f": row {bad[0][0]}{more}: {bad[0][1]}" if bad else " below its header"
        raise InputError(f"{file} has no {'good ' if bad else ''}rows{why}")
    return Table(folder, images, columns[1] if text_keys else None, numbers, bad)


def read_first(file: str, *, delimiter: str = ",", encoding: str | None = None) -> list[list]:
    """The first rows of a table, to see what its columns are. Of JSON: the keys of the first, and the values there.

    Raises:
      InputError: no such file, or none that can be read.
    """
    text, ending = _text(file, encoding), _ending(file)
    if ending not in (".json", ".jsonl"):
        return first_rows(text, "\t" if ending == ".tsv" else delimiter, _FIRST)
    items = [item for item in itertools.islice(json_items(file, text)[0], _FIRST) if isinstance(item, dict)]
    keys = list(dict.fromkeys(key for item in items for key in item))
    return [keys, *([item.get(key) for key in keys] for item in items)] if items else []


def _local(images: pa.Array) -> pa.Array:
    """With file:// addresses, as data frames and Hugging Face's data sets have them, as the paths that they are."""
    found = pc.match_substring_regex(images, _FILE)
    if not pc.any(found, min_count=0).as_py():
        return images
    paths = [urllib.parse.unquote(re.sub(_FILE, "", image)) for image in images.filter(found).to_pylist()]
    return pc.replace_with_mask(images, found, pa.array(paths, images.type))


def image_path(folder: str, image: str) -> str:
    """An image of a table: relative to the folder, absolute, or in a bucket."""
    return image if re.match(ABSOLUTE, image) else posixpath.join(folder, image)


def _ending(file: str) -> str:
    """Without .gz, in lower case."""
    return posixpath.splitext(file.lower().removesuffix(".gz"))[1]


def _text(file: str, encoding: str | None, data: bytes | None = None) -> EncodedText:
    try:
        raw = _bytes(file) if data is None else data
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except InputError as error:
        raise InputError(f"{file} is {error}") from None
    except FileNotFoundError:
        raise InputError(f"no such file: {located(file)}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file} is not a complete .gz file ({one_line(error)})") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    return EncodedText(file, raw, encoding)


def _bytes(file: str) -> Any:
    with open_regular(file) as opened:
        empty = not os.fstat(opened.fileno()).st_size
        return b"" if empty else mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _json_columns(file: str, text: EncodedText, wanted: Sequence[tuple[str, ...]]) -> tuple:
    items, coco = json_rows(file, text, wanted)
    columns, counts = [Rows(1) for _ in wanted], []
    bad = []
    for number, item in enumerate(items):
        if isinstance(item, ValueError):
            bad.append((number, str(item)))
            continue
        for column, values in zip(columns, item, strict=True):
            for value in values:
                column.add(number, [value])
        counts.append(len(item[-1]))
    arrays = [column.columns()[0] for column in columns]
    if any(count != 1 for count in counts):
        offsets = pa.array(np.r_[0, np.cumsum(counts)], pa.int64())
        arrays[-1] = pa.LargeListArray.from_arrays(offsets, arrays[-1])
    return arrays, np.array(columns[0].numbers, np.int64), bad, coco


def _coco_folder(file: str, some: list[str]) -> str:
    """Where any of the images of annotations/captions_val2017.json is: beside it, or in val2017 beside annotations."""
    here = posixpath.dirname(file)
    split = re.sub(r"^captions_|\.json(\.gz)?$", "", posixpath.basename(file))
    for below in ("", "images", f"../{split}", f"../images/{split}", split):
        if any(os.path.exists(os.path.join(here, below, image)) for image in some):
            return posixpath.join(here, below)
    return here
