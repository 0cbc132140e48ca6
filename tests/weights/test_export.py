"""Whole exports, as transformers and open_clip read them: from the same PNG and sentence the same embeddings."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from PIL import Image

import rankclip_jax
from rankclip_jax import config as configs
from rankclip_jax import convert
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import END, START, Tokenizer
from rankclip_jax.models import PRESETS
from rankclip_jax.train import loop
from rankclip_jax.weights import export, pretrained
from rankclip_jax.weights import view as preprocess
from tests.support.made_models import CAPTIONS, RESNET, VIT, make_workdir

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SENTENCES = ["a photo of a cat", "There is an ORANGE star, isn't it?", "two dogs " * 40, ""]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("made") / "vit", VIT, scores=(0.25, 0.75))


@pytest.fixture(scope="module")
def source(workdir):
    return pretrained.read(workdir)


@pytest.fixture
def png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 4), np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def transformers_embeddings(folder, png, sentences):
    """By the export's own processor (tokenizer and image processor) and model, as its README says."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(
        text=sentences, images=Image.open(png), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        out = model(**inputs)
    return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.softmax(dim=1).numpy()


def test_transformers_gives_the_same_from_the_same_png_and_sentence(workdir, source, png, tmp_path):
    export.write(source, tmp_path / "hf", "hf")
    z_img, z_txt, probabilities = transformers_embeddings(tmp_path / "hf", png, SENTENCES)
    model = rankclip_jax.load(workdir)
    np.testing.assert_allclose(model.encode_image(png), z_img, atol=1e-5)
    np.testing.assert_allclose(model.encode_text(SENTENCES), z_txt, atol=1e-5)
    np.testing.assert_allclose(model.zero_shot(png, SENTENCES, ["{}"]), probabilities, atol=1e-5)


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_what_is_exported_loads_as_what_it_was(source, tmp_path, layout):
    export.write(source, tmp_path / layout, layout)
    again = pretrained.read(tmp_path / layout)
    assert again.config == source.config and again.view == source.view
    same_tree(again.variables, source.variables)
    assert again.tokenizer.to_dict() == source.tokenizer.to_dict()
    export.write(again, tmp_path / "again", "orbax")  # and from there on
    same_tree(pretrained.read(tmp_path / "again").variables, source.variables)


def test_tokenizers_of_transformers_give_the_same_ids(source, tmp_path):
    export.write(source, tmp_path / "own", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    assert theirs.model_max_length == 16
    ids = theirs(SENTENCES, padding="max_length", truncation=True).input_ids
    ours = source.tokenizer(SENTENCES, 16)
    for row, expected in zip(ids, ours, strict=True):
        end = expected.tolist().index(source.tokenizer.eot_id)
        assert row[: end + 1] == expected[: end + 1].tolist()
        assert set(row[end:]) == {source.tokenizer.eot_id}  # padded with the end


def test_openais_kind_of_tokenizer_stays_a_clip_tokenizer(source, tmp_path):
    """A small byte-pair vocabulary of OpenAI's kind (words end in </w>), by transformers' own class."""
    letters = sorted({c for text in CAPTIONS for c in text} - {" "})
    pieces = [*letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, START, END])}
    made = transformers.CLIPTokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")])
    made.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(tmp_path / "tokenizer.json"))
    config = source.config.__class__(
        **{**vars(source.config), "text": source.config.text.__class__(
            **{**vars(source.config.text), "vocab_size": len(vocabulary), "eot_id": len(vocabulary) - 1})}
    )  # fmt: skip
    table = source.variables["params"]["text"]["token_embedding"]["embedding"][: len(vocabulary)]
    params = source.variables["params"]
    params = params | {"text": params["text"] | {"token_embedding": {"embedding": table}}}
    model = pretrained.Pretrained(source.path, config, {"params": params}, source.view, tokenizer)
    export.write(model, tmp_path / "hf", "hf")
    for cls in (transformers.CLIPTokenizerFast, transformers.AutoTokenizer):
        theirs = cls.from_pretrained(tmp_path / "hf")
        assert isinstance(theirs, transformers.CLIPTokenizer)
        for text in ("a cat", "two  CATS on a beach"):
            ids = tokenizer([text], 40)[0].tolist()
            assert theirs(text).input_ids == ids[: ids.index(tokenizer.eot_id) + 1]


def test_open_clip_gives_the_same_from_the_same_sentence(open_clip, workdir, source, tmp_path):
    export.write(source, tmp_path / "oc", "openai")
    name = f"local-dir:{tmp_path / 'oc'}"
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    with torch.no_grad():
        z_txt = model.encode_text(tokenizer(SENTENCES), normalize=True).numpy()
    np.testing.assert_allclose(rankclip_jax.load(workdir).encode_text(SENTENCES), z_txt, atol=1e-5)
    described = json.loads((tmp_path / "oc" / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert described["mean"] == list(source.view.mean) and described["resize_mode"] == "shortest"


def test_the_card_says_how_it_was_trained_and_what_it_reached(source, workdir, tmp_path):
    for layout in export.LAYOUTS:
        export.write(source, tmp_path / layout, layout)
        text = (tmp_path / layout / "README.md").read_text()
        assert "| steps | 2 of 8 samples |" in text  # the best of two checkpoints
        assert "| zero_shot/seen/top1 | 0.7500 |" in text and "0.2500" not in text
        assert str(workdir.parent) not in text
        assert f"| parameters | {sum(x.size for x in jax.tree.leaves(source.variables['params'])):,} |" in text
        assert ("CLIPProcessor" in text, "local-dir" in text) == (layout == "hf", layout == "openai")


@pytest.mark.parametrize(
    "change, lines",
    [
        ({"loss": {"objective": "clip"}}, ["CLIP's contrastive loss", "| loss | CLIP |"]),
        ({}, ["trained with RankCLIP", "| CLIP + w (0.0625 in-modal + 0.0625 cross-modal), schedule of w: ramp |"]),
        ({"loss": {"objective": "siglip"}}, ["trained with SigLIP", "| loss | SigLIP |"]),
        ({"loss": {"objective": "cyclip"}}, ["trained with CyCLIP", "| loss | CyCLIP |"]),
        ({"loss": {"objective": "rank", "terms": {"clip": 0.5}}}, ["terms alone", "| loss | w (", ": clip 0.5 |"]),
        ({"data": {"format": "csv", "train": ["/home/me/a.csv", "/home/me/b.csv"]}}, ["| data | csv: a.csv, b.csv |"]),
        ({"data": {"format": "csv", "train": {"web": {"path": "/home/me/a.csv"}}}}, ["| data | csv: web |"]),
    ],
)
def test_the_card_names_the_objective_and_no_path(source, change, lines):
    run = configs.complete(change)
    text = export.card(dataclasses.replace(source, run=run), "hf")
    assert all(line in text for line in lines) and "/home/me" not in text


@pytest.mark.parametrize("change", [{"scan_layers": True}, {"dtype": "bfloat16"}])
def test_scanned_and_bfloat16_runs_convert(tmp_path, change):
    path = make_workdir(tmp_path / "run", VIT | change)
    source = pretrained.read(path)
    assert "resblocks_1" in source.variables["params"]["visual"]["transformer"]
    for layout in ("hf", "openai", "orbax"):
        export.write(source, tmp_path / layout, layout)
        same_tree(pretrained.read(tmp_path / layout).variables, source.variables)
        assert all(x.dtype == np.float32 for x in jax.tree.leaves(pretrained.read(tmp_path / layout).variables))


def run_convert(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    convert.main()


def test_a_resnet_goes_to_openais_layout_and_hugging_face_has_none(tmp_path, monkeypatch, capsys):
    path = make_workdir(tmp_path / "run", RESNET)
    with pytest.raises(SystemExit, match=r"^error: .*run has a ResNet, which .* not support; use --to openai$"):
        run_convert(monkeypatch, path, tmp_path / "hf", "--to", "hf")
    assert not (tmp_path / "hf").exists()
    run_convert(monkeypatch, path, tmp_path / "oc", "--to", "openai")
    assert "open_clip has no such ResNet" in capsys.readouterr().out
    same_tree(pretrained.read(tmp_path / "oc").variables, pretrained.read(path).variables)
    assert "open_clip.create" not in (tmp_path / "oc" / "README.md").read_text()


def test_what_is_said_to_be_written_is_what_was_written(tmp_path, monkeypatch, capsys):
    path = make_workdir(tmp_path / "run", VIT)
    for layout, weights in (("hf", "config.json, model.safetensors"), ("orbax", "rankclip_jax.json")):
        out = tmp_path / layout
        out.mkdir()
        (out / "mine.png").write_bytes(b"a picture")
        run_convert(monkeypatch, path, out, "--to", layout)
        said = capsys.readouterr().out.splitlines()[0]
        assert said.startswith(f"wrote {out}: README.md, ") and weights in said and "mine.png" not in said
    assert "variables" in said
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: DST is empty. Expected a local path"):
        run_convert(monkeypatch, path, "")
    assert sorted(name.name for name in tmp_path.iterdir()) == ["hf", "orbax", "run"]


def test_a_folder_has_one_layout(source, tmp_path):
    """Of two a reader would take the older one for the newer."""
    for layout, other, file in (("hf", "openai", "config.json"), ("openai", "orbax", "open_clip_config.json")):
        export.write(source, tmp_path / layout, layout)
        export.write(source, tmp_path / layout, layout)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=f"{layout} has an export in another layout .{file}.; give another"):
            export.write(source, tmp_path / layout, other)
        assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_failed_leaves_its_folder_to_another_layout(source, tmp_path, monkeypatch):
    def failing(*_):
        raise ValueError("no such thing in this layout")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="no such thing"):
        patch.setattr(export.formats, "write_hf", failing)
        export.write(source, tmp_path / "out", "hf")
    export.write(source, tmp_path / "out", "openai")
    assert (tmp_path / "out/open_clip_model.safetensors").exists()


def test_what_the_card_cannot_read_is_said_before_anything_is_written(source, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("no JSON\n{}\n")
    with pytest.raises(InputError, match="metrics.jsonl line 1 is not JSON"):
        export.write(pretrained.read(tmp_path / "run"), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer_does_not_get_that_of_the_one_before(source, tmp_path):
    export.write(source, tmp_path, "hf")
    export.write(dataclasses.replace(source, tokenizer=None), tmp_path, "hf")
    assert not list(tmp_path.glob("tokenizer*")) and pretrained.read(tmp_path).tokenizer is None


def test_open_clip_is_told_how_pictures_were_resized(source, tmp_path):
    for squash, mode, how in (("no", "shortest", "bicubic"), ("bilinear", "squash", "bilinear"),
                              ("bicubic", "squash", "bicubic")):  # fmt: skip
        view = dataclasses.replace(source.view, squash=squash)
        export.write(dataclasses.replace(source, view=view), tmp_path / squash, "openai")
        described = json.loads((tmp_path / squash / "open_clip_config.json").read_text())["preprocess_cfg"]
        assert (described["resize_mode"], described["interpolation"]) == (mode, how)
        (tmp_path / squash / "preprocessor_config.json").unlink()  # which comes before it
        assert pretrained.read(tmp_path / squash).view == view
    view = dataclasses.replace(source.view, resize=source.view.crop + 4)
    with pytest.raises(InputError, match="pixels, for which open_clip has one size; use --to hf or orbax"):
        export.write(dataclasses.replace(source, view=view), tmp_path / "other", "openai")


def test_files_without_tokenizer_convert_and_say_so(source, tmp_path, monkeypatch, capsys):
    """As an OpenAI .pt: weights alone, and the tokenizer given or not."""
    export.write(source, tmp_path / "oc", "openai")
    alone = tmp_path / "alone.safetensors"
    shutil.copy(tmp_path / "oc" / "open_clip_model.safetensors", alone)
    run_convert(monkeypatch, alone, tmp_path / "hf", "--to", "hf")
    assert "no tokenizer files" in capsys.readouterr().out and not (tmp_path / "hf" / "tokenizer.json").exists()
    assert "has no information about its training" in (tmp_path / "hf" / "README.md").read_text()
    given = tmp_path / "oc" / "tokenizer.json"
    run_convert(monkeypatch, alone, tmp_path / "with", "--to", "hf", "--tokenizer", given, "--activation", "gelu")
    assert pretrained.read(tmp_path / "with").config.activation == "gelu"
    assert (tmp_path / "with" / "tokenizer_config.json").exists()


def test_wrong_input_is_one_line(tmp_path, monkeypatch, source):
    with pytest.raises(SystemExit, match=r"^error: .*gone: no such file or folder$"):
        run_convert(monkeypatch, tmp_path / "gone", tmp_path / "x", "--to", "hf")
    (tmp_path / "evil.pt").write_bytes(b"GIF89a")
    with pytest.raises(SystemExit, match=r"^error: .*evil\.pt is neither safetensors nor a PyTorch archive"):
        run_convert(monkeypatch, tmp_path / "evil.pt", tmp_path / "x", "--to", "hf")
    with pytest.raises(InputError, match="unknown layout 'onnx'. Expected one of hf, openai, orbax"):
        export.write(source, tmp_path / "x", "onnx")
    export.write(source, tmp_path / "file", "orbax")
    with pytest.raises(SystemExit, match=r"^error: cannot write .*README\.md: File exists$"):
        run_convert(monkeypatch, tmp_path / "file", tmp_path / "file" / "README.md", "--to", "hf")


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_a_full_disk_is_one_line_about_where_it_was_written(source, tmp_path, monkeypatch, layout):
    def full(*_, **__):
        if layout == "orbax":
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full)
    with pytest.raises(InputError, match=rf"^cannot write {tmp_path}/out/.*: .*No space left on device") as error:
        export.write(source, tmp_path / "out", layout)
    assert str(source.path) not in str(error.value)


def test_a_damaged_orbax_folder_is_named(source, tmp_path):
    export.write(source, tmp_path / "o", "orbax")
    described = json.loads((tmp_path / "o" / "rankclip_jax.json").read_text())
    (tmp_path / "o" / "rankclip_jax.json").write_text(json.dumps(described | {"embed_dim": 64}))
    with pytest.raises(InputError, match=r"o: params/\S+ has shape \(64, 128\); expected \(64, 64\)"):
        pretrained.read(tmp_path / "o")
    (tmp_path / "o" / "rankclip_jax.json").write_text(json.dumps(described))
    shutil.rmtree(tmp_path / "o" / "variables")
    with pytest.raises(InputError, match=r"o: variables is not a complete Orbax checkpoint"):
        pretrained.read(tmp_path / "o")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resample": 2}, "unsupported resample = 2; expected 3"),
        ({"do_center_crop": False}, "unsupported do_center_crop = False"),
        ({"size": {"height": 32, "width": 32}}, "size .* do not resize .* the model's 32 pixels"),
        ({"crop_size": 24}, ".* crop_size 24 do not resize"),
    ],
)
def test_other_preprocessing_is_refused_by_name(source, tmp_path, change, message):
    export.write(source, tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=f"preprocessor_config.json: {message}"):
        pretrained.read(tmp_path / "hf")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resample": "bicubic"}, "its preprocessing is damaged"),
        ({"image_mean": 3}, "its preprocessing is damaged"),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 1}}, "size .*; expected the model's"),
        ({"image_mean": [1]}, r"the preprocessing's mean is \(1,\); expected 3 numbers$"),
        ({"image_std": [1, 0, 1]}, r"the preprocessing's std is \(1, 0, 1\); expected 3 numbers above 0"),
    ],
)
def test_damaged_preprocessing_is_one_line(tmp_path, change, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match=message):
        preprocess.of_folder(tmp_path, PRESETS["ViT-B/32"].vision)


def test_mean_and_deviation_come_from_the_folder(source, png, tmp_path):
    export.write(source, tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "preprocessor_config.json"
    change = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "size": {"shortest_edge": 40}}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    z_img, *_ = transformers_embeddings(tmp_path / "hf", png, ["a"])
    np.testing.assert_allclose(rankclip_jax.load(tmp_path / "hf").encode_image(png), z_img, atol=1e-5)


@pytest.mark.slow
def test_trained_exported_and_used_in_transformers(tmp_path, png, one_device):
    """The whole way: train on shapes, export, and embed a PNG and sentences with transformers alone."""
    one_layer = {tower: VIT[tower] | {"layers": 1} for tower in ("vision", "text")}
    config = configs.complete(
        dict(
            model=VIT | one_layer,  # sooner compiled, and so is the objective
            batch_size=16,
            loss=dict(objective="clip"),
            data=dict(train=32),
            steps=3,
            optim=dict(lr=1e-3, warmup_steps=2),
        )
    )
    loop.train(config, tmp_path / "run")
    export.write(pretrained.read(tmp_path / "run"), tmp_path / "hf", "hf")
    sentences = ["a red circle", "a picture of a tiny blue star in the top left on grey", "two dogs"]
    z_img, z_txt, probabilities = transformers_embeddings(tmp_path / "hf", png, sentences)
    model = rankclip_jax.load(tmp_path / "run")
    assert model.source.step == 3
    np.testing.assert_allclose(model.encode_image(png), z_img, atol=1e-3)
    np.testing.assert_allclose(model.encode_text(sentences), z_txt, atol=1e-3)
    np.testing.assert_allclose(model.zero_shot(png, sentences, ["{}"]), probabilities, atol=1e-3)
