"""Sources of samples, one file per format. `open_source` opens any of them as a `Source`."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from input_pipeline import cpu_only
from input_pipeline.graph import require, require_all
from input_pipeline.sources import drawn, folder, mixture, parquet, table, tar, tfds, tfrecord
from input_pipeline.sources.offset_index import Peers
from input_pipeline.sources.source import (
    Ahead,
    Blocks,
    Lost,
    Reading,
    Source,
    decoded,
    read_captions,
    started_ahead,
    told,
)
from input_pipeline.sources.together import Together
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import MAX_FILE_MB

__all__ = [
    "Ahead",
    "Blocks",
    "Lost",
    "Peers",
    "Source",
    "Together",
    "open_pictures",
    "open_source",
    "started_ahead",
    "told",
]


def open_source(
    spec: ConfigDict,
    path: Any,
    *,
    image_side: int,
    split: str = "train",
    peers: Peers | None = None,
) -> Source:
    """Opens config.data's `train` or `val`.

    Args:
      spec: `format` and its keys in config.data.
      path: files of the format. shapes: the number of scenes, or the name of a labelled split. A mixture: name -> path,
        weight, and changes to `spec` (mixture.py).
      image_side: side of the scenes drawn by `shapes`, pixels.
      split: train | val: the stream of scenes for `shapes`.
      peers: the other processes of a run, with which it shares the work of indexing shards.

    Raises:
      InputError: unknown format, missing file, column or key, or no rows.
    """
    cpu_only()
    if isinstance(path, Mapping | ConfigDict):
        open_one = functools.partial(open_source, image_side=image_side, split=split, peers=peers)
        return mixture.open_mixture(spec, path, open_one)
    match spec.format:
        case "csv":
            return _checked(table.open_table(spec, path), spec)
        case "tfrecord":
            return _with_text(tfrecord.open_tfrecord(spec, path, peers=peers), spec, spec.get("encoding"))
        case "webdataset":
            return _with_text(tar.open_webdataset(spec, path, peers=peers), spec)
        case "folder":
            return _with_text(folder.open_folder(spec, path), spec, spec.get("encoding"))
        case "parquet":
            return _with_text(parquet.open_parquet(spec, path), spec)
        case "tfds":
            return _with_text(tfds.open_tfds(spec, path, peers), spec)
        case "shapes":
            return drawn.open_drawn(path, image_side, split)
    known = "csv, tfrecord, webdataset, folder, parquet, tfds or shapes"
    raise InputError(f"unknown config.data.format={spec.format!r}. Expected {known}")


def open_pictures(spec: ConfigDict, path: str) -> Source:
    """Opens shards (tfrecord, webdataset, parquet) of pictures, with captions or without.

    Rows are {"image"} alone, also where the caption is missing or bad; `text` reads {"caption"}. Raises as above.
    """
    cpu_only()
    openers = {"tfrecord": tfrecord.open_tfrecord, "webdataset": tar.open_webdataset, "parquet": parquet.open_parquet}
    source = openers[spec.format](spec, path, captions=False)
    captioned = _with_text(source, spec)

    def read(row):
        image = source.read(tf.cast(row, tf.int64))["image"]
        require(tf.strings.length(image) > 0, "empty image")
        return {"image": image}

    text = captioned.text or Reading(captioned.read, captioned.ahead)
    return dataclasses.replace(source, read=read, text=text, together=None)


def _with_text(source: Source, spec: ConfigDict, encoding: str | None = None) -> Source:
    """`_checked`, with captions decoded; those that are not of the encoding (None: UTF-8) are bad rows."""

    def with_text(read):
        def decode(row, *given):
            sample = read(row, *given)
            caption = decoded(sample["caption"], encoding)
            return sample | {"caption": tf.ensure_shape(caption, sample["caption"].shape)}

        return decode

    checked = _checked(_changed(source, with_text), spec)
    return dataclasses.replace(checked, captions=lambda: read_captions(checked))


def _changed(source: Source, change: Callable) -> Source:
    """The source with change(read) in place of `read`, also where captions are read alone."""
    text = source.text and Reading(change(source.text.read), source.text.ahead)
    return dataclasses.replace(source, read=change(source.read), text=text)


_NOTHING_SEEN = r"[\s\p{Z}\p{Cf}]*"  # blanks of every script, and characters without width


def _checked(source: Source, spec: ConfigDict) -> Source:
    """The source, with rows without caption, or without image or with too large a one, as bad rows.

    `spec`: captions_per_line (each line is a caption), max_file_mb.
    """
    lines, most = spec.get("captions_per_line"), (spec.get("max_file_mb") or MAX_FILE_MB) * 1_000_000

    def checked(read):
        def check(row, *given):
            sample = read(tf.cast(row, tf.int64), *given)
            rules = []
            if "image" in sample:
                length = tf.strings.length(sample["image"])
                too_large = f"the image has more than {most // 1_000_000:,} MB (config.data.max_file_mb)"
                rules = [(length > 0, "empty image"), (length <= min(most, tf.int32.max), too_large)]
            caption = sample["caption"]
            if lines:
                text = tf.strings.reduce_join(tf.reshape(caption, [-1]), separator="\n")
                caption = tf.strings.strip(tf.strings.split(tf.strings.regex_replace(text, "\r\n?", "\n"), "\n"))
            with_text = ~tf.strings.regex_full_match(caption, _NOTHING_SEEN)
            if caption.shape.rank:  # several
                caption, with_text = tf.boolean_mask(caption, with_text), tf.reduce_any(with_text)
            require_all(*rules, (with_text, "empty caption"))
            return sample | {"caption": caption}

        return check

    def captions():
        return (line.strip() for text in source.captions() for line in re.split("\r\n?|\n", text) if line.strip())

    return dataclasses.replace(_changed(source, checked), captions=captions if lines else source.captions)
