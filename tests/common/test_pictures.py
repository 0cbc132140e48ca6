"""Every reader of a folder takes the same files for pictures, and reads them to the same pixels."""

import io
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import labelled, transforms
from input_pipeline.sources import open_source
from rankclip_jax.common.pictures import ENDINGS
from rankclip_jax.config import eval_set
from rankclip_jax.inference.pictures import open_pictures
from rankclip_jax.study import data as study

# As they stand in files: both cases, and what is not a picture though it says so behind the dot.
NAMES = [f"{i:02}{ending}" for i, ending in enumerate(sorted((*ENDINGS, *map(str.upper, ENDINGS))))]
GREY = 129


def encoded(name):
    kind = Image.registered_extensions()[name[name.rindex(".") :].lower()]
    out = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.new("RGB", (8, 8), (GREY,) * 3).save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A class folder with a captioned picture of every ending, beside files that are none."""
    inside = tmp_path / "set" / "cats"
    inside.mkdir(parents=True)
    for name in NAMES:
        (inside / name).write_bytes(encoded(name))
        (inside / name).with_suffix(".txt").write_text("a cat")
    for other in ("readme.md", "tif", "tiff.json", "png", "x.tif.part"):
        (inside / other).write_text("no picture")
    return tmp_path / "set"


def pixels(source):
    rows = [source.read(tf.constant(row, tf.int64)) for row in range(source.size)]
    return np.stack([np.asarray(transforms.decode(row["image"])) for row in rows])


def test_endings():
    assert set(ENDINGS) == set(".tif .tiff .jpg .jpeg .jpe .jfif .png .webp .gif .bmp".split())


def test_a_folder_of_pairs(folder):
    source = open_source(ConfigDict({"format": "folder"}), str(folder), image_side=8)
    assert [source.where(row).rpartition("/")[2] for row in range(source.size)] == NAMES
    np.testing.assert_array_equal(pixels(source), GREY)


def test_a_folder_a_class(folder):
    spec = eval_set("zero_shot", {"format": "folder", "path": str(folder)})
    source = labelled.open_labelled(spec, image_side=8).source
    assert [source.where(row).rpartition("/")[2] for row in range(source.size)] == NAMES
    np.testing.assert_array_equal(pixels(source), GREY)


def test_members_of_a_benchmark(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text("1")
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for name in NAMES:
            for member, content in ((name, encoded(name)), (name[:2] + ".cls", b"0")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    spec = eval_set("zero_shot", {"format": "clip_benchmark", "path": str(tmp_path)})
    source = labelled.open_labelled(spec, image_side=8).source
    assert source.size == len(NAMES)
    np.testing.assert_array_equal(pixels(source), GREY)


def test_a_collection(folder):
    found = open_pictures(str(folder))
    assert [found.name(i).rpartition("/")[2] for i in range(found.size)] == NAMES


def test_a_study(folder):
    spec = eval_set("zero_shot", {"format": "folder", "path": str(folder)})
    np.testing.assert_array_equal(study.read_labelled("set", spec, side=8).images, np.full((len(NAMES), 8, 8, 3), GREY))
