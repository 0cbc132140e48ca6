"""The same samples in every layout that a source reads; made by the tests, with other libraries' writers."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import sources
from input_pipeline.graph import mapped

LAYOUTS = ("csv", "tfrecord", "webdataset", "folder", "parquet", "tfds", "tfds_array_record")
KEYS = dict(image_key=None, caption_key=None, delimiter=",", data_dir=None, cache_dir=None)


def samples(count, seed=0):
    """[(JPEG or PNG bytes, caption)], all different."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        image = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (5 + i % 7, 9, 3), np.uint8)).save(image, "JPEG" if i % 3 else "PNG")
        made.append((image.getvalue(), f'caption {i}, "quoted" \u2603 \U0001f600 שלום'))
    return made


def open_as(layout, folder, made, **options):
    """Writes `made` in a layout below `folder`, in two shards where it has any, and opens it."""
    kind = "tfds" if layout.startswith("tfds") else layout
    path = WRITERS[layout](Path(folder), made)
    return sources.open_source(ConfigDict(KEYS | dict(format=kind) | options), path, image_side=8)


def read_all(source):
    """[(image bytes, caption or list of several)] of all rows, read inside a graph; raises at the first bad one."""
    data = mapped(tf.data.Dataset.range(source.size), source.read, at_once=2)
    return [(sample["image"], texts(sample["caption"])) for sample in data.as_numpy_iterator()]


def texts(captions):
    """The text of one caption, or a list of several."""
    decoded = [one.decode(errors="replace") for one in ([captions] if isinstance(captions, bytes) else captions)]
    return decoded if len(decoded) > 1 else decoded[0]


def write_csv(folder, made):
    (folder / "pictures").mkdir()
    with open(folder / "data.csv", "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "image", "caption"])
        for i, (image, caption) in enumerate(made):
            (folder / "pictures" / f"{i}.img").write_bytes(image)
            writer.writerow([i, f"pictures/{i}.img", caption])
    return str(folder / "data.csv")


def example(**features):
    """A serialised tf.train.Example: bytes, str, or lists of int."""

    def feature(value):
        if isinstance(value, list):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=value))
        value = value.encode() if isinstance(value, str) else value
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    features = {key: feature(value) for key, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_tfrecord(folder, made):
    for shard, part in enumerate(halves(made)):
        with tf.io.TFRecordWriter(str(folder / f"{shard:05}.tfrecord")) as out:
            for i, (image, caption) in enumerate(part):
                out.write(example(jpg=image, txt=caption, key=f"{shard:05}{i:04}"))
    return str(folder / "{00000..00001}.tfrecord")


def write_tar(folder, made):
    for shard, part in enumerate(halves(made)):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i, (image, caption) in enumerate(part):
                key = f"{shard:05}{i:04}"
                texts = (("json", json.dumps({"key": key}).encode()), ("txt", caption.encode()))
                for ending, data in (("jpg", image), *texts):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "*.tar")


def write_folder(folder, made):
    root = folder / "pictures"
    for i, (image, caption) in enumerate(made):
        stem = root / f"{i // 10:04}" / f"{i:06}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".jpg" if image.startswith(b"\xff\xd8") else ".png").write_bytes(image)
        stem.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return str(root)


def write_parquet(folder, made, group=7):
    for shard, part in enumerate(halves(made)):
        images = [{"bytes": image, "path": None} for image, _ in part]
        if shard:  # both ways in which people store them
            images = [image["bytes"] for image in images]
        table = pa.table({"id": range(len(part)), "image": images, "caption": [caption for _, caption in part]})
        pq.write_table(table, folder / f"{shard}.parquet", row_group_size=group)
    return str(folder)


def write_tfds(folder, made, file_format="tfrecord"):
    """A set like coco_captions: sample i has 1 + i % 3 captions, the given one first."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            captions = tfds.features.Sequence({"id": tf.int64, "text": tf.string})
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "captions": captions})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (image, caption) in enumerate(made):
                texts = [caption] + [f"{caption} again {k}" for k in range(i % 3)]
                yield i, {"image": io.BytesIO(image), "captions": [dict(id=k, text=t) for k, t in enumerate(texts)]}

    builder = Tiny(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare()
    return f"{builder.data_dir}:train"


def halves(made):
    """The two shards of a set."""
    return made[: len(made) // 2], made[len(made) // 2 :]


WRITERS = dict(
    csv=write_csv,
    tfrecord=write_tfrecord,
    webdataset=write_tar,
    folder=write_folder,
    parquet=write_parquet,
    tfds=write_tfds,
    tfds_array_record=lambda folder, made: write_tfds(folder, made, "array_record"),
)
