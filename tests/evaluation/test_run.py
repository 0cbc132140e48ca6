"""All evaluations together, with a model of known embeddings: exact numbers, missing sets, what is left behind."""

import base64
import json

import jax
import numpy as np
import pytest
from PIL import Image

from input_pipeline import labelled, pipeline
from rankclip_jax import config as configs
from rankclip_jax import evaluation
from rankclip_jax.common import pictures
from rankclip_jax.common.errors import InputError
from rankclip_jax.evaluation import tables

NAMES = ["ash", "bone", "clay"]
# Grey level of an image -> what the model takes it for. Level 40 lies between bone and clay, nearer to clay.
SEES = {10: [1, 0, 0], 20: [0, 1, 0], 30: [0, 0, 1], 40: [0, 0.6, 0.8]}


class KnownModel:
    """Embeds a picture by its grey level and a text by the class that its last word names."""

    def __init__(self):
        self.texts_seen = []

    def images(self, batch):
        greys = batch["image"].reshape(len(batch["mask"]), -1).max(axis=1)
        return np.array([SEES.get(int(grey), [0, 0, 0]) for grey in greys], np.float32)

    def texts(self, texts):
        self.texts_seen += texts
        return np.eye(3, dtype=np.float32)[[NAMES.index(text.rstrip(".").split()[-1]) for text in texts]]

    def encoder(self):
        batches = lambda source: pipeline.eval_batches(source, batch_size=4, image_side=8)  # noqa: E731
        return evaluation.Encoder(self.images, self.texts, batches, 8, jax.devices()[1])


def write_set(folder, greys_and_names):
    for i, (grey, name) in enumerate(greys_and_names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def config_of(**fields):
    return configs.complete({"eval": fields}).eval


def evaluated(config, model, **arguments):
    return evaluation.evaluate(config, model.encoder(), evaluation.open_sets(config, image_side=8), **arguments)


def test_zero_shot_with_mistakes_a_batch_that_is_not_full_and_fewer_classes_than_k(tmp_path):
    path = write_set(tmp_path, [(10, "ash"), (20, "ash"), (20, "bone"), (40, "bone"), (30, "clay"), (30, "clay")])
    results = evaluated(config_of(zero_shot={"x": dict(format="folder", path=path)}), KnownModel())
    per_class = (1 / 2 + 1 / 2 + 1) / 3
    # Ranks of the right class: ash 0, 1; bone 0, 1; clay 0, 0.
    counts = {"n": 6, "classes": 3}
    assert results["zero_shot"] == {"x": {"top1": 4 / 6, "top3": 1.0, "mean_per_class": per_class, **counts}}
    assert results["missing"] == {} and results["robustness"] == {}


@pytest.mark.slow
def test_the_numbers_of_a_training_are_known_before_it_begins(tmp_path):
    greys = [(10, "ash"), (20, "bone"), (30, "clay")] * 4
    path = write_set(tmp_path / "x", [(grey, name) for grey, name in greys])
    files = sorted((tmp_path / "x").rglob("*.png"))
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\n" + "".join(f"{file},a {file.parent.name}\n" for file in files[:7]))
    sets = {"x": dict(format="folder", path=path)}
    fields = dict(
        zero_shot=sets | {"y": sets["x"]},
        linear_probe={"x": sets["x"] | {"train": path}},
        retrieval={"pairs": dict(path=str(table))},
        geometry={"pairs": dict(path=str(table))},
        robustness=dict(reference="x", shifted=("y", "gone")),
    )
    config, model = config_of(**fields), KnownModel()
    opened = evaluation.open_sets(config, image_side=8)
    found = evaluation.flat(evaluation.evaluate(config, model.encoder(), opened))
    assert sorted(evaluation.number_names(config, opened)) == sorted(found) and len(found) > 20


def test_a_missing_set_is_named_and_the_others_are_evaluated(tmp_path):
    path = write_set(tmp_path / "x", [(10, "ash"), (20, "bone"), (30, "clay")])
    fields = dict(
        zero_shot={
            "gone": dict(format="clip_benchmark", path="gone", hint="it is at example.org"),
            "x": dict(format="folder", path=path),
            "odd": dict(format="folder", path=path, protocol="openai", protocol_set="dtd"),
        },
        retrieval={"r": dict(path="r.csv")},
        geometry={"g": dict(path="g.csv")},
        linear_probe={"l": dict(format="folder", path=path, train="train")},
        suite=["dtd"],
        data_dir=str(tmp_path),
    )
    results = evaluated(config_of(**fields), KnownModel())
    assert results["zero_shot"]["x"]["top1"] == 1.0
    assert list(results["missing"]) == [
        "zero_shot/dtd", "zero_shot/gone", "zero_shot/odd", "retrieval/r", "linear_probe/l", "geometry/g",
    ]  # fmt: skip
    assert "gone/test/nshards.txt" in results["missing"]["zero_shot/gone"]
    assert "example.org" in results["missing"]["zero_shot/gone"]
    assert "wds_vtab-dtd" in results["missing"]["zero_shot/dtd"]
    assert f"tfds build dtd --data_dir={tmp_path}" in results["missing"]["zero_shot/dtd"]
    assert "has no class 'ash' in dtd" in results["missing"]["zero_shot/odd"]
    assert "missing: zero_shot/gone: no such file" in evaluation.text(results)


def test_a_set_of_which_no_image_can_be_read_does_not_stop_the_others(tmp_path):
    (tmp_path / "bad" / "ash").mkdir(parents=True)
    (tmp_path / "bad" / "ash" / "0.png").write_text("no image")
    (tmp_path / "bad.csv").write_text("image,caption\nbad/ash/0.png,some ash\n")
    bad, fine = str(tmp_path / "bad"), write_set(tmp_path / "fine", [(10, "ash"), (20, "bone"), (30, "clay")])
    fields = dict(
        zero_shot={"bad": dict(format="folder", path=bad), "fine": dict(format="folder", path=fine)},
        retrieval={"bad": dict(path=str(tmp_path / "bad.csv"))},
        geometry={"bad": dict(path=str(tmp_path / "bad.csv"))},
    )
    results = evaluated(config_of(**fields), KnownModel())
    assert list(results["zero_shot"]) == ["fine"]
    assert results["missing"] == dict.fromkeys(
        ["zero_shot/bad", "retrieval/bad", "geometry/bad"], "no readable image in this set"
    )


def test_the_suite_needs_known_sets_and_a_folder():
    with pytest.raises(InputError, match=r"unknown set 'mnist'. Expected all, or some of caltech101"):
        evaluated(config_of(suite="mnist", data_dir="x"), KnownModel())
    with pytest.raises(InputError, match="config.eval.suite is set but config.eval.data_dir is not"):
        evaluated(config_of(suite="all"), KnownModel())


def test_the_whole_suite_names_what_is_missing_of_all_eighteen_sets(tmp_path):
    missing = evaluated(config_of(suite="all", data_dir=str(tmp_path)), KnownModel())["missing"]
    assert len(missing) == 18 and all("datasets/clip-benchmark/wds_" in reason for reason in missing.values())


def write_captions(tmp_path, rows):
    for grey in SEES:
        Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(tmp_path / f"{grey}.png")
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f"{image}.png,{text}\n" for image, text in rows))
    return dict(path=str(tmp_path / "c.csv"))


def test_retrieval_with_several_captions_and_ties(tmp_path):
    rows = [(10, "some ash"), (20, "a bone"), (10, "grey ash"), (40, "wet clay"), (30, "dry clay")]
    results = evaluated(config_of(retrieval={"r": write_captions(tmp_path, rows)}), KnownModel())
    # Image to text: 10 finds ash at once; 20 its bone; 40 and 30 find each other's clay as near as their own: second.
    # Text to image: both ash and the bone at once; "wet clay" is nearest to 30, and "dry clay" too.
    assert results["retrieval"]["r"] == {
        "image_to_text_r1": 2 / 4, "image_to_text_r5": 1.0, "text_to_image_r1": 4 / 5, "images": 4, "texts": 5,
    }  # fmt: skip


def test_an_image_that_cannot_be_read_is_left_out_with_its_captions(tmp_path, capsys):
    fields = write_captions(tmp_path, [(10, "some ash"), (99, "a bone"), (20, "old bone"), (30, "dry clay")])
    results = evaluated(config_of(retrieval={"r": fields}, geometry={"g": fields}), KnownModel())
    assert results["retrieval"]["r"]["images"] == results["retrieval"]["r"]["texts"] == 3
    assert results["retrieval"]["r"]["image_to_text_r1"] == 1.0
    assert results["geometry"]["g"]["alignment"] == pytest.approx(0) and results["geometry"]["g"]["n"] == 3
    assert "99.png" in capsys.readouterr().err


def test_geometry_takes_the_first_images_with_their_first_captions(tmp_path):
    rows = [(10, "some ash"), (10, "a clay"), (20, "old bone"), (30, "dry clay"), (40, "an ash")]
    fields = write_captions(tmp_path, rows) | dict(sample=3)
    model = KnownModel()
    results = evaluated(config_of(geometry={"g": fields}), model)
    assert results["geometry"]["g"]["n"] == 3 and model.texts_seen == ["some ash", "old bone", "dry clay"]


@pytest.mark.slow
def test_linear_probe_on_folders(tmp_path):
    train = write_set(tmp_path / "train", [(grey, name) for grey, name in zip((10, 20, 30), NAMES, strict=True)] * 10)
    test = write_set(tmp_path / "test", [(10, "ash"), (20, "bone"), (30, "clay"), (20, "clay")])
    fields = dict(format="folder", train=train, path=test)
    results = evaluated(config_of(linear_probe={"l": fields}), KnownModel())
    row = results["linear_probe"]["l"]
    assert (row["top1"], row["mean_per_class"], row["n"]) == (3 / 4, (1 + 1 + 1 / 2) / 3, 4)


def test_robustness_counts_the_reference_over_the_shifted_sets_classes_only(tmp_path):
    reference = write_set(
        tmp_path / "reference", [(10, "ash"), (20, "bone"), (20, "bone"), (40, "bone"), (30, "clay"), (10, "clay")]
    )
    shifted = write_set(tmp_path / "shifted", [(10, "ash"), (40, "bone"), (30, "bone"), (20, "ash")])
    (tmp_path / "b.json").write_text(json.dumps({"s": [[0.5, 0.25], [0.8, 0.5]]}))
    fields = dict(
        zero_shot={"r": dict(format="folder", path=reference), "s": dict(format="folder", path=shifted)},
        robustness=dict(reference="r", shifted=["s", "absent"], baselines=str(tmp_path / "b.json")),
    )
    results = evaluated(config_of(**fields), KnownModel())
    # Of ash and bone alone: reference 4 of 4 (40 is bone when clay is no choice); shifted: ash right, 40 bone, 30
    # has 0 for both and the lower number, ash, comes first, 20 is bone.
    assert results["zero_shot"]["r"]["top1"] == 4 / 6
    assert results["robustness"] == {"s": {"reference": 1.0, "shifted": 2 / 4, "drop": 1 / 2}}
    assert "robustness" in evaluation.text(results)


def test_a_shifted_set_of_classes_without_images_in_the_reference_costs_the_reference_nothing(tmp_path):
    reference = write_set(tmp_path / "reference", [(10, "ash"), (20, "bone")])
    (tmp_path / "reference" / "clay").mkdir()
    shifted = write_set(tmp_path / "shifted", [(30, "clay")])
    fields = dict(
        zero_shot={"r": dict(format="folder", path=reference), "s": dict(format="folder", path=shifted)},
        robustness=dict(reference="r", shifted=["s"]),
    )
    results = evaluated(config_of(**fields), KnownModel())
    assert results["zero_shot"]["r"]["top1"] == 1 and results["robustness"] == results["missing"] == {}
    with pytest.raises(InputError, match="baselines: no such file"):  # before anything is evaluated
        evaluation.open_sets(config_of(robustness={"baselines": "gone.json"}), image_side=8)


def test_what_a_protocol_leaves_out_is_not_counted(tmp_path):
    # Two of ImageNet's classes, of which ImageNet-A has only the second (stingray).
    path = write_set(tmp_path, [(10, "n01440764"), (20, "n01498041"), (30, "n01498041")])
    model = KnownModel()
    model.texts = lambda texts: np.tile(np.array([[0, 1, 0]], np.float32), (len(texts), 1))
    fields = dict(zero_shot={"imagenet_a": dict(format="folder", path=path, protocol="simple")})
    results = evaluated(config_of(**fields), model)
    assert results["zero_shot"]["imagenet_a"]["n"] == 2


def test_what_the_report_needs_is_left_in_the_folder(tmp_path, monkeypatch):
    path = write_set(tmp_path / "x", [(10, "ash"), (40, "bone"), (30, "clay")])
    captions = write_captions(tmp_path, [(10, "some ash"), (20, "a bone"), (30, "dry clay")])
    sets = dict(zero_shot={"x": dict(format="folder", path=path)}, retrieval={"r": captions}, geometry={"g": captions})
    shown, read, thumbnail = {}, [], labelled.thumbnail
    monkeypatch.setattr(labelled, "thumbnail", lambda of, row: read.append((id(of), row)) or thumbnail(of, row))
    evaluated(config_of(**sets), KnownModel(), folder=tmp_path / "eval", shown=shown)
    assert len(read) == len(set(read)) == 6  # each picture of x and of r once
    stored = np.load(tmp_path / "eval" / "zero_shot_x.npz")
    assert stored["classes"].tolist() == NAMES
    np.testing.assert_array_equal(stored["confusion"], [[1, 0, 0], [0, 0, 1], [0, 0, 1]])
    examples = json.loads((tmp_path / "eval" / "examples_x.json").read_text())
    said = {which: [(each["label"], each["predicted"]) for each in some] for which, some in examples.items()}
    assert said == {"right": [("ash", "ash"), ("clay", "clay")], "wrong": [("bone", "clay")]}
    assert pictures.read(base64.b64decode(examples["wrong"][0]["picture"])).size == (8, 8)
    gallery = json.loads((tmp_path / "eval" / "retrieval_r.json").read_text())
    assert shown == {"zero_shot/x": examples, "retrieval/r": gallery}
    assert gallery["image_to_text_wrong"] == gallery["text_to_image_wrong"] == []
    assert gallery["image_to_text"][1]["answers"][0] == {"caption": "a bone", "right": True}
    assert [a["right"] for a in gallery["text_to_image"][2]["answers"]] == [True, False, False]
    geometry = np.load(tmp_path / "eval" / "geometry_g.npz")
    assert geometry["image"].shape == (3, 2) and geometry["positive"].sum() == 3
    np.testing.assert_allclose(geometry["image"], geometry["text"])


def test_due_says_which_evaluations_an_epoch_has():
    config = config_of(every_epochs=2, every=dict(retrieval=3, linear_probe=None, geometry=1))
    assert evaluation.due(config, 1, last=False) == ("geometry",)
    assert evaluation.due(config, 6, last=False) == ("zero_shot", "retrieval", "geometry")
    assert evaluation.due(config, 7, last=True) == ("zero_shot", "retrieval", "geometry")


def test_flat_names_every_number_but_counts():
    results = {"zero_shot": {"x": {"top1": 0.5, "n": 4}}, "geometry": {"g": {"alignment": 1.0}}, "missing": {"a": "b"}}
    assert evaluation.flat(results) == {"zero_shot/x/top1": 0.5, "geometry/g/alignment": 1.0}
    assert evaluation.text({"missing": {}}) == ""
    assert evaluation.counts(results) == {"zero_shot/x": {"n": 4}}


def test_a_table_of_plain_numbers_has_no_per_cent():
    assert tables.table({"gap": {"x": 0.25}}, "geometry", percent=False).splitlines()[1].split() == ["gap", "0.25"]


def test_averaged_weights_stand_beside_as_sets_of_their_own():
    last = {"zero_shot": {"a": {"top1": 0.5}}, "missing": {"zero_shot/b": "not there"}}
    mean = {"zero_shot": {"a": {"top1": 0.6}}, "missing": {"zero_shot/b": "not there", "zero_shot/c": "broke"}}
    both = evaluation.beside(last, mean)
    assert both["zero_shot"] == {"a": {"top1": 0.5}, "a/ema": {"top1": 0.6}}
    assert both["missing"] == {"zero_shot/b": "not there", "zero_shot/c/ema": "broke"}
    assert evaluation.flat(both) == {"zero_shot/a/top1": 0.5, "zero_shot/a/ema/top1": 0.6}
