"""SigLIP's texts and whole folders against `transformers`: tokenised, embedded, trained, written."""

import dataclasses
import json
import string

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image

import rankclip_jax
from rankclip_jax import config as configs
from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.packing import Packed
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.models import TextConfig
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.train import loop, optim
from rankclip_jax.train import step as steps
from rankclip_jax.weights import architecture, export, pretrained
from rankclip_jax.weights import view as views
from tests.support.made_models import SIGLIP, made_state, make_workdir
from tests.weights.test_siglip import SHAPES, made, siglip, theirs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def siglip_words(kind="siglip"):
    """Small tokenizers with the parts of SigLIP's (Unigram) and of SigLIP 2's (BPE, as Gemma's)."""
    letters = [*string.ascii_letters, *string.digits, *string.punctuation, "é", "\u03c2", "\u03c3", "\n"]
    if kind == "siglip":
        pieces = ["</s>", "<unk>", "▁", "▁a", "▁photo", "▁of", "▁cat", "s", *letters]
        scores = [(piece, -2.0 if len(piece) > 1 else -9.0) for piece in dict.fromkeys(pieces)]
        hf = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=1))
        hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        hf.add_special_tokens(["</s>", "<unk>"])
    else:
        pieces = dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *letters, "▁a", "ca", "cat"])
        merges = [("▁", "a"), ("c", "a"), ("ca", "t")]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
        hf.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        hf.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    return hf


SENTENCES = ["A Photo, of a CAT!", "cats  &amp;\n CATS", "it's (a) [cat]...", "ΣΑΣ É", "", "a cat " * 40, "!!!"]


@pytest.mark.parametrize("kind, pad, end", [("siglip", 0, 0), ("siglip2", 0, 1)])
def test_texts_are_canonicalised_or_lowered_and_padded(kind, pad, end):
    tokenizer = Tokenizer(siglip_words(kind))
    assert (tokenizer.start_id, tokenizer.eot_id, tokenizer.pad_id) == (None, end, pad)
    plain = siglip_words(kind)

    def prepared(text):
        """As SigLIP's authors have it; SigLIP 2's only lower."""
        if kind == "siglip2":
            return text.lower()
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

    for row, text in zip(tokenizer(SENTENCES, 16), SENTENCES, strict=True):
        ids = plain.encode(prepared(text)).ids[:15]
        assert row.tolist() == [*ids, end, *[pad] * (15 - len(ids))], text
    assert Tokenizer.from_json(tokenizer.to_json()).to_json() == tokenizer.to_json()  # and not prepared twice


def test_sentencepiece_is_refused_with_what_to_do(tmp_path):
    made(SHAPES["plain"]).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "spiece.model").write_bytes(b"\n\x0e")
    for read in (pretrained.read, Tokenizer.load):
        with pytest.raises(
            InputError, match=r"a: its tokenizer is spiece.model.* convert it once, with transformers: T5"
        ):
            read(tmp_path / "a")


def folder(path, kind="siglip", resample=3):
    """A SigLIP as it lies on the hub, made: weights, preprocessor_config.json, tokenizer.json."""
    hf = siglip_words(kind)
    config = siglip((32, 8, 64, 1, 1), (64, 1, 1, 16, hf.get_vocab_size(), None))
    model = made(config)
    model.save_pretrained(path)
    image_processor = transformers.models.siglip.SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, resample=resample, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    image_processor.save_pretrained(path)
    hf.save(str(path / "tokenizer.json"))
    return model


@pytest.fixture
def png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def by_transformers(path, png, sentences):
    """By the folder's own processor and model, as the README of an export says."""
    model = transformers.SiglipModel.from_pretrained(path).eval()
    processor = transformers.SiglipProcessor.from_pretrained(path)
    how = dict(padding="max_length", truncation=True)
    texts = processor(text=sentences, return_tensors="pt", **how)["input_ids"]
    pixels = processor(images=Image.open(png), return_tensors="pt")["pixel_values"]
    assert texts.shape[1] == 16
    return theirs(model, pixels.numpy().transpose(0, 2, 3, 1), texts.numpy())


def check_export(model, out, png):
    """What is exported embeds in transformers as it does here. -> its logits."""
    export.write(model.source, out, "hf")
    z_img, z_txt, logits = by_transformers(out, png, SENTENCES)
    np.testing.assert_allclose(model.encode_image(png), z_img, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(SENTENCES), z_txt, atol=1e-6)
    found = model.scale * model.encode_image(png) @ model.encode_text(SENTENCES).T + model.bias
    np.testing.assert_allclose(found, logits, atol=1e-5)
    return logits


@pytest.mark.parametrize("kind, resample", [("siglip", 3), ("siglip2", 2)])
def test_a_folder_embeds_pictures_and_texts_as_transformers(kind, resample, tmp_path, png):
    folder(tmp_path / "in", kind, resample)
    model = rankclip_jax.load(tmp_path / "in")
    assert model.source.view.squash == {2: "bilinear", 3: "bicubic"}[resample]
    logits = check_export(model, tmp_path / "out", png)
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(model.zero_shot(png, SENTENCES, ["{}"]), expected, atol=1e-5)
    again = rankclip_jax.load(tmp_path / "out").source
    assert (again.config, again.view) == (model.source.config, model.source.view)
    assert again.tokenizer.to_json() == model.source.tokenizer.to_json()
    jax.tree.map(np.testing.assert_array_equal, again.variables, model.source.variables)


def test_open_clips_layout_and_mixed_towers_are_refused(tmp_path):
    folder(tmp_path / "in")
    source = pretrained.read(tmp_path / "in")
    with pytest.raises(InputError, match=r"is a SigLIP, whose towers open_clip has under other names; use --to hf"):
        export.write(source, tmp_path / "out", "openai")
    assert not (tmp_path / "out").exists()
    mixed = dataclasses.replace(source.config, text=TextConfig(64, 1, 2, 16, 99, 1))
    with pytest.raises(ValueError, match="one tower is SigLIP's and one CLIP's"):
        architecture.to_hugging_face(mixed)
    export.write(source, tmp_path / "orbax", "orbax")
    assert pretrained.read(tmp_path / "orbax").config == source.config


def test_a_run_from_scratch_with_a_tokenizer_of_its_own(tmp_path, png):
    """Of CLIP's kind: start, text, end and padding, which this tower sees; exported, transformers gives the same."""
    model = rankclip_jax.load(make_workdir(tmp_path / "run", SIGLIP, data=dict(mean=views.HALF, std=views.HALF)))
    assert model.source.view == views.View(32, 32, views.HALF, views.HALF, "bicubic")
    export.write(model.source, tmp_path / "out", "hf")
    sentences = ["a photo of a cat", "two dogs on a beach", "a", ""]
    z_img, z_txt, logits = by_transformers(tmp_path / "out", png, sentences)
    np.testing.assert_allclose(model.encode_image(png), z_img, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(sentences), z_txt, atol=1e-6)
    found = model.scale * z_img @ z_txt.T + model.bias
    np.testing.assert_allclose(found, logits, rtol=1e-5)


def test_a_step_leaves_a_scale_above_clips_limit():
    """The published ones are, and a step would otherwise bring them to 100."""
    config = configs.complete({"batch_size": 4, "optim": {"warmup_steps": 0, "lr": 1e-9}})
    fields = dict(SIGLIP, vocab_size=50, eot_id=1, logit_scale=5.0)
    model, tx = models.build(**fields), optim.make_optimizer(config.optim, 6)
    update = steps.train_step_function(model, tx, config, None, total_steps=6, steps_per_epoch=2)
    batch = {"image": np.zeros((4, 32, 32, 3), np.uint8), "tokens": np.ones((4, 16), np.int32)}
    state = made_state(model, tx, make_mesh({"data": 1}, jax.devices()[:1]))
    scale = jax.jit(lambda state: update(state, batch, jax.random.key(0))[0].params["logit_scale"])  # and nothing else
    assert float(scale(state)) == pytest.approx(5.0)
    with pytest.raises(ValueError, match="captions cannot be packed"):
        packed = Packed(np.ones((1, 2, 16), np.int32), np.ones((1, 2, 16), np.int32), np.ones((1, 4), np.int32))
        model.apply({"params": state.params}, packed, method="encode_text")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_trained_from_a_folder_and_back_to_transformers(
    objective, tmp_path, png, captioned, one_device, compiled_once
):
    folder(tmp_path / "in")
    changes = [f"data.train={captioned}", f"init_from={tmp_path / 'in'}", "steps=3", "batch_size=8"]
    changes += [f"loss.objective={objective}", "optim.warmup_steps=0", "log_every=1", "optim.lr=1e-3"]
    changes += ["eval.diagnostics=False", "data.resize=host"]  # a step without either is compiled sooner
    loop.train(configs.load("own", changes), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"]["mean"] == stored["data"]["std"] == [0.5] * 3
    assert (stored["data"]["squash"], stored["model"]["pack_text"]) == ("bicubic", "off")
    model = rankclip_jax.load(tmp_path / "run")
    started = rankclip_jax.load(tmp_path / "in")
    assert model.source.view == started.source.view
    assert np.abs(model.encode_image(png) - started.encode_image(png)).max() > 1e-4
    assert (model.bias != started.bias) == (objective == "siglip")
    check_export(model, tmp_path / "out", png)
    if objective == "clip":
        with pytest.raises(InputError, match=r"config.model.pack_text=on. Expected auto or off: SigLIP's text tower"):
            loop.train(configs.load("own", [*changes, "model.pack_text=on"]), tmp_path / "packed")
