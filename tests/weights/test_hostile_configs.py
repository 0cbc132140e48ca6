"""Configurations of weights that are damaged or hostile: read, or refused in one line, at once."""

import json

import pytest

from rankclip_jax import models
from rankclip_jax.models import ClipConfig, TextConfig, VitConfig
from rankclip_jax.weights import formats
from tests.support.made_models import drawn

CONFIG = ClipConfig(24, VitConfig(32, 8, 128, 2, 2), TextConfig(64, 1, 2, 12, vocab_size=99, eot_id=98))
VALUES = [0, -1, 10**8, 10**30, 1.5, float("nan"), True, None, "", "7", [], [3, 3, 3], {}, {"a": 1}, [[[]]]]
FILES = {formats.write_hf: "config.json", formats.write_openai: "open_clip_config.json"}


@pytest.fixture(scope="module", params=FILES, ids=lambda write: write.__name__)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    request.param(folder, CONFIG, drawn(models.CLIP(CONFIG)))
    return folder, FILES[request.param]


def places(value, path=()):
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from places(inner, (*path, key))


def test_any_field_may_hold_anything(folder, monkeypatch):
    folder, name = folder
    # What fits is compared with the tensors; their shapes are known here, and each trace would take its time.
    right = formats.layouts.template(CONFIG)
    monkeypatch.setattr(formats.layouts, "template", lambda config: right)
    whole = json.loads((folder / name).read_text())
    whole.pop("rankclip_jax", None)  # so that open_clip's part is read
    refused = 0
    for path in places(whole):
        for value in VALUES:
            changed = json.loads(json.dumps(whole))
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
            (folder / name).write_text(json.dumps(changed))
            try:
                formats.read(folder)
            except ValueError as error:
                refused += 1
                assert str(error).startswith(str(folder)) and "\n" not in str(error) and len(str(error)) < 500
    assert refused > 100


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000, f'{{"embed_dim": {"9" * 5000}}}', "[1]", "7"])
def test_a_config_that_is_no_object(folder, content):
    folder, name = folder
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name) as error:
        formats.read(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"w": "model.safetensors.index.json"}, "names another index"),
        ({"w": ["a", "b"]}, "no weight_map of names"),
        ({"w": 3}, "no weight_map of names"),
        ([], "no weight_map of names"),
        ({"w": "../../etc/passwd"}, "shard in another folder"),
    ],
)
def test_indices(tmp_path, parts, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(ValueError, match=message):
        formats.read(tmp_path)
