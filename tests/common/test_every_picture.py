"""Every mode of every format, along every path that reads pictures: the same pixels, within a grey level."""

import csv
import io
import re
import tarfile

import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from input_pipeline import decode, encode, labelled, order, pipeline, prepare
from input_pipeline.sources import open_source
from rankclip_jax import config as configs
from rankclip_jax.common import pictures
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config import eval_set
from rankclip_jax.inference.pictures import open_pictures
from rankclip_jax.models import images
from rankclip_jax.study import data as study
from rankclip_jax.weights.view import View
from tests.support import any_picture
from tests.support.any_picture import SIDE

KINDS = any_picture.kinds()
DATA = [data for data, _ in KINDS.values()]
ENDING = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp", "GIF": ".gif"}
NAMES = [f"{row:03}{ENDING[kind.split()[0]]}" for row, kind in enumerate(KINDS)]
cut = jax.jit(images.views, static_argnums=1)
# As the pipeline decodes: in a graph, where the kind of file is not known beforehand.
in_graph = tf.function(decode.decode, input_signature=[tf.TensorSpec((), tf.string)])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The pictures as a class folder with captions, in a csv, and in a tar."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "set" / "all").mkdir(parents=True)
    for name, data in zip(NAMES, DATA, strict=True):
        (root / "set" / "all" / name).write_bytes(data)
        (root / "set" / "all" / name).with_suffix(".txt").write_text(f"picture {name[:3]}")
    with open(root / "set.csv", "w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(["image", "caption"])
        rows.writerows([f"set/all/{name}", f"picture {name[:3]}"] for name in NAMES)
    with tarfile.open(root / "set.tar", "w") as tar:
        for name, data in zip(NAMES, DATA, strict=True):
            # The ending says what a member is for; the bytes, what they are.
            for member, content in ((f"{name[:3]}.png", data), (f"{name[:3]}.txt", b"a picture")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return root


def source_of(root, kind="folder"):
    spec = configs.complete({"data": {"format": kind}}).data
    return open_source(spec, str(root / {"folder": "set", "csv": "set.csv"}[kind]), image_side=SIDE)


def labelled_set(root):
    return eval_set("zero_shot", {"format": "folder", "path": str(root / "set")})


def training(root, canvas):
    source, seed = source_of(root, "csv"), 3
    options = dict(batch_size=len(DATA), image_side=SIDE, context_length=8, crop_scale=(1.0, 1.0), seed=seed)
    batches = pipeline.TrainBatches(source, Tokenizer.train(source.captions(), 300), canvas=canvas, **options)
    rows = [int(order.row_at(source, tf.constant(place, tf.int64), seed)) for place in range(len(DATA))]
    return np.asarray(cut(next(batches), SIDE))[np.argsort(rows), 0]


def evaluation(root, canvas):
    source = labelled.open_labelled(labelled_set(root), image_side=SIDE).source
    (batch,) = pipeline.eval_batches(source, batch_size=len(DATA), image_side=SIDE, canvas=canvas)
    assert batch["mask"].all()
    del batch["caption"]
    return cut(batch, SIDE)[:, 0]


def embed(root, kind):
    found, view = open_pictures(str(root / kind)), View(SIDE, SIDE)
    return [view(found.image(i)) for i in range(found.size)]


def prepared(root):
    """`prepare`'s shards, read as training reads them."""
    out = root / "prepared"
    prepare.prepare(source_of(root), out, prepare.Options(), {}, 2)
    spec = configs.complete({"data": {"format": "tfrecord"}}).data
    source = open_source(spec, str(out / "*.tfrecord"), image_side=SIDE)
    return [in_graph(source.read(tf.constant(row, tf.int64))["image"]) for row in range(source.size)]


PATHS = {
    "the reader": lambda root: [pictures.read(data) for data in DATA],
    "in the graph": lambda root: [in_graph(data) for data in DATA],
    "training, resized on the device": lambda root: training(root, 24),
    "training, resized on the host": lambda root: training(root, None),
    "evaluation, resized on the device": lambda root: evaluation(root, 24),
    "evaluation, resized on the host": lambda root: evaluation(root, None),
    "prepare": prepared,
    "View of a path": lambda root: [View(SIDE, SIDE)(root / "set" / "all" / name) for name in NAMES],
    "View of Pillow's": lambda root: [View(SIDE, SIDE)(Image.open(io.BytesIO(data))) for data in DATA],
    "embed a folder": lambda root: embed(root, "set"),
    "embed a csv": lambda root: embed(root, "set.csv"),
    "embed a tar": lambda root: embed(root, "set.tar"),
    "a study's classes": lambda root: study.read_labelled("set", labelled_set(root), side=SIDE).images,
    "a study's pairs": lambda root: study.read_pairs(
        configs.complete({"data": {"format": "webdataset"}}).data, str(root / "set.tar"), side=SIDE, canvas=SIDE,
        split="train",
    ).canvas,
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_the_pixels(path, root):
    results = np.stack([np.asarray(result) for result in PATHS[path](root)])
    assert results.dtype == np.uint8
    off = {
        kind: float(np.abs(result - expected).max())
        for (kind, (_, expected)), result in zip(KINDS.items(), results.astype(float), strict=True)
    }
    if path == "prepare":
        assert off.pop("JPEG CMYK") <= 3  # compressed once more, as a JPEG of RGB
    assert {kind: most for kind, most in off.items() if most > 1} == {}


def test_in_the_graph_they_are_the_readers_to_the_bit():
    for kind, (data, _) in KINDS.items():
        np.testing.assert_array_equal(in_graph(data), pictures.read(data), err_msg=kind)


MODES = any_picture.modes()


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_that_a_program_made(mode):
    image, expected = MODES[mode]
    assert image.mode == mode
    before = image.tobytes()
    for result in (pictures.rgb(image), View(SIDE, SIDE)(image)):
        # Premultiplied colours have lost their lower bits where there is little alpha.
        assert np.abs(np.asarray(result) - np.asarray(expected, float)).max() <= (2 if mode in ("La", "RGBa") else 1)
    assert image.tobytes() == before  # the caller's is as it was


@pytest.mark.parametrize("kind", any_picture.others())
def test_no_other_format_is_opened(kind, tmp_path):
    """Whatever its name says: of EPS, for one, Pillow would start Ghostscript."""
    data = any_picture.others()[kind]
    (tmp_path / "picture.png").write_bytes(data)
    for read in (pictures.read, encode.encode, in_graph, lambda _: View(SIDE, SIDE)(tmp_path / "picture.png")):
        with pytest.raises((InputError, tf.errors.OpError), match=re.escape(pictures.NO_IMAGE)):
            read(data)
