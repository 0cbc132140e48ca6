"""Figures show what they are given, and an untrained model is that of step 0."""

import base64
import io
import json

import jax
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from rankclip_jax import figures
from rankclip_jax.evaluation.geometry import geometry
from rankclip_jax.figures import names
from rankclip_jax.inference import model as inference
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.train import optim
from rankclip_jax.train import step as steps
from rankclip_jax.train.session import build_model
from rankclip_jax.weights import pretrained
from tests.support.made_models import VIT, make_workdir


def write_metrics(folder, *rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_curves_of_two_runs_share_their_axes_and_a_run_without_numbers_is_left_out(tmp_path):
    rows = (
        {"step": 1, "clip": 2.0},
        {"step": 2, "clip": 1.0, "zero_shot/x/top1": 0.5, "geometry/g/spearman_in_modal": 0.1},
    )
    runs = {name: write_metrics(tmp_path / name, *rows) for name in ("a", "b")}
    loss, top, rank = figures.curves(runs | {"not yet": tmp_path / "none"}).axes
    assert [line.get_label() for line in loss.lines] == ["a, training", "b, training"]
    assert loss.lines[0].get_color() != loss.lines[1].get_color()
    assert [list(line.get_ydata()) for line in top.lines] == [[50.0], [50.0]]
    assert [list(line.get_ydata()) for line in rank.lines] == [[0.1], [0.1]]


def test_confusion_keeps_the_classes_that_were_shown_or_said():
    counts = np.zeros((5, 5), int)
    counts[1, 1], counts[1, 4] = 3, 1
    axes = figures.confusion({"run": {"classes": np.array(list("abcde")), "confusion": counts}}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["b", "e"]
    assert [text.get_text() for text in axes.texts] == ["75", "25"]


def test_gallery_frames_the_right_answers():
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    picture = base64.b64encode(out.getvalue()).decode()
    texts = [{"caption": "x", "right": False}, {"caption": "costs $5 or $6", "right": True}]
    answers = [{"picture": picture, "right": right} for right in (True, False)]
    found = {"image_to_text": [{"picture": picture, "answers": texts}],
             "text_to_image": [{"caption": "y", "answers": answers}]}  # fmt: skip
    figure = figures.gallery(found)
    figure.savefig(io.BytesIO())
    bold = [text.get_text() for text in figure.findobj(Text) if text.get_weight() == "bold"]
    assert bold == ["2. costs $5 or $6 ✓"]
    frames = [axes.spines["top"].get_linewidth() for axes in figure.axes if axes.spines["top"].get_visible()]
    assert len(frames) == 2 and frames[0] > frames[1]


def test_rankings_that_agree_lie_on_the_diagonal():
    z = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    figure = figures.similarities({"same": (z, z)}, {"same": geometry(z, z)})
    places = [axes.collections[0].get_array() for axes in figure.axes if axes.get_title().endswith("Spearman 1.00")]
    assert len(places) == 2
    for counts in places:
        counts = np.asarray(counts).reshape(16, 16)
        assert np.trace(counts) == counts.sum() > 0


def test_search_results_come_in_rows_of_ten_under_their_text():
    pictures = np.arange(2 * 13, dtype=np.uint8).reshape(2, 13, 1, 1, 1) * np.ones((4, 4, 3), np.uint8)
    notes = [[f"{text}{i}" for i in range(13)] for text in "ab"]
    figure = figures.matches(["a $", "b $"], pictures, notes)
    figure.savefig(io.BytesIO())
    axes_4x10 = np.reshape(figure.axes, (4, 10))
    shown = [[axes.get_xlabel() for axes in row if axes.axison] for row in axes_4x10]
    assert shown == [notes[0][:10], notes[0][10:], notes[1][:10], notes[1][10:]]
    assert [axes.get_title(loc="left") for axes in axes_4x10[:, 0]] == ["a $", "", "b $", ""]
    assert [axes.images[0].get_array()[0, 0, 0] for axes in axes_4x10[2]] == list(range(13, 23))
    assert [text.get_text() for text in figure.findobj(Text) if text.get_parse_math() and text.get_text()] == []


@pytest.mark.slow
def test_many_search_results_fit_into_a_picture():
    figure = figures.matches(["a"] * 270, np.zeros((270, 1, 2, 2, 3), np.uint8), [[""]] * 270)
    assert max(figure.get_size_inches() * figure.dpi) < 2**16


def test_choices_come_in_order():
    figure = figures.choices(Image.new("L", (9, 9)), ["a", "b", "c"], np.array([0.2, 0.7, 0.1]), most=2)
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["b", "a"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["70.0 %", "20.0 %"]


@pytest.mark.slow
def test_an_untrained_model_is_what_training_starts_from(tmp_path):
    one_layer = {tower: VIT[tower] | {"layers": 1} for tower in ("vision", "text")}
    trained = pretrained.read(make_workdir(tmp_path / "run", VIT | one_layer))
    fresh = pretrained.untrained(trained)
    tx = optim.make_optimizer(trained.run.optim, 10)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    state = steps.Fresh(build_model(trained.run, trained.tokenizer), tx, 0, mesh, None).state()
    jax.tree.map(np.testing.assert_array_equal, fresh.variables["params"], jax.device_get(state.params))
    z = inference.Model(fresh).encode_text(["a cat", "a dog"])
    assert not np.allclose(z, inference.Model(trained).encode_text(["a cat", "a dog"]))


def test_curves_have_a_panel_for_what_was_measured_and_no_empty_one(tmp_path):
    rows = [{"step": 1, "loss": 2.0, "clip": 2.0}, {"step": 1, "retrieval/coco/2017/image_to_text_r1": 0.25}]
    _, recall = figures.curves({"": write_metrics(tmp_path / "a", *rows)}).axes
    assert (recall.get_title(), recall.get_ylabel()) == ("Retrieval", "R@1 (%)")
    (line,) = recall.lines
    assert (line.get_label(), list(line.get_ydata())) == ("coco/2017, image to text", [25.0])
    (rank,) = figures.curves({"": write_metrics(tmp_path / "b", {"step": 3, "loss": 1.0})}).axes
    assert [line.get_label() for line in rank.lines] == ["Loss, all terms"]
    (none,) = figures.curves({"": tmp_path / "none"}).axes
    assert not none.axison


def test_runs_without_a_common_clip_term_show_their_losses(tmp_path):
    rows = {"a": {"step": 1, "loss": 2.0, "clip": 2.0}, "b": {"step": 1, "loss": 3.0, "siglip": 3.0}}
    (loss,) = figures.curves({name: write_metrics(tmp_path / name, row) for name, row in rows.items()}).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[2.0], [3.0]]


def test_of_many_classes_the_confused_ones_are_drawn_with_their_names():
    counts = 10 * np.eye(100, dtype=int)
    counts[70, 90], counts[95, 3] = 4, 2
    axes = figures.confusion({"": {"classes": np.array([f"c{i}" for i in range(100)]), "confusion": counts}}).axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert {"c3", "c70", "c90", "c95"} <= {label.get_text() for label in labels} and len(labels) == 40


def test_examples_say_what_a_picture_is_and_was_taken_for():
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    one = {"picture": base64.b64encode(out.getvalue()).decode(), "label": "ash", "predicted": "bone"}
    figure = figures.examples({"right": [one], "wrong": [one, one]})
    assert [axes.get_xlabel() for axes in figure.axes if axes.axison] == ["is ash", *["is ash\ntaken for bone"] * 2]


@pytest.mark.parametrize(
    "key, title, share",
    [
        ("clip", "CLIP term", False),
        ("val/clip", "CLIP term, validation", False),
        ("val/clip/ema", "CLIP term, validation, averaged weights", False),
        ("zero_shot/seen/ema/top1", "Zero-shot top-1, seen/ema", True),
        ("data_wait", "Time spent waiting for data", True),
        ("zero_shot/coco/2017/top1", "Zero-shot top-1, coco/2017", True),
        ("retrieval/scenes/text_to_image_r5", "Retrieval text to image, R@5, scenes", True),
        ("geometry/scenes/spearman_in_modal", "Rank agreement, image-image with text-text, scenes", False),
        ("something_of_mine", "Something of mine", False),
    ],
)
def test_each_number_has_a_name_to_read(key, title, share):
    assert names.metric(key)[::2] == (title, share)


def test_every_number_of_a_training_line_has_a_name():
    """Of what train/recorder.py and the objectives make."""
    recorded = {"learning_rate", "images_per_second", "images_read_per_second", "data_wait", "tflops_per_device", "mfu"}
    recorded |= {"padded_steps"}
    terms = {"clip", "siglip", "rank_in_modal", "rank_cross_modal", "cyclic_in_modal", "cyclic_cross_modal"}
    assert recorded | terms | {"loss", "grad_norm", "logit_scale", "logit_bias", "rank_weight"} == names.TRAINING.keys()
