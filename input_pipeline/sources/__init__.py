"""Sources of samples, one file per format. `open_source` opens any of them as a `Source`."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline import cpu_only
from input_pipeline.sources import drawn, folder, mixture, parquet, table, tar, tfds, tfrecord
from input_pipeline.sources.source import Lost, Source, require
from rankclip_jax.common.errors import InputError

__all__ = ["Lost", "Source", "open_source"]


def open_source(
    spec: ConfigDict,
    path: Any,
    *,
    image_side: int,
    split: str = "train",
) -> Source:
    """Opens config.data's `train` or `val`.

    Args:
      spec: `format` and its keys in config.data.
      path: files of the format. shapes: the number of scenes, or the name of a labelled split. A mixture: name -> path,
        weight, and changes to `spec` (mixture.py).
      image_side: side of the scenes drawn by `shapes`, pixels.
      split: train | val: the stream of scenes for `shapes`.

    Raises:
      InputError: unknown format, missing file, column or key, or no rows.
    """
    cpu_only()
    if isinstance(path, Mapping | ConfigDict):
        return mixture.open_mixture(spec, path, functools.partial(open_source, image_side=image_side, split=split))
    match spec.format:
        case "csv":
            return _checked(table.open_table(spec, path), spec)
        case "tfrecord":
            return _checked(tfrecord.open_tfrecord(spec, path), spec)
        case "webdataset":
            return _checked(tar.open_webdataset(spec, path), spec)
        case "folder":
            return _checked(folder.open_folder(spec, path), spec)
        case "parquet":
            return _checked(parquet.open_parquet(spec, path), spec)
        case "tfds":
            return _checked(tfds.open_tfds(spec, path), spec)
        case "shapes":
            return drawn.open_drawn(path, image_side, split)
    known = "csv, tfrecord, webdataset, folder, parquet, tfds or shapes"
    raise InputError(f"unknown config.data.format={spec.format!r}. Expected {known}")


def _checked(source: Source, spec: ConfigDict) -> Source:
    """The source, with rows without image or without caption as bad rows, and with captions_per_line if asked for."""
    lines = spec.get("captions_per_line")

    def read(row):
        sample = source.read(tf.cast(row, tf.int64))
        require(tf.strings.length(sample["image"]) > 0, "empty image")
        caption = sample["caption"]
        if lines:
            text = tf.strings.reduce_join(tf.reshape(caption, [-1]), separator="\n")
            caption = tf.strings.strip(tf.strings.split(tf.strings.regex_replace(text, "\r\n?", "\n"), "\n"))
        with_text = tf.strings.length(tf.strings.strip(caption)) > 0
        if caption.shape.rank:  # several
            caption = tf.boolean_mask(caption, with_text)
        require(tf.reduce_any(with_text), "empty caption")
        return sample | {"caption": caption}

    def captions():
        return (line.strip() for text in source.captions() for line in re.split("\r\n?|\n", text) if line.strip())

    return dataclasses.replace(source, read=read, captions=captions if lines else source.captions)
