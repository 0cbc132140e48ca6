"""Pictures from the pipeline to the step: the canvas, evaluation's padding, and training with two views."""

import jax
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import order, pipeline, sources, transforms
from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config import complete
from rankclip_jax.models import images
from rankclip_jax.parallel.mesh import make_mesh, to_devices
from rankclip_jax.train import optim
from rankclip_jax.train import step as steps
from rankclip_jax.train.session import canvas_side
from tests.support.made_models import made_state

SPEC = ConfigDict(dict(format="csv", image_key="image", caption_key="caption", delimiter=","))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([f"grey level {i}" for i in range(40)], 400)


def batches(path, tokenizer, **options):
    source = sources.open_source(SPEC, path, image_side=8)
    given = dict(batch_size=4, image_side=8, context_length=12, crop_scale=(0.5, 1.0), seed=1) | options
    return pipeline.TrainBatches(source, tokenizer, **given)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def views(batch, side):
    """As in a step: one program."""
    seen = {key: batch[key] for key in ("image", "size", "windows") if key in batch}
    return np.asarray(jax.jit(images.views, static_argnums=1)(seen, side))


def levels(batch):
    return (batch["image"].reshape(4, -1)[:, 0] // 5).tolist()


def test_on_a_canvas_pictures_come_whole_with_their_size_and_windows(captioned, tokenizer):
    (batch,) = take(batches(captioned, tokenizer, canvas=20), 1)
    assert batch["image"].shape == (4, 20, 20, 3) and batch["windows"].shape == (4, 1, 4)
    np.testing.assert_array_equal(batch["size"], [[12, 16]] * 4)
    for level, image in zip(levels(batch), batch["image"], strict=True):
        assert (image[:12, :16] == 5 * level).all() and not image[12:].any() and not image[:, 16:].any()
    assert np.array_equal(batch["tokens"], tokenizer([f"grey level {level}" for level in levels(batch)], 12))
    (host,) = take(batches(captioned, tokenizer), 1)
    assert host["image"].shape == (4, 8, 8, 3) and levels(host) == levels(batch)
    np.testing.assert_array_equal(views(batch, 8), views(host, 8))


@pytest.mark.parametrize("two_views", [False, True])
def test_a_batch_has_of_every_picture_what_it_has_alone(tmp_path, tokenizer, two_views):
    """JPEGs that fit the canvas are drawn windows for in the batch; of everything else, each by itself."""
    rng, side, canvas, scale, seed = np.random.default_rng(0), 8, 40, (0.3, 1.0), 3
    kinds = {
        "fits.jpg": ("RGB", (30, 40)),
        "just.jpg": ("RGB", (40, 40)),
        "grey.jpg": ("L", (16, 20)),
        "one.jpg": ("RGB", (1, 1)),
        "cmyk.jpg": ("CMYK", (30, 40)),
        "wide.jpg": ("RGB", (30, 41)),
        "large.jpg": ("RGB", (170, 230)),
        "fits.png": ("RGB", (30, 40)),
        "large.png": ("RGB", (80, 50)),
    }
    for name, (mode, (height, width)) in kinds.items():
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / name, quality=90)
    (tmp_path / "set.csv").write_text("image,caption\n" + "".join(f"{name},grey level 1\n" for name in kinds))
    options = dict(canvas=canvas, crop_scale=scale, seed=seed, batch_size=5, two_views=two_views)
    stream = batches(tmp_path / "set.csv", tokenizer, **options)
    source = sources.open_source(SPEC, tmp_path / "set.csv", image_side=side)
    count = 2 if two_views else 1
    for place, batch in enumerate(batch for batch in take(stream, 8) for _ in range(5)):
        data = (tmp_path / list(kinds)[int(order.row_at(source, place, seed))]).read_bytes()
        numbers = transforms.window_numbers((seed, place), count)
        windows_of = lambda size, n=numbers: transforms.windows(n[None], size[None], scale)[0]  # noqa: E731
        alone = transforms.view(tf.constant(data), windows_of, side=side, canvas=canvas, exact=False)
        for key in ("size", "windows"):
            np.testing.assert_array_equal(batch[key][place % 5], alone[key])
        height, width = alone["size"].numpy()
        expected = np.zeros((canvas, canvas, 3), np.uint8)
        expected[:height, :width] = alone["image"]
        np.testing.assert_array_equal(batch["image"][place % 5], expected)


def test_a_jpeg_of_too_many_scans_is_refused_though_it_fits_the_canvas(captioned, tokenizer, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "3.png", "JPEG", quality=100, comment=b"\xff\xda" * 13_000)
    stream = batches(captioned, tokenizer, canvas=400, bad_path=tmp_path / "bad.jsonl")
    take(stream, 10)
    assert stream.bad.reasons == {"a JPEG of more than 2,000,000,000 scans x pixels": 1}


def test_two_views_are_another_window_and_an_edited_caption_and_resume_too(captioned, tokenizer):
    options = dict(canvas=20, two_views=True, synonyms={"grey": ["gray"]})
    all_batches = take(batches(captioned, tokenizer, **options), 10)
    edits = set()
    for batch in all_batches:
        assert batch["windows"].shape == (4, 2, 4) and batch["tokens"].shape == (4, 2, 12)
        assert not np.array_equal(batch["windows"][:, 0], batch["windows"][:, 1])
        for i, tokens in zip(levels(batch), batch["tokens"], strict=True):
            edited = [f"level {i}", f"grey {i}", "grey level", f"level grey {i}", f"grey {i} level", f"{i} level grey",
                      f"gray level {i}"]  # fmt: skip
            assert np.array_equal(tokens[0], tokenizer([f"grey level {i}"], 12)[0])
            edits.add([np.array_equal(tokens[1], ids) for ids in tokenizer(edited, 12)].index(True))
    assert edits == set(range(7))
    resumed = batches(captioned, tokenizer, start=20, **options)
    for batch, expected in zip(take(resumed, 2), all_batches[5:7], strict=True):
        assert all(np.array_equal(batch[key], expected[key]) for key in expected)
    (host,) = take(batches(captioned, tokenizer, two_views=True), 1)
    assert host["image"].shape == (4, 2, 8, 8, 3)


@pytest.mark.parametrize("canvas", [None, 12, 20])
def test_evaluation_pads_with_what_the_device_can_take(captioned, canvas):
    source = sources.open_source(SPEC, captioned, image_side=8)
    *_, last = pipeline.eval_batches(source, batch_size=32, image_side=8, canvas=canvas)
    pixels = views(last, 8)
    assert pixels.shape == (32, 1, 8, 8, 3) and last["mask"].tolist() == [True] * 8 + [False] * 24
    for level, image in zip(range(32, 40), pixels[:8], strict=True):
        assert (image == 5 * level).all()
    assert not pixels[8:].any()


def contrastive(a_BxD, b_BxD, scale):
    logits = scale * a_BxD @ b_BxD.T
    return sum(np.mean(np.log(np.exp(x).sum(axis=1)) - np.diag(x)) for x in (logits, logits.T)) / 2


@pytest.mark.parametrize(
    "objective, devices, accumulate",
    [
        pytest.param("clip", 1, 4, marks=pytest.mark.slow),
        pytest.param("rankclip", 8, 1, marks=pytest.mark.slow),
    ],
)
def test_two_views_share_the_weight_of_the_contrastive_term(objective, devices, accumulate):
    loss = {"objective": objective, "schedule": "constant"}
    config = complete({"batch_size": 16, "accumulate": accumulate, "data": {"two_views": True}, "loss": loss})
    text = dict(width=32, heads=2, layers=1, vocab_size=64, eot_id=63, context_length=8)
    model = models.build("ViT-tiny", image_size=16, vision=dict(width=32, layers=1, heads=2), text=text)
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    tx = optim.make_optimizer(config.optim, 20_000)
    state = made_state(model, tx, mesh, config.sharding)
    rng = np.random.default_rng(0)
    pictures = {
        "image": rng.integers(0, 256, (16, 20, 20, 3), np.uint8),
        "size": np.full((16, 2), 20, np.int32),
        "windows": np.tile(np.float32([[0, 0, 18, 17], [2, 3, 16, 16]]), (16, 1, 1)),
    }
    tokens = rng.integers(1, 63, (16, 2, 8), np.int32)
    tokens[..., -1] = 63

    embed = steps.make_embed_step(model)
    z = {}
    for view in (0, 1):  # by the evaluation's step, a view at a time
        one = pictures | {"windows": pictures["windows"][:, [view]]}
        for name, batch in (("image", one), ("text", {"tokens": tokens[:, view]})):
            z[name, view] = np.float64(embed(state, to_devices(batch, mesh)))
    scale = np.exp(float(state.params["logit_scale"]))
    clip = contrastive(z["image", 0], z["text", 0], scale)
    second = sum(contrastive(z[name, 0], z[name, 1], scale) for name in ("image", "text")) / 2

    train_step = steps.make_train_step(model, tx, config, mesh, total_steps=20_000, steps_per_epoch=100)
    _, metrics = train_step(state, to_devices(pictures | {"tokens": tokens}, mesh))
    metrics = {key: float(value) for key, value in metrics.items()}
    assert metrics["clip"] == pytest.approx(clip, rel=1e-5)
    assert metrics["clip_second_view"] == pytest.approx(second, rel=1e-5)
    ranking = sum(metrics.get(key, 0.0) for key in ("rank_in_modal", "rank_cross_modal")) / 16
    assert (ranking > 0) == (objective == "rankclip")
    assert metrics["loss"] == pytest.approx((clip + second) / 2 + ranking, rel=1e-5)


def test_the_canvas_is_chosen_from_the_image_size_unless_it_is_given():
    def side(image_size, **data):
        return canvas_side(complete({"data": {"format": "csv"} | data}), image_size)

    assert (side(224), side(32), side(224, canvas=300), side(224, resize="host")) == (408, 64, 300, None)
    assert side(48, format="shapes") == 48  # drawn at the model's own size
    with pytest.raises(InputError, match=r"config.data.canvas=100 is less than the model's image_size, 224"):
        side(224, canvas=100)


def test_two_views_need_a_contrastive_term():
    without = {"weight": 0.0, "schedule": "constant"}
    for loss in ({"objective": "siglip"}, {"terms": {"clip": 0.0}}, {"objective": "rank", "terms": {"clip": without}}):
        with pytest.raises(InputError, match=r"two_views adds to the contrastive term, and config.loss.objective="):
            steps.loss_spec(complete({"data": {"two_views": True}, "loss": loss}))
    given = complete({"data": {"two_views": True}, "loss": {"objective": "siglip", "terms": {"clip": 1.0}}})
    assert steps.loss_spec(given).weights() == {"siglip": 1.0, "clip": 1.0}


def test_resize_is_a_choice():
    with pytest.raises(InputError, match=r"config.data.resize='gpu'. Expected one of device, host"):
        complete({"data": {"resize": "gpu"}})
