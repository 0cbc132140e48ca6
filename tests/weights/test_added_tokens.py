"""Tokenizers with tokens added after the end of text, read where transformers gives the same; or that add no end."""

import json

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

import rankclip_jax
from rankclip_jax.common.errors import InputError
from rankclip_jax.weights import export, pretrained
from tests.support.made_models import CAPTIONS, VIT, make_workdir

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TABLE = "text_model.embeddings.token_embedding.weight"
TEXTS = [*CAPTIONS[:4], "", "two dogs " * 40]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return pretrained.read(make_workdir(tmp_path_factory.mktemp("made") / "run", VIT))


@pytest.fixture
def folder(source, tmp_path):
    """An export whose tokenizer has two more tokens; its weights are as before."""
    export.write(source, tmp_path / "hf", "hf")
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert hf.add_special_tokens(["<|image|>", "[PAD]"]) == 2
    hf.save(str(tmp_path / "hf" / "tokenizer.json"))
    return tmp_path / "hf"


def change(folder, rows, **fields):
    """More rows in the table of token embeddings, and other fields of text_config."""
    weights = load_file(folder / "model.safetensors")
    more = np.random.default_rng(0).normal(size=(rows, weights[TABLE].shape[1])).astype(np.float32)
    weights[TABLE] = np.concatenate([weights[TABLE], more])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"vocab_size": len(weights[TABLE])} | fields
    (folder / "config.json").write_text(json.dumps(config))


def by_transformers(folder, texts):
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        z = model.get_text_features(**tokens)
    z = getattr(z, "pooler_output", z).numpy()
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "rows, fields",
    [
        (2, {}),  # the end of text is named
        (2, {"eos_token_id": 2}),  # an old file: transformers pools at a text's highest id
        (0, {}),  # the model was never resized, and no text has the new ids
        (0, {"eos_token_id": 2}),
        (9, {"eos_token_id": 2}),  # a table padded to a round size
    ],
)
def test_the_embeddings_are_those_of_transformers(folder, source, rows, fields):
    change(folder, rows, **fields)
    model = rankclip_jax.load(folder)
    assert model.source.config.text.eot_id == source.config.text.eot_id
    np.testing.assert_allclose(model.encode_text(TEXTS), by_transformers(folder, TEXTS), atol=1e-5)
    if rows:  # an added token that the model has is one token still
        assert model.source.tokenizer(["a [PAD]"], 16).max() == source.tokenizer.vocab_size + 1
    else:  # one that it lacks is spelled, never an id outside the table
        assert model.source.tokenizer(["a [PAD]"], 16).max() == source.tokenizer.eot_id


def test_a_model_whose_tokenizer_adds_no_end_of_text_gives_the_same_embeddings(folder, source):
    described = source.tokenizer.to_dict()
    described["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(described))
    np.testing.assert_array_equal(
        rankclip_jax.load(folder).encode_text(TEXTS), rankclip_jax.load(source.path).encode_text(TEXTS)
    )


def test_old_files_pool_elsewhere_where_other_tokens_have_higher_ids(folder, source):
    """With the end at a low id, transformers would pool at whatever token of the text has the highest."""
    change(folder, 0, eos_token_id=2)
    described = source.tokenizer.to_dict()
    end, other = source.tokenizer.eot_id, described["model"]["vocab"]["a"]
    described["model"]["vocab"]["a"] = end
    described["added_tokens"] = [
        token | ({"id": other} if token["id"] == end else {}) for token in described["added_tokens"]
    ]
    described["model"]["vocab"]["<|endoftext|>"] = other
    described["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=rf"has {end + 1} ids, end-of-text {other}; the model .*, end-of-text {end};"):
        rankclip_jax.load(folder)
