"""Files that are not what their names say: empty, Git LFS pointers, web pages. Each reader calls them what they are."""

import pytest

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.weights import export, formats, orbax_folder, pretrained
from tests.support.made_models import VIT, make_workdir

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 605247071\n"
HTML = "\ufeff\n<!DOCTYPE html>\n<html><head>\n<title>Sign in \n to Files</title></head><body>...</body></html>"
XML = '<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
KINDS = {
    "empty": ("", r" is empty; download it again$"),
    "blank": ("\0" * 5000, r" begins with blanks or zeros only; download it again$"),
    "lfs": (LFS, r" is a Git LFS pointer to 605,247,071 bytes that are not here; run `git lfs pull` in its folder"),
    "html": (HTML, r" is a web page \('Sign in to Files'\), such as a login or an error message; download it again$"),
    "xml": (XML, r" is a web page \('Access Denied'\)"),
}
# Which file of which layout, and who reads it.
FILES = {
    "hf": ["model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"],
    "openai": ["open_clip_model.safetensors", "open_clip_config.json"],
    "orbax": [orbax_folder.CONFIG],
    "workdir": ["config.json", "tokenizer.json"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("made")
    make_workdir(made / "workdir", VIT)
    for layout in ("hf", "openai", "orbax"):
        export.write(pretrained.read(made / "workdir"), made / layout, layout)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout, name", [(layout, name) for layout, names in FILES.items() for name in names])
def test_a_model_with_a_stand_in(folders, layout, name, kind):
    content, said = KINDS[kind]
    path = folders / layout / name
    good = path.read_bytes()
    try:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=name.replace(".", r"\.") + said.rstrip("$")) as error:
            pretrained.read(folders / layout)
        assert "\n" not in str(error.value)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_weights_alone(tmp_path, name, kind):
    (tmp_path / name).write_text(KINDS[kind][0], encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{tmp_path / name}{KINDS[kind][1]}"):
        formats.read(tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"])
def test_tokenizers(tmp_path, name, kind):
    if name != "tokenizer.json":
        (tmp_path / "vocab.json").write_text("{}")
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / name).write_text(KINDS[kind][0], encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{tmp_path / name}{KINDS[kind][1]}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_servers_answer_in_words_is_shown(folders, tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes((folders / "hf" / "model.safetensors").read_bytes())
    (tmp_path / name).write_text("Invalid username or\npassword.")
    with pytest.raises(InputError, match=rf"{name} is not .*, it begins with 'Invalid username or password.'"):
        pretrained.read(tmp_path)


@pytest.mark.parametrize(
    "layout, name, content, said",
    [
        ("hf", "config.json", "[]", "config.json holds a list as JSON; expected an object"),
        ("hf", "config.json", '{"model_type": "clip", "vision_config": 3}', "config.json does not describe a CLIP"),
        ("openai", "open_clip_config.json", "{}", r"does not describe a CLIP \(KeyError: 'model_cfg'\)"),
        ("openai", "open_clip_config.json", '{"model_cfg": {"embed_dim": 8}}', r"\(KeyError: 'vision_cfg'\)"),
        ("orbax", orbax_folder.CONFIG, "{}", r"does not describe a CLIP \(KeyError: 'vision'\)"),
        ("hf", "preprocessor_config.json", '{"size": 32', "preprocessor_config.json is not valid JSON"),
        ("workdir", "config.json", "null", "is a workdir, but its config.json cannot be read .*restore it"),
    ],
)
def test_configs_that_do_not_say_what_they_must(folders, layout, name, content, said):
    path = folders / layout / name
    good = path.read_bytes()
    try:
        path.write_text(content)
        with pytest.raises(InputError, match=said):
            pretrained.read(folders / layout)
    finally:
        path.write_bytes(good)
