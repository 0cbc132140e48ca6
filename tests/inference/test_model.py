"""load, encode_image, encode_text, zero_shot: against the model applied by hand, and transformers' image processor."""

import functools
import io
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import rankclip_jax
from benchmarks.quick_compile import XLA_FLAGS
from rankclip_jax.common import progress
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.train.session import build_model
from rankclip_jax.weights import layouts, pretrained
from rankclip_jax.weights import view as preprocess
from rankclip_jax.weights.formats import write_hf
from tests.support.made_models import CAPTIONS, RESNET, VIT, make_config, make_variables, make_workdir

RNG = np.random.default_rng(0)


def picture(height, width, channels=3):
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    pixels = RNG.integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("made") / "run", VIT, scores=(0.2, 0.9, 0.4))


@pytest.fixture(scope="module")
def model(workdir):
    return rankclip_jax.load(workdir)


@pytest.fixture(scope="module")
def by_hand(workdir, model):
    """(images, texts) -> embeddings, by the Flax model of config.json and the best checkpoint's parameters."""
    config = make_config(VIT)
    network, variables = make_variables(config, model.source.tokenizer, seed=2)
    apply = jax.jit(network.apply)

    def embed(images, texts):
        view = preprocess.View(32, 32)
        pixels = (np.stack([view(i) for i in images]) / 255 - view.mean) / view.std
        tokens = model.source.tokenizer(texts, 16)
        z_img, z_txt, _ = apply(variables, pixels.astype(np.float32), tokens)
        return np.asarray(z_img), np.asarray(z_txt)

    return embed


def test_a_workdir_gives_its_best_checkpoint(model, by_hand):
    assert model.source.step == 2
    images = [picture(50, 70) for _ in range(3)]
    z_img, z_txt = by_hand(images, CAPTIONS[:3])
    np.testing.assert_allclose(model.encode_image(images), z_img, atol=1e-5)
    np.testing.assert_allclose(model.encode_text(CAPTIONS[:3]), z_txt, atol=1e-5)
    assert model.encode_image(images).dtype == model.encode_text("a").dtype == np.float32


def test_any_number_of_images_in_any_form(model, tmp_path):
    images = [picture(40 + i, 60) for i in range(10)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    expected = model.encode_image(images)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    one_by_one = np.concatenate([model.encode_image(path) for path in paths])  # a single one: (1, D)
    mixed = model.encode_image(iter([str(paths[0]), paths[1], *map(np.asarray, images[2:])]))
    for z in (one_by_one, mixed):
        np.testing.assert_allclose(z, expected, atol=1e-6)
    same_size = np.stack([np.asarray(images[0])] * 3)
    np.testing.assert_allclose(model.encode_image(same_size), np.repeat(expected[:1], 3, axis=0), atol=1e-6)
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 128)


def test_more_than_a_batch_and_few_programs(workdir):
    model = rankclip_jax.load(workdir)
    model.batch_size = 16
    texts = [f"{word} {i}" for i in range(9) for word in ("cat", "a red circle on grey and a long tail of words")]
    expected = np.concatenate([model.encode_text(text) for text in texts])
    for count in range(1, 19):
        np.testing.assert_allclose(model.encode_text(texts[:count]), expected[:count], atol=1e-6)
    # Eight devices: batches of 8 and 16 rows; all these texts fit into 16 tokens.
    assert model._embed._cache_size() == 2


def test_token_ids_of_any_length(model):
    ids = model.source.tokenizer(CAPTIONS[:4], 16)
    expected = model.encode_text(CAPTIONS[:4])
    longest = int((ids == model.source.tokenizer.eot_id).argmax(axis=1).max()) + 1
    for given in (ids, ids[:, :longest], ids.astype(np.int64), jax.numpy.asarray(ids)):
        np.testing.assert_allclose(model.encode_text(given), expected, atol=1e-6)


@pytest.mark.slow
def test_texts_are_cut_only_where_nothing_sees_it(tmp_path):
    """A context of 77: captions of 5 tokens go through as 16, the longest as 64 and 77, with the same embeddings."""
    long = VIT | dict(context_length=77)
    model = rankclip_jax.load(make_workdir(tmp_path / "run", long))
    network, variables = make_variables(make_config(long), model.source.tokenizer, seed=1)
    apply = jax.jit(functools.partial(network.apply, method="encode_text"))
    for words in (1, 40, 200):
        whole = apply(variables, model.source.tokenizer(["cat " * words], 77))
        np.testing.assert_allclose(model.encode_text(["cat " * words]), whole, atol=2e-6)


def test_zero_shot_is_the_softmax_of_scaled_cosines(model):
    images, names, templates = [picture(32, 32) for _ in range(4)], ["cat", "dog", "red star"], ["a {}", "{}s, two"]
    z_img = model.encode_image(images).astype(np.float64)
    z_cls = np.stack([model.encode_text([t.format(n) for t in templates]).mean(axis=0) for n in names]).astype(float)
    z_cls /= np.linalg.norm(z_cls, axis=1, keepdims=True)
    weights = np.exp(np.exp(np.float64(model.source.variables["params"]["logit_scale"])) * z_img @ z_cls.T)
    expected = weights / weights.sum(axis=1, keepdims=True)
    got = model.zero_shot(images, names, templates)
    assert got.dtype == np.float32 and got.shape == (4, 3)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    default = model.zero_shot(images, names, ["a photo of a {}."])
    np.testing.assert_array_equal(model.zero_shot(images, names), default)
    assert model.zero_shot([], names).shape == (0, 3)


@pytest.mark.slow
def test_resnet_and_bfloat16(tmp_path):
    path = make_workdir(tmp_path / "run", RESNET)
    images = [picture(20, 30) for _ in range(5)]
    model = rankclip_jax.load(path)
    network, variables = make_variables(make_config(RESNET), model.source.tokenizer, seed=1)
    view = model.source.view
    pixels = ((np.stack([view(i) for i in images]) / 255 - view.mean) / view.std).astype(np.float32)
    expected = np.asarray(jax.jit(functools.partial(network.apply, method="encode_image"))(variables, pixels))
    np.testing.assert_allclose(model.encode_image(images), expected, atol=1e-5)
    half = rankclip_jax.load(path, dtype="bfloat16").encode_image(images)
    assert half.dtype == np.float32 and 1e-4 < np.abs(half - expected).max() < 0.05
    np.testing.assert_array_equal(rankclip_jax.load(path, dtype=jax.numpy.bfloat16).encode_image(images), half)
    for dtype in ("int8", "float", None):
        with pytest.raises(InputError, match=f"dtype={dtype!r}. Expected float32 or bfloat16"):
            rankclip_jax.load(path, dtype=dtype)


@pytest.mark.parametrize("size", [(32, 32), (33, 200), (300, 31), (5, 90), (64, 48), (1, 40)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_view_is_that_of_transformers(size, channels):
    """To the grey level, from PIL images of any mode; transformers with PIL, as it is without torchvision."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    view = preprocess.View(24, 24)
    processor = theirs(**{k: v for k, v in preprocess.to_hugging_face(view).items() if k != "image_processor_type"})
    image = picture(*size, channels)
    pixels = np.asarray(processor(image)["pixel_values"][0]).transpose(1, 2, 0)
    levels = (pixels * np.array(view.std) + view.mean) * 255
    np.testing.assert_allclose(view(image), levels, atol=1e-3)


def test_pictures_of_other_kinds():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    palette.info["transparency"] = 1
    assert (preprocess.View(8, 8)(palette) == 255).all()  # transparent: white
    del palette.info["transparency"]
    assert (preprocess.View(8, 8)(palette) == (0, 255, 0)).all()
    assert (preprocess.View(8, 8)(Image.new("CMYK", (8, 8), (0, 0, 0, 255))) == 0).all()


@pytest.mark.parametrize(
    "images, message",
    [
        ("gone.png", r"image 0: gone\.png: no such file"),
        ([Image.new("RGB", (9, 9)), "gone.png"], r"image 1: gone\.png"),
        (np.zeros((9, 9)), r"image 0: an image must be .* got float64 \(9,\)"),
        ([np.zeros((9, 9, 3), np.float32)], r"uint8 array \(height, width, 3\); got float32 \(9, 9, 3\)"),
        ([np.zeros((9, 9, 4), np.uint8)], r"got uint8 \(9, 9, 4\)"),
        ([np.zeros((0, 9, 3), np.uint8)], r"got uint8 \(0, 9, 3\)"),
        ([None], r"image 0: an image must be"),
    ],
)
def test_images_that_cannot_be_used_are_named(model, images, message):
    with pytest.raises(InputError, match=message):
        model.encode_image(images)


def test_a_picture_in_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    np.testing.assert_array_equal(model.encode_image("~/a.png"), model.encode_image(tmp_path / "a.png"))


def test_damaged_files_are_named(model, tmp_path):
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "JPEG")
    for name, content in (("cut.jpg", buffer.getvalue()[:700]), ("text.jpg", b"<html>"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"image 0: .*{name}: \w+"):
            model.encode_image(tmp_path / name)


@pytest.mark.parametrize(
    "texts, message",
    [
        (np.zeros(3, np.int32), r"integer array \(n, L\); got int32 \(3,\)"),
        (np.zeros((2, 3)), r"integer array \(n, L\); got float64"),
        (np.zeros((2, 17), np.int32), r"the model takes 1 to 16 per text"),
        (np.full((2, 3), 10**6), r"from 1000000 to 1000000; the model has \d+"),
        (np.full((2, 3), -1), r"ids from -1"),
        (np.full((2, 3), 5), r"token ids: text 0 has no end-of-text, \d+"),
        (["a", 3], "a text must be a str; got int"),
        (["a", None], "a text must be a str; got NoneType"),
        (None, "a text must be a str; got NoneType"),
    ],
)
def test_texts_that_cannot_be_used_are_named(model, texts, message):
    with pytest.raises(InputError, match=message):
        model.encode_text(texts)


def test_texts_in_any_container(model):
    one, many = np.array(["a cat", "a dog"]), np.array(["a cat", "a dog"], object)
    for texts in (one, many, (text for text in one)):
        np.testing.assert_array_equal(model.encode_text(texts), model.encode_text(["a cat", "a dog"]))


def test_classes_in_any_container_and_one_str_is_one(model):
    image = picture(32, 32)
    expected = model.zero_shot(image, ["cat", "dog"], ["a {}"])
    np.testing.assert_array_equal(model.zero_shot(image, (name for name in ("cat", "dog")), "a {}"), expected)
    np.testing.assert_array_equal(model.zero_shot(image, np.array(["cat", "dog"]), np.array(["a {}"])), expected)
    assert model.zero_shot(image, "cat").tolist() == [[1.0]]  # and not of c, a, t
    with pytest.raises(InputError, match="a class name must be a str; got NoneType"):
        model.zero_shot(image, ["cat", None])
    with pytest.raises(InputError, match="a template must be a str; got NoneType"):
        model.zero_shot(image, ["cat"], [None])


def test_a_batch_of_none_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "batch_size", 0)
    with pytest.raises(InputError, match="batch_size=0. Expected at least 1"):
        model.encode_text(["a"])


def test_a_template_needs_a_place_for_the_name(model):
    with pytest.raises(InputError, match=r"template 'a photo' has no {}"):
        model.zero_shot([], ["cat"], ["a {}", "a photo"])
    with pytest.raises(InputError, match="needs class names"):
        model.zero_shot([], [])


def test_a_model_without_tokenizer_says_what_to_give(model, workdir, tmp_path):
    source = model.source
    write_hf(tmp_path / "bare", source.config, source.variables)
    bare = rankclip_jax.load(tmp_path / "bare")
    image = picture(32, 32)
    np.testing.assert_array_equal(bare.encode_image(image), model.encode_image(image))
    with pytest.raises(InputError, match=r"has no tokenizer; give load\(\.\.\., tokenizer=\) .*clip-vit-base"):
        bare.encode_text("a")
    given = rankclip_jax.load(tmp_path / "bare", tokenizer=str(workdir / "tokenizer.json"))
    np.testing.assert_array_equal(given.encode_text("a cat"), model.encode_text("a cat"))


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused(model, tmp_path, wrong):
    variables = jax.tree.map(np.copy, model.source.variables)
    variables["params"]["visual"]["class_embedding"][3:5] = wrong
    write_hf(tmp_path / "bad", model.source.config, variables)
    size = variables["params"]["visual"]["class_embedding"].size
    said = rf"bad: 2 of {size} values of params.visual.class_embedding are NaN or infinite; get it anew"
    with pytest.raises(InputError, match=said):
        rankclip_jax.load(tmp_path / "bad")


def test_a_checkpoint_of_the_rankclip_code_and_a_pickle_that_would_run_code(model, workdir, tmp_path):
    torch = pytest.importorskip("torch")
    state = layouts.to_state(model.source.variables, model.source.config, layouts.openai)
    state = {f"module.{key}": torch.tensor(value) for key, value in state.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    loaded = rankclip_jax.load(tmp_path / "epoch_3.pt", tokenizer=str(workdir / "tokenizer.json"))
    assert loaded.source.config == model.source.config  # from the shapes alone
    np.testing.assert_array_equal(loaded.encode_text(CAPTIONS[:3]), model.encode_text(CAPTIONS[:3]))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": state, "optimizer": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=rf"evil\.pt: refused: its pickle asks for {os.name}\.mkdir, which"):
        rankclip_jax.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_paths_that_hold_no_model_say_why(workdir, tmp_path):
    with pytest.raises(InputError, match=r"gone: no such file or folder"):
        rankclip_jax.load(tmp_path / "gone")
    with pytest.raises(InputError, match="no weights found"):
        rankclip_jax.load(tmp_path)
    half = tmp_path / "half"
    (half / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        rankclip_jax.load(half)
    for name, message in (("config.json", "no tokenizer.json"), ("tokenizer.json", "no complete checkpoint")):
        (half / name).write_text((workdir / name).read_text())
        with pytest.raises(InputError, match=message):
            rankclip_jax.load(half)


def test_a_tokenizer_of_another_vocabulary_is_refused(model, workdir, tmp_path):
    other = str(tmp_path / "other.json")
    Tokenizer.train(["entirely other words here"] * 9, 330).save(other)
    with pytest.raises(InputError, match=r"has its own tokenizer, and .*other\.json has other ids"):
        rankclip_jax.load(workdir, tokenizer=other)
    write_hf(tmp_path / "bare", model.source.config, model.source.variables)
    with pytest.raises(InputError, match=r"has \d+ ids, end-of-text \d+; the model .* has \d+"):
        rankclip_jax.load(tmp_path / "bare", tokenizer=other)


def test_siglips_bias_is_left_aside(tmp_path):
    path = make_workdir(tmp_path / "run", VIT, loss=dict(objective="siglip"))
    source = pretrained.read(path)
    assert "logit_bias" not in source.variables["params"]
    config = make_config(VIT, loss=dict(objective="siglip"))
    assert "logit_bias" in make_variables(config, source.tokenizer)[1]["params"]
    assert source.loss_bias is not None
    assert rankclip_jax.load(path).encode_text("a").shape == (1, 128)


def test_progress_is_quiet_while_short_and_then_says_rate_and_time_left(capsys):
    now = [100.0]
    with progress.progress("work", 7400, done=1000) as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        now[0] += 1.9
        bar.update(100)
        assert capsys.readouterr().err == ""
        now[0] += 18.1
        bar.update(100)
        said = capsys.readouterr().err
    # 200 in 20 s, and 6,200 left at 10 a second: 10 minutes 20.
    assert "work:" in said and "1200/7400" in said and "10:20" in said and "10.00 images/s" in said


@pytest.mark.slow
def test_loading_imports_neither_tensorflow_nor_torch(workdir):
    code = f"""
import sys
sys.modules |= dict.fromkeys(["torch", "tensorflow", "transformers"])  # importing them fails
import rankclip_jax
model = rankclip_jax.load({str(workdir)!r})
from PIL import Image
print(model.zero_shot(Image.new("RGB", (40, 30)), ["cat", "dog"]).sum())
"""
    env = os.environ | {"XLA_FLAGS": XLA_FLAGS}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(1)
    assert "WARNING" not in result.stderr


def test_what_loop_builds_is_what_load_builds(model):
    assert model.source.config == build_model(make_config(VIT), model.source.tokenizer).config
