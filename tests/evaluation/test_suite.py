"""Published sets in the layouts that people have, and where they were looked for."""

import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline import labelled
from rankclip_jax.common.errors import InputError
from rankclip_jax.config import complete
from rankclip_jax.evaluation import suite
from rankclip_jax.evaluation.prompts import prompts_of
from rankclip_jax.evaluation.run import open_sets
from tests.support import cases

IDS = ["n01440764", "n01443537", "n15075141"]


def class_folders(root, names=IDS):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "x.JPEG").write_bytes(cases.jpeg(i))
    return root


def webdataset(root):
    members = [member for i in range(3) for member in [(f"{i}.jpg", cases.jpeg(i)), (f"{i}.cls", str(i))]]
    cases.tar(root / "test" / "0.tar", members)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text("tench\ngoldfish\nshark\n")
    return root


def label_table(root, classes=True):
    root.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        (root / f"{i}.jpg").write_bytes(cases.jpeg(i))
    (root / "labels.csv").write_text("image,label\n" + "".join(f"{i}.jpg,{i}\n" for i in range(3)))
    if classes:
        lines = '{"classes": ["tench", "goldfish", "shark"], "templates": [lambda c: f"a {c}."]}'
        (root / "classes.py").write_text(lines)
    return root


def found(data_dir, *names):
    config = complete({"eval": {"suite": names or ("imagenet",), "data_dir": str(data_dir)}}).eval
    return suite.zero_shot_sets(config)


def opened(data_dir, name="imagenet"):
    spec = found(data_dir, name)[name]
    return prompts_of(name, spec, labelled.open_labelled(spec, image_side=8))


@pytest.mark.parametrize(
    "place", ["imagenet/val", "ImageNet1K/validation", "imagenet1k/test", "ILSVRC2012/val", "imagenet", "val", "."]
)
def test_class_folders(place, tmp_path):
    root = class_folders(tmp_path / place)
    spec = found(tmp_path)["imagenet"]
    assert spec.format == "folder" and (tmp_path / spec.path).samefile(root)
    prompts = opened(tmp_path)
    assert prompts.names == ["tench", "goldfish", "toilet paper"] and len(prompts.templates) == 80


def test_numbered_folders_are_in_the_sets_order(tmp_path):
    class_folders(tmp_path / "imagenetv2-matched-frequency-format-val", [str(i) for i in range(1000)])
    prompts = opened(tmp_path, "imagenet_v2")
    assert prompts.names[:2] == ["tench", "goldfish"] and prompts.names[-1] == "toilet paper"


@pytest.mark.parametrize("place", ["imagenet", "wds_imagenet1k", "imagenet1k", "."])
def test_webdatasets(place, tmp_path):
    root = webdataset(tmp_path / place)
    spec = found(tmp_path)["imagenet"]
    assert spec.format == "clip_benchmark" and (tmp_path / spec.path).samefile(root)
    assert opened(tmp_path).names == ["tench", "goldfish", "shark"]


@pytest.mark.parametrize("place", ["imagenet", "ImageNet1K/validation", "imagenet/test", "."])
def test_label_tables(place, tmp_path):
    label_table(tmp_path / place)
    prompts = opened(tmp_path)
    assert prompts.names == ["tench", "goldfish", "shark"] and len(prompts.templates) == 80


def prepared(root, name="imagenet2012"):
    root.mkdir(parents=True)
    (root / "dataset_info.json").write_text(json.dumps({"name": name}))


def test_the_order_is_webdataset_folders_table_tfds(tmp_path):
    prepared(tmp_path / "imagenet2012" / "5.1.0")
    assert (
        found(tmp_path)["imagenet"].format == "tfds" and found(tmp_path)["imagenet"].path == "imagenet2012:validation"
    )
    label_table(tmp_path / "imagenet")
    assert found(tmp_path)["imagenet"].path.endswith("labels.csv")
    class_folders(tmp_path / "ImageNet1K" / "val")
    assert found(tmp_path)["imagenet"].format == "folder"
    webdataset(tmp_path / "imagenet")
    assert found(tmp_path)["imagenet"].format == "clip_benchmark"


def test_tfds_below_the_sets_own_name(tmp_path):
    prepared(tmp_path / "cifar10" / "3.0.2", "cifar10")
    assert found(tmp_path, "cifar10", "dtd")["cifar10"].path == "cifar10:test"
    own = found(tmp_path / "cifar10", "cifar10")["cifar10"]
    assert own.format == "tfds" and own.path == f"{tmp_path}/cifar10/3.0.2:test"
    other = found(tmp_path / "cifar10", "dtd")["dtd"]
    assert other.format == "clip_benchmark"  # not what is there


def test_a_folder_with_other_classes_is_not_the_set(tmp_path):
    class_folders(tmp_path / "food101", ["images", "meta"])
    class_folders(tmp_path / "imagenet", ["train", "val"])
    assert [spec.format for spec in found(tmp_path, "food101", "imagenet").values()] == ["clip_benchmark"] * 2


def test_what_is_not_there_names_all_places(tmp_path):
    (tmp_path / "ImageNet1K").mkdir()
    with pytest.raises(InputError) as error:
        opened(tmp_path)
    line = str(error.value)
    assert all(
        text in line
        for text in (
            f"looked in {tmp_path}, {tmp_path}/imagenet, {tmp_path}/ImageNet1K for test/nshards.txt",
            "for the classes' folders, and for labels.csv, there or in val, validation, test",
            f"in {tmp_path}/imagenet2012 for TFDS",
            "wds_imagenet1k",
            f"tfds build imagenet2012 --data_dir={tmp_path}",
        )
    )
    assert "\n" not in line


def test_several_sets_are_not_taken_from_the_folder_itself(tmp_path):
    class_folders(tmp_path / "val")
    assert found(tmp_path, "imagenet", "dtd")["imagenet"].format == "clip_benchmark"


def test_a_table_counts_its_bad_rows_and_the_set_is_evaluated(tmp_path, capsys):
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "a.csv").write_text("image,label\n0.png,cat\n1.png,dog, big\n2.png,\n3.png,dog\n")
    sets = open_sets(
        complete({"eval": {"zero_shot": {"a": {"path": str(tmp_path / "a.csv")}}}}).eval, 8, ("zero_shot",)
    )
    assert not sets.missing
    source = sets.opened["zero_shot"]["a"][1][0].source
    assert source.size == 2 and [lost.where.split("/")[-1] for lost in source.lost] == ["a.csv row 1", "a.csv row 2"]
