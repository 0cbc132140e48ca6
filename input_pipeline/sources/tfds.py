"""Sets of tensorflow-datasets that are prepared already: their files are read by number, as any TFRecord shard is.

ArrayRecord files, which TensorFlow cannot read inside a graph, go through their own reader in Python.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from input_pipeline.graph import require
from input_pipeline.sources.offset_index import Peers
from input_pipeline.sources.source import Source, keys
from input_pipeline.sources.tfrecord import Records, examples, open_records
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError

_PATH = re.compile(r"(.+?(?::\d+\.\d+\.\d+)?):([A-Za-z_]\w*(?:\[.*\])?(?:\+.*)?)")
_CAPTIONS = ("caption", "captions", "captions/text", "caption/text", "text")


def open_tfds(spec: ConfigDict, path: str, peers: Peers | None = None) -> Source:
    """Opens NAME[/CONFIG][:VERSION]:SPLIT, or the folder of a prepared set instead of its name; SPLIT as train[:90%].

    `spec`: image_key and caption_key (of a feature inside another: captions/text), data_dir, cache_dir of config.data.

    Raises:
      InputError: no such set, split or feature, or it is not prepared.
    """
    import tensorflow_datasets  # slow to import, and only needed here

    builder, split, remote = _builder(path, spec.get("data_dir"))
    features = dict(_flat(builder.info.features.get_serialized_info()))
    images = [
        name for name, kind in builder.info.features.items() if isinstance(kind, tensorflow_datasets.features.Image)
    ]
    image_keys = keys(spec.get("image_key"), tuple(images[:1]) or ("image",))
    caption_keys = keys(spec.get("caption_key"), _CAPTIONS)
    found: list[tuple[str, ...]] = []
    for wanted, option in ((image_keys, "image_key"), (caption_keys, "caption_key")):
        found.append(tuple(key for key in wanted if key in features))
        if not found[-1]:
            raise _lacking(path, " or ".join(wanted), features, f"; set config.data.{option}")
    return examples(_records(builder, split, remote, spec.get("cache_dir"), peers), *found)


def open_labels(path: str, data_dir: str | None) -> tuple[Source, list[str]]:
    """(source of images with "label", names of the labels); `path` as above. Raises as above."""
    builder, split, remote = _builder(path, data_dir)
    features = builder.info.features
    for key in ("image", "label"):
        if key not in features:
            raise _lacking(path, key, features)
    if not getattr(features["label"], "num_classes", None):
        raise InputError(f"tfds {path}: its feature label must be a ClassLabel; it is {features['label']}")
    records = _records(builder, split, remote, None)
    kinds = {"image": tf.io.FixedLenFeature((), tf.string), "label": tf.io.FixedLenFeature((), tf.int64)}

    names = list(features["label"].names or map(str, range(features["label"].num_classes)))

    def read(row):
        sample = tf.io.parse_single_example(records.read(row), kinds)
        label = sample["label"]  # -1 in a split whose labels are kept secret
        require((label >= 0) & (label < len(names)), f"its label is not one of the {len(names)} classes")
        return {"image": sample["image"], "caption": "", "label": tf.cast(label, tf.int32)}

    return Source(records.size, read, records.where, lambda: (), lost=records.lost, ahead=records.ahead), names


def _lacking(path: str, key: str, features: Iterable[str], hint: str = "") -> InputError:
    return InputError(f"tfds {path} has no feature {key}; its features are: {', '.join(sorted(features))}{hint}")


def _builder(path, data_dir):
    import tensorflow_datasets

    match = _PATH.fullmatch(str(path))
    if not match:
        raise InputError(f"a tfds path is NAME:SPLIT, for example coco_captions:train; got {path!r}")
    name, split = match.groups()
    remote = name if storage.is_remote(name) else None
    try:
        if remote:
            with _described(remote) as folder:
                builder = tensorflow_datasets.builder_from_directory(folder)
                list(builder.info.features)  # names of classes are read from files of their own
        elif storage.exists(storage.join(name, "dataset_info.json")):
            builder = tensorflow_datasets.builder_from_directory(name)
        else:
            builder = tensorflow_datasets.builder(name, data_dir=data_dir)
    except InputError:
        raise
    except Exception as error:  # not found, an unknown config or version, no network: each has its own class
        raise InputError(f"tfds {name!r} cannot be opened: {str(error).strip().splitlines()[0]}") from None
    if not remote and not storage.exists(storage.join(str(builder.data_dir), "dataset_info.json")):
        raise InputError(
            f"tfds {name!r} is not prepared in {builder.data_dir}; `tfds build {name}` fetches and prepares it "
            "(--data_dir=DIR for another folder, then data_dir=DIR in the configuration)"
        )
    try:
        return builder, builder.info.splits[split], remote
    except (KeyError, ValueError) as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(
            f"tfds {name!r} has no split {split!r}; it has {splits} ({str(error).splitlines()[0]})"
        ) from None


@contextlib.contextmanager
def _described(folder: str) -> Iterator[str]:
    """A local copy of a prepared set in a bucket, without its records."""
    files = [file for file in storage.files_in(folder) if not re.search(r"\.(tfrecord|array_record)\b", file.path)]
    if not any(file.path.endswith("/dataset_info.json") for file in files):
        raise InputError(f"tfds {folder} has no dataset_info.json. Expected the folder of a prepared set")
    with tempfile.TemporaryDirectory() as copy:
        for file in files:
            storage.write(os.path.join(copy, storage.name_of(file.path)), storage.read(file.path))
        yield copy


def _records(
    builder: Any, split: Any, remote: str | None, cache_dir: str | None, peers: Peers | None = None
) -> Records:
    instructions = [(one.filename, one.skip, one.take) for one in split.file_instructions]
    if remote:
        instructions = [(storage.join(remote, os.path.basename(name)), *span) for name, *span in instructions]
    files = list(dict.fromkeys(filename for filename, _, _ in instructions))
    if not files:
        raise InputError(f"tfds {builder.info.full_name}: the split holds no samples")
    kind = builder.info.file_format.value
    if kind == "array_record":
        if remote:
            raise InputError(f"tfds {remote} is prepared as array_record, which is read from local files only; copy it")
        return _array_records(files, instructions)
    if kind != "tfrecord":
        raise InputError(f"{builder.data_dir} is prepared as {kind}; tfrecord and array_record can be read")

    def part(index):
        ends = [*index.starts[1:], index.size]
        return _rows(files, instructions, index.starts, ends)

    return open_records(files, cache_dir, part, peers)


def _rows(files, instructions, starts, ends):
    """The records of the split's instructions, numbered over all files."""
    spans = []
    for filename, skip, take in instructions:
        file = files.index(filename)
        begin = starts[file] + skip
        spans.append(np.arange(begin, min(ends[file], begin + take) if take >= 0 else ends[file]))
    return np.concatenate(spans).astype(np.int64)


def _array_records(files: list[str], instructions: list[tuple[str, int, int]]) -> Records:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    sizes = [len(ArrayRecordDataSource([file])) for file in files]
    ends = np.cumsum(sizes)
    rows_N = _rows(files, instructions, ends - sizes, ends)
    source = ArrayRecordDataSource(files)

    def read(row):
        record = tf.numpy_function(lambda row: np.asarray(source[int(rows_N[row])], object), [row], tf.string)
        return tf.ensure_shape(record, ())

    def where(row):
        file = int(np.searchsorted(ends, rows_N[row], side="right"))
        return f"{files[file]} record {rows_N[row] - (ends[file] - sizes[file])}"

    return Records(len(rows_N), read, where, (), lambda: [ends, rows_N])


def _flat(info, prefix=""):
    """a: {b: ...} -> a/b, as the features are called in the records."""
    for name, value in info.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
