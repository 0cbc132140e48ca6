"""The pictures of a study: as the pipeline reads them, in the view of a training."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from input_pipeline import shapes
from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.models import images
from rankclip_jax.study import results
from rankclip_jax.study.batches import batch_of
from rankclip_jax.study.data import read_labelled, read_pairs, view_of
from rankclip_jax.study.runs import Study, split
from tests.study.test_study import smoke
from tests.support.source_files import LAYOUTS, WRITERS, samples


def _csv(folder, count=6):
    rng = np.random.default_rng(0)
    rows = ["image,caption,label"]
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(f'{i}.png,"a picture, number {i}",{i % 2}')
    (folder / "all.csv").write_text("\n".join(rows))
    return configs.complete({"data": {"format": "csv", "train": str(folder / "all.csv")}}).data


@pytest.mark.slow
def test_batches_hold_the_pictures_that_pil_gives(tmp_path):
    data = _csv(tmp_path)
    pairs = read_pairs(data, data.train, side=16, canvas=32, split="train")
    assert pairs.captions[2] == "a picture, number 2" and pairs.size[2].tolist() == [22, 30]
    arrays = {"image": jnp.asarray(pairs.canvas), "size": jnp.asarray(pairs.size), "tokens": jnp.arange(6)[:, None]}
    rows = jnp.array([4, 0, 2])
    batch = batch_of(arrays, rows, jax.random.key(0), (0.5, 1.0))
    views = np.asarray(images.views(batch, 16)[:, 0]).astype(int)
    for view, row, window in zip(views, rows, np.asarray(batch["windows"][:, 0]), strict=True):
        top, left, height, width = map(float, window)
        picture = Image.open(tmp_path / f"{row}.png")
        box = (left, top, left + width, top + height)
        expected = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC, box=box)).astype(int)
        assert abs(view - expected).max() <= 1
    assert batch["tokens"][:, 0].tolist() == [4, 0, 2]
    assert read_pairs(data, data.train, side=16, canvas=32, split="train", limit=2).captions == pairs.captions[:2]
    shrunk = read_pairs(data, data.train, side=8, canvas=15, split="train")
    assert shrunk.size.max() == 15 and view_of(shrunk, 8).shape == (6, 8, 8, 3)


def test_scenes_are_those_of_the_pipeline():
    pairs = read_pairs(smoke().data, 5, side=16, canvas=16, split="train")
    image, caption, _ = shapes.draw("train", 3, 16)
    assert np.array_equal(pairs.canvas[3], image) and pairs.captions[3] == caption
    found = read_labelled("held_out", smoke().eval.zero_shot.held_out, side=16)  # held_out:16
    image, _, label = shapes.draw("held_out", 15, 16)
    assert np.array_equal(found.images[15], image) and found.labels[15] == label and len(found.labels) == 16


def test_labelled_sets_split_into_what_chooses_and_what_is_reported(tmp_path):
    _csv(tmp_path)
    (tmp_path / "names.json").write_text('["even", "odd"]')
    spec = configs.complete(
        {"eval": {"zero_shot": {"a": dict(path=str(tmp_path / "all.csv"), classes=str(tmp_path / "names.json"))}}}
    ).eval.zero_shot.a
    labelled = read_labelled("a", spec, side=8)
    assert labelled.labels.tolist() == [0, 1, 0, 1, 0, 1] and labelled.names == ["even", "odd"]
    first, rest = split(labelled, 1 / 3)
    assert len(first.labels) == 2 and np.array_equal(np.concatenate([first.images, rest.images]), labelled.images)
    with pytest.raises(InputError, match="select_share"):
        split(labelled, 0.01)


def test_what_cannot_be_read_is_one_line(tmp_path):
    data = _csv(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"all\.csv row 3: .*3\.png: .*not an image.*; a study needs every sample"):
        read_pairs(data, data.train, side=16, canvas=32, split="train")
    with open(tmp_path / "all.csv", "a") as table:
        table.write("\n6.png")
    with pytest.raises(InputError, match=r"all\.csv row 6: wrong number of fields.*; a study needs every sample"):
        read_pairs(data, data.train, side=16, canvas=32, split="train", limit=2)
    with pytest.raises(InputError, match="no such file"):
        read_pairs(data, str(tmp_path / "none.csv"), side=16, canvas=32, split="train")
    data.caption_key = "text"
    with pytest.raises(InputError, match="no column 'text'; its columns are: image, caption, label"):
        read_pairs(data, data.train, side=16, canvas=32, split="train")
    (tmp_path / "two.csv").write_text("image,caption\n0.png,a\n1.png,b")
    parts = {name: {"path": str(tmp_path / "two.csv"), "weight": weight} for name, weight in (("a", 1), ("b", 2))}
    data = configs.complete({"data": {"format": "csv", "train": parts}}).data
    with pytest.raises(InputError, match="a study reads every row once: leave the weights"):
        read_pairs(data, data.train, side=16, canvas=32, split="train")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_every_format_of_training_gives_the_same_arrays(layout, tmp_path):
    made = samples(5)
    kind = "tfds" if layout.startswith("tfds") else layout
    data = configs.complete({"data": {"format": kind, "train": WRITERS[layout](tmp_path, made)}}).data
    pairs = read_pairs(data, data.train, side=8, canvas=12, split="train")
    assert pairs.captions == [caption for _, caption in made]
    for i, (encoded, _) in enumerate(made):
        expected = np.zeros((12, 12, 3), np.uint8)
        height, width = pairs.size[i]
        expected[:height, :width] = np.asarray(Image.open(io.BytesIO(encoded)))
        assert np.array_equal(pairs.canvas[i], expected)


def test_labelled_sets_follow_the_rules_of_evaluations(tmp_path):
    for i, wordnet_id in enumerate(("n02119789", "n02120079")):  # of ImageNet's table: kit fox, Arctic fox
        (tmp_path / wordnet_id).mkdir()
        Image.new("RGB", (9, 9), (100 * i, 0, 0)).save(tmp_path / wordnet_id / "0.png")
    fields = dict(format="folder", path=str(tmp_path), protocol="simple", protocol_set="imagenet")
    spec = configs.complete({"eval": {"zero_shot": {"mine": fields}}}).eval.zero_shot.mine
    found = read_labelled("mine", spec, side=8)
    assert found.names == ["kit fox", "Arctic fox"] and found.templates == ["a photo of a {}."]
    assert found.labels.tolist() == [0, 1] and found.images[:, 0, 0].tolist() == [[0, 0, 0], [100, 0, 0]]


BILINEAR = pytest.param(["data.squash=bilinear"], "bilinear", marks=pytest.mark.slow)


@pytest.mark.parametrize("changes, how", [([], "no"), BILINEAR, (["siglip"], "bicubic")])
def test_pictures_are_measured_in_the_view_of_a_training(tmp_path, changes, how):
    """CLIP's central square, or SigLIP's squashed one: as asked for, or as usual for the model's kind."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 44, 3)).astype(np.uint8)) for _ in range(4)]
    rows = ["image,caption,label"]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,picture {number},{'ab'[number % 2]}")
    (tmp_path / "all.csv").write_text("\n".join(rows))
    table = str(tmp_path / "all.csv")
    files = [f"data.train={table}", f"data.val={table}", "data.format=csv", "data.canvas=44", "batch_size=4"]
    files += [f"eval.zero_shot={{'a': {{'path': {table!r}}}}}", "study.pairs=4", "study.select_on=()"]
    if changes == ["siglip"]:
        changes = ["model.vision.pool=map", "model.text.pool=last", "model.embed_dim=16"]
    made = Study(smoke(*files, *changes), tmp_path / "study")
    if how == "no":
        whole = [picture.resize((16 * 44 // 20, 16), Image.Resampling.BICUBIC) for picture in pictures]
        expected = [np.asarray(picture.crop((9, 0, 25, 16))) for picture in whole]  # (35 - 16) // 2
    else:
        expected = [np.asarray(picture.resize((16, 16), Image.Resampling[how.upper()])) for picture in pictures]
    assert np.array_equal(made._val[0], expected)
    labelled = np.concatenate([made._selecting["a"].images, made._reported["a"].images])
    assert np.array_equal(labelled, expected)
    half = (0.5, 0.5, 0.5) if how == "bicubic" else None
    assert made._configs[made.arms[0]].data.mean == made.config.data.std == half
    assert results.identity(made.config)["data"]["squash"] == how
