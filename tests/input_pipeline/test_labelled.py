"""Evaluation sets in every layout, made here: what is read, and what is said of what is wrong with them."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from input_pipeline import clip_benchmark, labelled, pipeline
from rankclip_jax.common.errors import InputError
from rankclip_jax.config import eval_set
from tests.support import cases
from tests.support.source_files import samples, write_tfds

GREYS = [10, 10, 20, 20, 30, 30, 30]  # of seven images; their classes are 0, 0, 1, 1, 2, 2, 2
LABELS = [grey // 10 - 1 for grey in GREYS]


def image_bytes(grey, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), grey, np.uint8)).save(
        out, kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return out.getvalue()


def write_tar(path, samples, image="png"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, grey, ending, text in samples:
            for name, data in (
                (f"{key}.{image}", image_bytes(grey, image.upper())),
                (f"{key}.{ending}", text.encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_clip_benchmark(root, split="test", image="png"):
    samples = [
        (f"s{i:07d}", grey, "cls", str(label)) for i, (grey, label) in enumerate(zip(GREYS, LABELS, strict=True))
    ]
    write_tar(root / split / "0.tar", samples[:4], image)
    write_tar(root / split / "1.tar", samples[4:], image)
    (root / split / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("ash\nbone\nclay\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}.\n")
    return root


def write_folder(root):
    for i, grey in enumerate(GREYS):
        folder = root / ("ash", "bone", "clay")[LABELS[i]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(image_bytes(grey))
    (root / "clay" / "notes.txt").write_text("not an image")
    return root


def write_csv(root):
    lines = ["image,label"]
    for i, (grey, label) in enumerate(zip(GREYS, LABELS, strict=True)):
        (root / f"{i}.png").write_bytes(image_bytes(grey))
        lines.append(f"{i}.png,{label}")
    (root / "labels.csv").write_text("\n".join(lines))
    (root / "classes.json").write_text(json.dumps(["ash", "bone", "clay"]))
    return root / "labels.csv"


def spec(**fields):
    return eval_set("zero_shot", fields)


def open_captioned(**fields):
    return labelled.open_captioned(eval_set("retrieval", fields), image_side=16)


def read_all(source):
    """(grey, label) of every sample, by an evaluation's batches of 4: seven samples do not divide."""
    batches = list(pipeline.eval_batches(source, batch_size=4, image_side=16))
    assert [batch["mask"].tolist() for batch in batches] == [[True] * 4, [True] * 3 + [False]]
    greys = [batch["image"].reshape(4, -1).max(axis=1)[batch["mask"]] for batch in batches]
    rows = np.concatenate([batch["row"][batch["mask"]] for batch in batches])
    assert rows.tolist() == list(range(7))
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    return list(zip(np.concatenate(greys).tolist(), labels.tolist(), strict=True))


EXPECTED = list(zip(GREYS, LABELS, strict=True))


def test_a_csv_with_class_names_as_json(tmp_path):
    found = labelled.open_labelled(
        spec(path=str(write_csv(tmp_path)), classes=str(tmp_path / "classes.json")), image_side=16
    )
    assert read_all(found.source) == EXPECTED and found.names == ["ash", "bone", "clay"] and found.from_file


def test_a_folder_a_class(tmp_path):
    found = labelled.open_labelled(spec(format="folder", path=str(write_folder(tmp_path))), image_side=16)
    assert read_all(found.source) == EXPECTED and found.names == ["ash", "bone", "clay"] and not found.from_file


@pytest.mark.parametrize("layout", ["folder", "clip_benchmark"])
def test_classes_with_the_names_of_the_set_may_have_any_order_and_more(tmp_path, layout):
    root = write_folder(tmp_path / "set") if layout == "folder" else write_clip_benchmark(tmp_path / "set")
    classes = ["clay", "dust", "ash", "bone"]
    (tmp_path / "names.json").write_text(json.dumps(classes))
    fields = dict(format=layout, path=str(root), classes=str(tmp_path / "names.json"))
    found = labelled.open_labelled(spec(**fields), image_side=16)
    expected = [("ash", "bone", "clay")[label] for label in LABELS]
    assert [classes[label] for label in found.source.labels] == expected and found.names == classes
    assert [(grey, classes[label]) for grey, label in read_all(found.source)] == list(zip(GREYS, expected, strict=True))
    (tmp_path / "names.json").write_text('["Ton", "Asche", "Knochen"]')  # by their numbers
    assert read_all(labelled.open_labelled(spec(**fields), image_side=16).source) == EXPECTED


@pytest.mark.parametrize("image", ["png", pytest.param("webp", marks=pytest.mark.slow)])
def test_clip_benchmarks_layout(tmp_path, image):
    root = write_clip_benchmark(tmp_path / "wds", image=image)
    for path in (root, root / "test"):
        found = labelled.open_labelled(spec(format="clip_benchmark", path=str(path)), image_side=16)
        assert read_all(found.source) == EXPECTED
        assert found.names == ["ash", "bone", "clay"] and found.templates == ["a {}", "the {}."] and found.from_file


def test_json_files_replace_the_names_and_prompts_that_came_with_a_set(tmp_path):
    root = write_clip_benchmark(tmp_path / "wds")
    (tmp_path / "names.json").write_text('["a", "b", "c"]')
    (tmp_path / "prompts.json").write_text('["one {}"]')
    fields = dict(classes=str(tmp_path / "names.json"), templates=str(tmp_path / "prompts.json"))
    found = labelled.open_labelled(spec(format="clip_benchmark", path=str(root), **fields), image_side=16)
    assert found.names == ["a", "b", "c"] and found.templates == ["one {}"]


def test_processes_share_a_set_and_every_sample_comes_once(tmp_path):
    found = labelled.open_labelled(spec(format="folder", path=str(write_folder(tmp_path))), image_side=16)
    rows = []
    for index in range(3):
        for batch in pipeline.eval_batches(found.source, batch_size=2, image_side=16, process=(index, 3)):
            rows += batch["row"][batch["mask"]].tolist()
    assert sorted(rows) == list(range(7))


def test_retrieval_by_csv_groups_the_rows_of_an_image(tmp_path):
    write_csv(tmp_path)
    (tmp_path / "captions.csv").write_text("image,caption\n0.png,one\n1.png,two\n0.png,three\n2.png,four\n0.png,five\n")
    fields = eval_set("retrieval", dict(path=str(tmp_path / "captions.csv")))
    found = labelled.open_captioned(fields, image_side=16)
    assert found.captions == ["one", "three", "five", "two", "four"]
    assert found.image_of_text.tolist() == [0, 0, 0, 1, 2] and found.source.size == 3


def test_flickr30ks_own_file_has_bars_and_spaces(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(image_bytes(10))
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n1.png| 0| A dog , running .\n1.png| 1| Dog\n"
    )
    fields = dict(path=str(tmp_path / "results.csv"), delimiter="|", image_key="image_name", caption_key="comment")
    found = open_captioned(**fields, image_folder="images")
    assert found.captions == ["A dog , running .", "Dog"] and found.image_of_text.tolist() == [0, 0]
    assert Image.open(io.BytesIO(labelled.thumbnail(found.source, 0))).size == (24, 20)


def test_retrieval_in_clip_benchmarks_layout_has_a_caption_a_line(tmp_path):
    write_tar(tmp_path / "test" / "0.tar", [("a", 10, "txt", "one\ntwo\n"), ("b", 20, "txt", "three")])
    (tmp_path / "test" / "nshards.txt").write_text("1")
    fields = eval_set("retrieval", dict(format="clip_benchmark", path=str(tmp_path)))
    found = labelled.open_captioned(fields, image_side=16)
    assert found.captions == ["one", "two", "three"] and found.image_of_text.tolist() == [0, 0, 1]
    assert next(pipeline.eval_batches(found.source, batch_size=2, image_side=16))["mask"].all()


@pytest.mark.parametrize("ending", ["cls", "txt"])
def test_halves_of_a_sample_shift_no_label_and_no_caption(tmp_path, ending):
    cases.tar(
        tmp_path / "test" / "0.tar",
        [(f"a.{ending}", "7"), ("b.png", image_bytes(10)), (f"b.{ending}", "1"), ("a.png", image_bytes(20))],
    )
    (tmp_path / "test" / "nshards.txt").write_text("1")
    if ending == "cls":
        source, _, _ = clip_benchmark.labels(str(tmp_path), "")
        assert source.labels.tolist() == [1]
    else:
        source, captions = clip_benchmark.captions(str(tmp_path), "")
        assert captions == [["1"]]
    assert source.size == 1 and sum(lost.samples for lost in source.lost) == 1


def test_names_of_classes_that_are_not_utf_8_are_one_line(tmp_path):
    root = write_clip_benchmark(tmp_path)
    (root / "classnames.txt").write_bytes("ash\nb\xf6ne\nclay\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"classnames.txt is not UTF-8 at byte 5; write it as UTF-8$"):
        labelled.open_labelled(spec(format="clip_benchmark", path=str(root)), image_side=16)


@pytest.mark.parametrize("number", [str(2**31), "-1", "1000000", "9" * 5000, "1_0", "\u0663", "1.0", "", "1 2", "nan"])
def test_a_class_number_that_is_none_is_one_line_with_shard_key_and_value(tmp_path, number):
    root = write_clip_benchmark(tmp_path)
    (root / "classnames.txt").unlink()
    write_tar(root / "test" / "1.tar", [("s4", 10, "cls", "2"), ("s5", 10, "cls", number)])
    said = rf"1.tar key s5: expected a class number in .cls; got {re.escape(repr(number[:20]))}"
    with pytest.raises(InputError, match=f"{said}: not a whole number from 0, below 1,000,000$"):
        labelled.open_labelled(spec(format="clip_benchmark", path=str(root)), image_side=16)


def broken(tmp_path, what):
    root = write_clip_benchmark(tmp_path / "wds")
    shard = root / "test" / "1.tar"
    match what:
        case "count":
            (root / "test" / "nshards.txt").write_text("two")
        case "shard":
            shard.unlink()
        case "class":
            write_tar(shard, [("s9", 10, "cls", "clay")])
        case "label":
            write_tar(shard, [("s9", 10, "cls", "3")])
        case "image":
            write_tar(shard, [("s9", 10, "cls", "1")], image="png")
            with tarfile.open(shard, "a") as tar:
                member = tarfile.TarInfo("s10.cls")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"1"))
    return spec(format="clip_benchmark", path=str(root))


@pytest.mark.parametrize(
    "what, message",
    [
        ("count", r"nshards.txt: expected the number of shards; got 'two'"),
        ("shard", r"no such file: .*1.tar, one of the 2 shards"),
        ("class", r"expected a class number in .cls; got 'clay'"),
        ("label", r"has label 3 \(.*1.tar.*\), but the set names 3 classes"),
        ("image", r"has no image or no .cls"),
    ],
)
def test_what_is_wrong_with_a_webdataset_is_named(tmp_path, what, message):
    with pytest.raises(InputError, match=message):
        labelled.open_labelled(broken(tmp_path, what), image_side=16)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(format="zip", path="x"), "config.eval.zero_shot.format='zip'. Expected one of csv, folder"),
        (dict(format="folder"), "needs a path"),
        (dict(format="folder", path="gone", hint="get it there"), r"gone \(in .*\) is not a folder .*; get it there"),
        (
            dict(format="clip_benchmark", path="gone", hint="get it there"),
            "no such file: gone/test/nshards.txt.*get it there",
        ),
        (dict(format="tfds", path="cifar10"), "a tfds path is NAME:SPLIT"),
        (dict(format="tfds", path="cifar_ten:test"), "tfds 'cifar_ten'"),
    ],
)
def test_a_set_that_is_not_there_says_where_it_was_looked_for(fields, message):
    with pytest.raises(InputError, match=message):
        labelled.open_labelled(spec(**fields), image_side=16)


def prepared_greys(folder, labels, file_format="tfrecord"):
    class Greys(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["ash", "bone", "clay"])
            features = {"image": tfds.features.Image(shape=(20, 24, 1)), "label": label}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for i, grey in enumerate(GREYS):
                yield i, {"image": np.full((20, 24, 1), grey, np.uint8), "label": labels[i]}

    builder = Greys(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare()  # in an order of TFDS's own
    return builder


def test_a_label_that_tfds_keeps_secret_is_a_bad_row(tmp_path, capsys):
    builder = prepared_greys(tmp_path, [-1, *LABELS[1:]])
    source = labelled.open_labelled(spec(format="tfds", path=f"{builder.data_dir}:test"), image_side=16).source
    batches = list(pipeline.eval_batches(source, batch_size=7, image_side=16))
    assert [batch["mask"].sum() for batch in batches] == [6] and batches[0]["label"].min() >= -1
    assert "its label is not one of the 3 classes" in "".join(capsys.readouterr())


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds_sets_are_read_in_order(file_format, tmp_path):
    builder = prepared_greys(tmp_path, LABELS, file_format)
    found = labelled.open_labelled(spec(format="tfds", path=f"{builder.data_dir}:test"), image_side=16)
    if file_format == "tfrecord":
        in_order = builder.as_dataset("test", read_config=tfds.ReadConfig(interleave_cycle_length=1))
    else:
        in_order = builder.as_data_source("test")
    expected = [(int(one["image"][0, 0, 0]), int(one["label"])) for one in in_order]
    assert read_all(found.source) == expected and sorted(expected) == EXPECTED
    assert found.names == ["ash", "bone", "clay"]
    with pytest.raises(InputError, match=r"tfds .*:test has no feature caption or .*; its features are: image, label"):
        open_captioned(format="tfds", path=f"{builder.data_dir}:test")


def test_captions_by_tfds_are_all_of_each_image(tmp_path):
    made = samples(5)
    path = write_tfds(tmp_path, made)  # of 1, 2, 3, 1, 2 captions
    found = open_captioned(format="tfds", path=path)
    assert found.image_of_text.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4]
    assert found.captions[:3] == [made[0][1], made[1][1], f"{made[1][1]} again 0"]
    assert next(pipeline.eval_batches(found.source, batch_size=5, image_side=16))["row"].tolist() == list(range(5))
    with pytest.raises(InputError, match=r"tfds .* has no feature label; its features are: captions, image"):
        labelled.open_labelled(spec(format="tfds", path=path), image_side=16)
    shard = next(tmp_path.rglob("*.tfrecord*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1  # in the last record
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"record 4 \(byte \d+\) cannot be read: .*its checksum"):
        open_captioned(format="tfds", path=path)


@pytest.mark.slow
def test_a_tfds_set_that_is_not_prepared_says_how_to_prepare_it(tmp_path):
    fields = dict(format="tfds", path="dtd:test", data_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"tfds 'dtd' is not prepared in .*; `tfds build dtd` fetches and prepares it"):
        labelled.open_labelled(spec(**fields), image_side=16)


def test_captions_of_a_benchmark_are_utf8(tmp_path):
    (tmp_path / "test").mkdir()
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for name, data in (("a.png", image_bytes(1)), ("a.txt", "caf\xe9".encode("latin-1"))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "test" / "nshards.txt").write_text("1")
    with pytest.raises(InputError, match=r"0.tar key a: .txt is not UTF-8 at byte 3"):
        open_captioned(format="clip_benchmark", path=str(tmp_path))


def test_pictures_beside_class_folders_are_told(tmp_path, capsys):
    root = write_folder(tmp_path / "set")
    (root / "stray.png").write_bytes(image_bytes(1))
    assert labelled.open_labelled(spec(format="folder", path=str(root)), image_side=16).source.size == 7
    assert "set: 1 pictures next to the class folders have no class: left out" in capsys.readouterr().err
