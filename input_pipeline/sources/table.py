"""A csv or tsv: a column of image paths and a column of captions or labels."""

import csv
import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv
import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline.sources.packed_strings import PackedStrings
from input_pipeline.sources.paths import expand, is_remote
from input_pipeline.sources.source import Lost, Source, keys
from rankclip_jax.common.errors import InputError, one_line

_BLOCK = 64 << 20  # bytes read at a time; a row must fit


def open_table(spec: ConfigDict, path: str | Sequence[str]) -> Source:
    """Opens one table, or several with the same columns.

    `spec`: delimiter, image_key, caption_key (or label_key), hint of config.data. Image paths are relative to the
    table's folder, absolute, or in a bucket. A row with more or fewer columns than the header is reported as lost.

    Raises:
      InputError: no such file or column, no rows, an unclosed quote, or labels that are not numbers.
    """
    label_key = spec.get("label_key")
    text_keys = (label_key,) if label_key else keys(spec.get("caption_key"), ("caption",))
    image_keys = keys(spec.get("image_key"), ("image",))
    hint = spec.get("hint") or f"give a csv with columns {image_keys[0]},{text_keys[0]} (config.data.train, .val)"
    files = expand(path, endings=(".csv", ".tsv"), hint=hint)
    tables, wrongs = zip(*(_columns(file, image_keys, text_keys, spec.delimiter) for file in files), strict=True)
    images, texts = (PackedStrings(pa.concat_tables(tables)[name]) for name in ("image", "text"))
    if not len(images):
        raise InputError(f"{path} has no rows after its header")
    labels = _class_numbers(texts, path, label_key) if label_key else None
    starts = np.cumsum([0] + [len(table) for table in tables[:-1]])
    folders_F = tf.constant([file.rpartition("/")[0] + "/" if "/" in file else "" for file in files])

    def image_path(row):
        image = images.at(row)
        absolute = tf.strings.regex_full_match(image, r"(?s)(/|\w+://).*")
        folder = folders_F[tf.searchsorted(starts, [row], side="right")[0] - 1]
        return tf.where(absolute, image, tf.strings.join([folder, image]))

    def read(row):
        sample = {"image": tf.io.read_file(image_path(row)), "caption": texts.at(row)}
        if label_key:
            sample["label"] = tf.constant(labels)[row]
        return sample

    def where(row):
        file = int(np.searchsorted(starts, row, side="right")) - 1
        # Row numbers count all rows of the file, including lost ones.
        wrong, below = np.array(wrongs[file]), row - starts[file]
        number = below + np.searchsorted(wrong - np.arange(len(wrong)), below, side="right")
        return f"{files[file]} row {number}: {image_path(tf.constant(row, tf.int64)).numpy().decode(errors='replace')}"

    reason = "different number of columns than the header"
    lost = tuple(
        Lost(f"{file} row {row}", reason, 1) for file, wrong in zip(files, wrongs, strict=True) for row in wrong
    )
    return Source(len(images), read, where, lambda: texts, labels, lost=lost)


def _columns(
    file: str, image_keys: tuple[str, ...], text_keys: tuple[str, ...], delimiter: str
) -> tuple[pa.Table, list[int]]:
    """Columns image and text, as bytes, and the numbers of rows with more or fewer columns than the header."""
    wrong = []

    def skip(row):
        wrong.append(row.number - 2)  # counted from 0 after the header
        return "skip"

    delimiter = "\t" if file.endswith(".tsv") else delimiter
    with tf.io.gfile.GFile(file, "rb") as opened:
        header = next(csv.reader([opened.readline().decode("utf-8-sig", "replace")], delimiter=delimiter), [])
    found = []
    for wanted in (image_keys, text_keys):
        found += [key for key in wanted if key in header][:1]
        if not any(key in header for key in wanted):
            columns = ", ".join(header) or "none"
            raise InputError(f"{file} has no column {' or '.join(map(repr, wanted))}; its columns are: {columns}")
    try:
        table = pyarrow.csv.open_csv(
            io.BytesIO(tf.io.gfile.GFile(file, "rb").read()) if is_remote(file) else file,
            # Rows are counted only with one thread, and lost rows are reported by number.
            pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
            # As bytes: captions that are not UTF-8 are repaired later.
            pyarrow.csv.ConvertOptions(include_columns=found, column_types=dict.fromkeys(found, pa.large_binary())),
        ).read_all()
    except pa.ArrowInvalid as error:
        raise InputError(f"{file} cannot be read as a csv: {one_line(error, 200)!a}") from None
    for key in found:
        last = table[key][-1].as_py() if len(table) else b""
        if last.endswith(b"\n"):  # the quoted field extends to the end of the file
            raise InputError(
                f"{file}: unclosed quote; the field begins {last[:40].decode(errors='replace')!r}"
            )
    return pa.table({"image": table[found[0]], "text": table[found[1]]}), wrong


def _class_numbers(texts, path, label_key):
    try:
        return np.array([int(text) for text in texts], np.int32)
    except ValueError as error:
        raise InputError(f"{path}: expected class numbers in column {label_key!r}: {error}") from None
