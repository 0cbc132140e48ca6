"""Models by their hub id: fetched from a hub on the loopback, and read from a cache that a test lays out, offline."""

import shutil

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

import rankclip_jax
from rankclip_jax import config as configs
from rankclip_jax import convert, embed
from rankclip_jax.common import hub
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.train import evaluate, init_from
from rankclip_jax.weights import export, pretrained
from rankclip_jax.weights.hub import locate, needed
from tests.support.loopback_hub import COMMIT, loopback_hub
from tests.support.made_models import CAPTIONS, VIT, make_workdir

ID = "someone/clip-tiny"
SMALL = ["config.json", "preprocessor_config.json", "tokenizer.json"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return pretrained.read(make_workdir(tmp_path_factory.mktemp("made") / "run", VIT))


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """A Hugging Face folder with what repositories also hold: weights for other libraries, a README, pictures."""
    folder = tmp_path_factory.mktemp("made") / "hf"
    export.write(source, folder, "hf")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "CLIP.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"large")
    return folder


@pytest.fixture
def online(monkeypatch, tmp_path):
    with loopback_hub(monkeypatch, tmp_path / "cache") as served:
        yield served


@pytest.fixture
def cached(monkeypatch, tmp_path, exported):
    """A cache as huggingface_hub lays it out, offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--someone--clip-tiny"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name in (*SMALL, "model.safetensors"):
        shutil.copy(exported / name, folder / "snapshots" / COMMIT / name)
    return folder / "snapshots" / COMMIT


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- Fetching


def test_only_what_is_needed_is_fetched_once(online, exported, source):
    online.repos[ID] = exported
    model = pretrained.read(ID)
    assert online.fetched() == sorted([*SMALL, "model.safetensors"])
    same(model.variables, source.variables)
    assert model.tokenizer.to_dict() == source.tokenizer.to_dict() and model.view == source.view
    assert str(model.path) == ID
    online.asked.clear()
    again = pretrained.read(ID)
    assert not online.fetched() and len(online.asked) == 1  # whether the cache is of the newest commit
    same(again.variables, source.variables)
    constants.HF_HUB_OFFLINE = True  # put back by the fixture
    assert locate(ID).name == COMMIT and len(online.asked) == 1


def test_the_hub_being_away_or_the_token_lost_leaves_the_cache(online, exported, capsys):
    online.repos[ID] = exported
    folder = locate(ID)
    for denied, said in (((503, ""), "the Hugging Face hub did not give it"), ((401, "GatedRepo"), "is gated")):
        online.denied[ID] = denied
        assert locate(ID) == folder
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in line and "using the copy in the cache" in line


def test_a_tokenizer_alone_is_fetched_alone(online, exported, tmp_path):
    online.repos[ID] = exported
    assert np.array_equal(Tokenizer.load(ID)(CAPTIONS, 16), Tokenizer.load(exported)(CAPTIONS, 16))
    assert online.fetched() == ["tokenizer.json"]
    (tmp_path / "old").mkdir()
    Tokenizer.load(exported)._hf.model.save(str(tmp_path / "old"))
    online.repos["someone/old"] = tmp_path / "old"
    with pytest.raises(InputError, match="no <.startoftext.> or no <.endoftext.> token"):  # added later, so not there
        Tokenizer.load("someone/old")
    assert online.fetched()[-2:] == ["tokenizer.json", "vocab.json"]


def test_no_weights_are_fetched_of_what_is_no_clip(online, exported, tmp_path):
    folder = tmp_path / "naflex"
    shutil.copytree(exported, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model_type": "clip"', '"model_type": "siglip2"'))
    online.repos[ID] = folder
    with pytest.raises(InputError, match=f"^{ID} on the Hugging Face hub: .*a NaFlex checkpoint of SigLIP 2 "):
        rankclip_jax.load(ID)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=f"^{ID} on the Hugging Face hub: no weights found. Expected one of open_clip"):
        rankclip_jax.load(ID)
    assert set(online.fetched()) <= set(SMALL)


@pytest.mark.parametrize("layout", ["openai", "orbax"])
def test_other_layouts_on_the_hub(online, source, tmp_path, layout):
    export.write(source, tmp_path / layout, layout)
    online.repos[ID] = tmp_path / layout
    same(pretrained.read(ID).variables, source.variables)
    assert "README.md" not in online.fetched()


@pytest.mark.parametrize(
    "names, expected",
    [
        (["model.safetensors", "pytorch_model.bin", "config.json"], ["config.json", "model.safetensors"]),
        (["pytorch_model.bin", "config.json", "vocab.json", "merges.txt"],
         ["config.json", "vocab.json", "merges.txt", "pytorch_model.bin"]),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
          "pytorch_model-00001-of-00001.bin", "config.json"],
         ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
          "model-00002-of-00002.safetensors"]),
        (["open_clip_pytorch_model.bin", "open_clip_config.json", "model.safetensors", "config.json"],
         ["config.json", "model.safetensors"]),
        (["open_clip_model.safetensors", "open_clip_config.json", "open_clip_pytorch_model.bin", "config.json"],
         ["open_clip_config.json", "open_clip_model.safetensors"]),
        (["model.safetensors", "config.json", "spiece.model"], ["config.json", "spiece.model", "model.safetensors"]),
        (["open_clip_pytorch_model.bin", "sub/model.safetensors"], ["open_clip_pytorch_model.bin"]),
    ],
)  # fmt: skip
def test_safetensors_come_before_pickles_and_each_weight_once(names, expected):
    assert needed(names) == expected


# ---- Offline


def test_load_convert_and_init_from_take_a_cached_id(cached, source, tmp_path, monkeypatch, capsys):
    expected = rankclip_jax.load(source.path).encode_text(CAPTIONS[:2])
    np.testing.assert_array_equal(rankclip_jax.load(ID).encode_text(CAPTIONS[:2]), expected)
    monkeypatch.setattr("sys.argv", ["convert", ID, str(tmp_path / "out"), "--to", "hf"])
    convert.main()
    assert "wrote" in capsys.readouterr().out
    assert "# clip-tiny" in (card := (tmp_path / "out" / "README.md").read_text()) and COMMIT not in card
    same(pretrained.read(tmp_path / "out").variables, source.variables)
    start = init_from.read(configs.complete(dict(init_from=ID, model=VIT)))
    same(start.variables, source.variables)


@pytest.mark.slow
def test_embed_and_evaluate_take_a_cached_id(cached, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr("sys.argv", ["embed", ID, str(tmp_path), "--out", str(tmp_path / "a.npz"), "--search", "a cat"])
    embed.main()
    assert "a.png" in capsys.readouterr().out
    seen = dict(format="shapes", path="seen:16")
    config = configs.complete(dict(batch_size=8, model=VIT, eval=dict(model=ID, zero_shot=dict(seen=seen))))
    assert evaluate.evaluate(config, tmp_path / "eval")["zero_shot"]["seen"]["top1"] >= 0


def test_a_path_that_exists_wins(cached, tmp_path, monkeypatch, exported):
    monkeypatch.chdir(tmp_path)
    assert locate(ID) == cached
    shutil.copytree(exported, tmp_path / ID)
    assert str(locate(ID)) == ID


def test_a_copy_that_is_not_whole_says_so(cached):
    (cached / "model.safetensors").unlink()
    with pytest.raises(InputError, match=rf"^{ID}: .*HF_HUB_OFFLINE is set.*{COMMIT} is not whole \(no weights found"):
        rankclip_jax.load(ID)


# ---- What cannot be had


def test_what_the_hub_refuses_is_one_line(online, exported):
    online.repos["someone/gated"] = online.repos["someone/secret"] = exported
    online.denied_files["someone/gated"] = (403, "GatedRepo")
    online.denied["someone/secret"] = (401, "")
    online.denied["someone/broken"] = (500, "")
    for repo, said in {
        "someone/gone": r"no such model on the Hugging Face hub \(a private one needs `hf auth login`",
        "someone/gated": r"gated; ask for access at http://\S+/someone/gated, then `hf auth login`",
        "someone/secret": "no such model on the Hugging Face hub|denies access",
        "someone/broken": "the Hugging Face hub did not give it .*500",
    }.items():
        for read in (rankclip_jax.load, Tokenizer.load):
            with pytest.raises(InputError, match=said) as error:
                read(repo)
            assert str(error.value).startswith(f"{repo}: no such file or folder") and "\n" not in str(error.value)


def test_a_token_that_is_wrong_is_told_from_a_model_that_is_not_there(online, exported):
    online.repos[ID] = exported
    online.denied[ID] = (403, "")
    with pytest.raises(InputError, match=r"the Hugging Face hub denies access .*renew it by `hf auth login`"):
        rankclip_jax.load(ID)


def test_offline_and_not_cached_is_one_line(cached):
    said = r"^else/where: no such file or folder, nor is it in the hub's cache \S+; .*HF_HUB_OFFLINE is set"
    with pytest.raises(InputError, match=said):
        rankclip_jax.load("else/where")
    with pytest.raises(InputError, match="^else/where: no such file"):
        Tokenizer.load("else/where")


@pytest.mark.parametrize(
    "text", ["ViT-B-32.pt", "/a/b", "./a/b", "a/b/c", "runs/x.pt", "a/b.json", "a--b/c", "a/b..c", "~/a", "a/"]
)
def test_what_is_no_id_is_a_path(text, monkeypatch):
    assert not hub.is_id(text)
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such file or folder"):
        rankclip_jax.load(text)


@pytest.mark.parametrize("text", ["openai/clip-vit-base-patch32", "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "a/b_c"])
def test_ids(text):
    assert hub.is_id(text)
