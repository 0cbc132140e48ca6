"""Labelled and captioned sets in tables: names, numbers, what is wrong with them."""

import json

import pytest

from input_pipeline import labelled, pipeline
from input_pipeline.sources import Lost
from rankclip_jax.common.errors import InputError
from rankclip_jax.config import eval_set
from tests.input_pipeline.test_labelled import open_captioned, spec, write_csv


def test_a_negative_class_number_is_refused_in_a_probe_too(tmp_path):
    path = write_csv(tmp_path)
    path.write_text(path.read_text().replace(",2\n", ",-1\n"))
    fields = eval_set("linear_probe", dict(path=str(path), train=str(path)))
    with pytest.raises(InputError, match=r"labels.csv has label -1 \(.*row 4.*\), but the set names 3 classes"):
        labelled.open_train_and_test(fields, image_side=16)


def test_a_csv_needs_names_numbers_and_enough_names(tmp_path):
    path = str(write_csv(tmp_path))
    with pytest.raises(InputError, match="column label has class numbers, and nothing names the classes; set classes"):
        labelled.open_labelled(spec(path=path), image_side=16)
    (tmp_path / "classes.json").write_text('["ash", "bone"]')
    with pytest.raises(InputError, match=r"labels.csv has label 2 \(.*row 4.*\), but .*classes.json names 2 classes"):
        labelled.open_labelled(spec(path=path, classes=str(tmp_path / "classes.json")), image_side=16)
    (tmp_path / "classes.json").write_text('{"ash": 1}')
    with pytest.raises(InputError, match="expected a JSON list of strings"):
        labelled.open_labelled(spec(path=path, classes=str(tmp_path / "classes.json")), image_side=16)
    (tmp_path / "labels.csv").write_text("image,label\n0.png,1\n1.png,ash\n")
    with pytest.raises(InputError, match=r"has the label 'ash' \(.*row 1: .*\) and the number 1 \(.*row 0: .*\)"):
        labelled.open_labelled(spec(path=path, protocol="simple"), image_side=16)


def test_captions_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "c.csv").write_text("image,caption\na.png,x\nb.png,\n")
    found = open_captioned(path=str(tmp_path / "c.csv"))
    assert found.captions == ["x"] and found.source.size == 1
    assert found.source.lost == (Lost(f"{tmp_path}/c.csv row 1", "no caption", 1),)
    with pytest.raises(InputError, match=r"no column 'text'; its columns are: image, caption"):
        open_captioned(path=str(tmp_path / "c.csv"), caption_key="text")
    with pytest.raises(InputError, match=r"no such file: gone.csv \(in .*\); ask"):
        open_captioned(path="gone.csv", hint="ask")
    (tmp_path / "c.csv").write_text("image,caption\n")
    with pytest.raises(InputError, match="no rows"):
        open_captioned(path=str(tmp_path / "c.csv"))


def test_labels_that_are_names_take_the_order_of_the_classes(tmp_path):
    write_csv(tmp_path)
    path, names = tmp_path / "names.csv", ["clay", "ash", "bone", "more"]
    path.write_text("image,label\n0.png,bone\n1.png, ash \n2.png,clay\n")
    (tmp_path / "names.json").write_text(json.dumps(names))
    found = labelled.open_labelled(spec(path=str(path), classes=str(tmp_path / "names.json")), image_side=16)
    assert found.names == names and found.source.labels.tolist() == [2, 1, 0]
    (tmp_path / "names.json").write_text(json.dumps(names[:2]))
    with pytest.raises(InputError, match=r"row 0: .*0.png: label 'bone' is not in .*names.json"):
        labelled.open_labelled(spec(path=str(path), classes=str(tmp_path / "names.json")), image_side=16)


@pytest.mark.parametrize("labels, read", [("0\n1.0\n002\n", [0, 1, 2]), ("10\n9\n", [10, 9])])
def test_labels_that_are_numbers(labels, read, tmp_path):
    write_csv(tmp_path)
    lines = [f"{i}.png,{label}" for i, label in enumerate(labels.split())]
    (tmp_path / "numbers.csv").write_text("\n".join(["image,label", *lines]))
    (tmp_path / "names.json").write_text(json.dumps([f"class {i}" for i in range(11)]))
    fields = dict(path=str(tmp_path / "numbers.csv"), classes=str(tmp_path / "names.json"))
    assert labelled.open_labelled(spec(**fields), image_side=16).source.labels.tolist() == read


@pytest.mark.parametrize(
    "label, message",
    [
        ("-1", "has label -1"),
        ("99999999", "Expected class numbers from 0, below"),
        ("-9999999999", "has label -9999999999. Expected"),
    ],
)
def test_numbers_that_are_no_classes(label, message, tmp_path):
    write_csv(tmp_path)
    (tmp_path / "numbers.csv").write_text(f"image,label\n0.png,{label}\n1.png,0\n")
    fields = dict(path=str(tmp_path / "numbers.csv"), classes=str(tmp_path / "classes.json"))
    with pytest.raises(InputError, match=message):
        labelled.open_labelled(spec(**fields), image_side=16)


def test_a_linear_probe_may_lack_classes_in_its_test_table(tmp_path):
    write_csv(tmp_path)
    (tmp_path / "train.csv").write_text("image,label\n0.png,ash\n2.png,bone\n4.png,clay\n")
    (tmp_path / "test.csv").write_text("image,label\n5.png,clay\n1.png,ash\n")
    fields = dict(train=str(tmp_path / "train.csv"), path=str(tmp_path / "test.csv"))
    train, test = labelled.open_train_and_test(eval_set("linear_probe", fields), image_side=16)
    assert train.names == test.names == ["ash", "bone", "clay"] and test.source.labels.tolist() == [2, 0]
    batch = next(pipeline.eval_batches(test.source, batch_size=2, image_side=16))
    assert batch["label"].tolist() == [2, 0]
    (tmp_path / "test.csv").write_text("image,label\n5.png,chalk\n")
    with pytest.raises(InputError, match="have different classes"):
        labelled.open_train_and_test(eval_set("linear_probe", fields), image_side=16)


def test_several_captions_in_json_and_lost_rows_of_captions(tmp_path, capsys):
    write_csv(tmp_path)
    rows = [{"image": "0.png", "caption": ["one", " ", "two"]}, {"image": "1.png", "caption": []}, {"image": "2.png"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_captioned(path=str(tmp_path / "c.jsonl"))
    assert found.captions == ["one", "two"] and found.image_of_text.tolist() == [0, 0] and found.source.size == 1
    assert [lost.where.rpartition(" ")[2] for lost in found.source.lost] == ["2", "1"]
    next(pipeline.eval_batches(found.source, batch_size=1, image_side=16))
    assert capsys.readouterr().err.count("bad samples skipped: about 1 samples of") == 2


def test_one_image_may_be_written_in_two_ways(tmp_path):
    write_csv(tmp_path)
    (tmp_path / "c.csv").write_text("image,caption\n0.png,one\n./0.png,two\n1.png,three\n././1.png,four\n")
    found = open_captioned(path=str(tmp_path / "c.csv"))
    assert found.source.size == 2 and found.captions == ["one", "two", "three", "four"]
    assert found.image_of_text.tolist() == [0, 0, 1, 1]


def test_of_labels_and_classes_the_label_that_is_lacking_is_named(tmp_path):
    (tmp_path / "classes.json").write_text('["cat", "dog", "cow"]')
    (tmp_path / "data.csv").write_text("image,label\na.jpg,cat\nb.jpg,horse\n")
    fields = dict(path=str(tmp_path / "data.csv"), classes=str(tmp_path / "classes.json"))
    with pytest.raises(InputError, match="row 1: .*label 'horse' is not in "):
        labelled.open_labelled(spec(**fields), image_side=8)


def test_folders_of_splits_are_no_classes(tmp_path):
    for name in ("train", "Val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").touch()
    with pytest.raises(InputError, match="its folders Val, train are splits, no classes; give one of them"):
        labelled.open_labelled(spec(format="folder", path=str(tmp_path)), image_side=8)


def test_labels_that_look_the_same_are_one_class(tmp_path):
    (tmp_path / "data.csv").write_text("image,label\na.jpg,caf\u00e9\nb.jpg,cafe\u0301\nc.jpg,bar\n", encoding="utf-8")
    found = labelled.open_labelled(spec(path=str(tmp_path / "data.csv")), image_side=16)
    assert found.names == ["bar", "caf\u00e9"] and found.source.labels.tolist() == [1, 1, 0]
