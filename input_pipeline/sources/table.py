"""A csv or tsv: a column of image paths and a column of captions or labels."""

import csv
import glob
from pathlib import Path

import numpy as np
import tensorflow as tf

from input_pipeline.sources.source import Source
from rankclip_jax.errors import InputError


def open_table(spec, path) -> Source:
    label_key = spec.get("label_key")
    text_key = label_key or spec.caption_key
    files = sorted(glob.glob(str(path))) if path else []
    if not files:
        hint = spec.get("hint") or f"give a csv with columns {spec.image_key},{text_key} (config.data.train, .val)"
        raise InputError(f"no such file: {path}; {hint}")
    images, texts, wheres = [], [], []
    for file in files:
        with open(file, newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if file.endswith(".tsv") else spec.delimiter)
            for key in (spec.image_key, text_key):
                if key not in (reader.fieldnames or ()):
                    columns = ", ".join(reader.fieldnames or ()) or "none"
                    raise InputError(f"{file} has no column {key!r}; its columns are: {columns}")
            for row in reader:
                # os.path semantics: an absolute path stays as it is, a relative one starts at the csv's folder.
                images.append(str(Path(file).parent / (row[spec.image_key] or "")))
                texts.append(row[text_key] or "")
                wheres.append(f"{file} row {reader.line_num - 2}")
    if not images:
        raise InputError(f"{path} has no rows below its header")
    labels = _class_numbers(texts, path, label_key) if label_key else None
    images_N, texts_N = tf.constant(images), tf.constant(texts)

    def read(row):
        sample = {"image": tf.io.read_file(images_N[row]), "caption": texts_N[row]}
        if label_key:
            sample["label"] = tf.constant(labels)[row]
        return sample

    return Source(len(images), read, lambda row: f"{wheres[row]}: {images[row]}", lambda: texts, labels)


def _class_numbers(texts, path, label_key):
    try:
        return np.array([int(text) for text in texts], np.int32)
    except ValueError as error:
        raise InputError(f"{path}: column {label_key!r} must hold class numbers: {error}") from None
