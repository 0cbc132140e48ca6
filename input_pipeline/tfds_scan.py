"""Sets of tensorflow-datasets, read in order as an evaluation does."""

import tensorflow as tf

from input_pipeline.sources import Source
from rankclip_jax.common.errors import InputError


def open_labels(path: str, data_dir: str | None) -> tuple[Source, list[str]]:
    """(source, label names) of NAME[/CONFIG]:SPLIT.

    Raises:
      InputError: no such set or split, it is not prepared in `data_dir`, or it has no image or label.
    """
    builder, split = _builder(path, data_dir)
    features = builder.info.features
    for key in ("image", "label"):
        if key not in features:
            raise InputError(f"tfds {path} has no feature {key!r}; its features are {', '.join(features)}")
    data = _dataset(builder, path, split)
    # CIFAR and STL10 know their names only after they were prepared; until then they say "0", "1" ...
    names = list(features["label"].names or map(str, range(features["label"].num_classes)))
    return _source(path, data.map(lambda s: _row(s["image"], label=s["label"]))), names


def open_captions(path: str, data_dir: str | None) -> tuple[Source, list[list[str]]]:
    """(source, captions of each image) of a set like coco_captions (its test split is Karpathy's). Raises as above."""
    import tensorflow_datasets as tfds

    builder, split = _builder(path, data_dir)
    features = builder.info.features
    if "image" not in features or "captions" not in features:
        raise InputError(f"tfds {path} has no features image and captions; it has {', '.join(features)}")
    texts_only = tfds.decode.PartialDecoding({"captions": {"text"}})  # the first pass decodes no image
    captions = [
        [text.decode(errors="replace") for text in sample["captions"]["text"].tolist()]
        for sample in _dataset(builder, path, split, texts_only).as_numpy_iterator()
    ]
    return _source(path, _dataset(builder, path, split).map(lambda s: _row(s["image"]))), captions


def _builder(path, data_dir):
    import tensorflow_datasets as tfds

    name, colon, split = str(path).partition(":")
    if not colon:
        raise InputError(f"a tfds path is NAME:SPLIT, for example caltech101:test; got {path!r}")
    try:
        return tfds.builder(name, data_dir=data_dir), split
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise InputError(f"tfds {name!r}: {str(error).splitlines()[0]}") from None


def _dataset(builder, path, split, decoders=None) -> tf.data.Dataset:
    import tensorflow_datasets as tfds

    in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    try:
        return builder.as_dataset(split=split, shuffle_files=False, read_config=in_order, decoders=decoders)
    except AssertionError:
        raise InputError(
            f"tfds {path} is not prepared in {builder.data_dir}; `tfds build {builder.name}` fetches and prepares it "
            "(--data_dir=DIR for another folder)"
        ) from None
    except ValueError as error:
        raise InputError(f"tfds {path}: {str(error).splitlines()[0]}") from None


def _row(image, label=-1):
    image = image if image.shape[-1] == 3 else tf.image.grayscale_to_rgb(image)
    return {"image": image, "caption": "", "label": tf.cast(label, tf.int32)}


def _source(path, data: tf.data.Dataset) -> Source:
    size = int(data.cardinality())
    if size < 1:
        raise InputError(f"tfds {path} has no samples")

    def read(row):  # only to look at one again; an evaluation scans
        return data.skip(row).take(1).get_single_element()

    where = lambda row: f"tfds {path} sample {row}"  # noqa: E731
    return Source(size=size, read=read, where=where, captions=lambda: (), labels=None, scan=lambda: data)
