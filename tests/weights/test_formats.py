"""Weights against `transformers` and open_clip: read theirs, write ours, compare embeddings and bits."""

import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankclip_jax.models import (
    CLIP,
    PRESETS,
    ClipConfig,
    ResNetConfig,
    TextConfig,
    VitConfig,
    stack_layers,
    unstack_layers,
)
from rankclip_jax.weights import architecture, layouts
from rankclip_jax.weights.formats import read, write_hf, write_openai
from tests.support.open_clip_models import open_clip_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VIT = ClipConfig(24, VitConfig(32, 8, 128, 2, 2), TextConfig(64, 1, 2, 12, vocab_size=99, eot_id=98))
# Head sizes other than 64, MLPs other than fourfold, another activation, an end-of-text id in mid-vocabulary.
ODD = ClipConfig(24, VitConfig(32, 8, 48, 2, 3, 70), TextConfig(40, 2, 3, 12, 99, 50, mlp_width=90), activation="gelu")
TANH = dataclasses.replace(ODD, activation="gelu_tanh")
RESNET = ClipConfig(24, ResNetConfig(64, (1, 2, 1, 1), 8), TextConfig(64, 1, 2, 12, vocab_size=99, eot_id=98))
RESNET_TANH = dataclasses.replace(RESNET, activation="gelu_tanh")
SMALL = dataclasses.replace(RESNET, vision=ResNetConfig(16, (1, 2, 1), 16, "small"))


@functools.cache
def variables(config):
    """Random variables, nowhere at their initial zeros and ones."""
    model, rng = CLIP(config), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs()))

    def draw(path, x):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        return np.asarray(2.5 if name == "logit_scale" else rng.normal(0, 0.15, x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(config, batch=4):
    rng = np.random.default_rng(1)
    size, length = config.vision.image_size, config.text.context_length
    tokens = rng.integers(1, min(config.text.eot_id, 49), (batch, length)).astype(np.int32)
    for row, end in enumerate((3, 7, length - 1, 5)[:batch]):
        tokens[row, end], tokens[row, end + 1 :] = config.text.eot_id, 0
    return rng.normal(size=(batch, size, size, 3)).astype(np.float32), tokens


@functools.cache
def _apply(config):
    return jax.jit(CLIP(config).apply)


def embed(config, values, batch=4):
    """Image and text embeddings and logits of our model."""
    z_img, z_txt, scale = _apply(config)(values, *inputs(config, batch))
    return np.array(z_img), np.array(z_txt), np.array(scale * z_img @ z_txt.T)


def assert_close(ours, theirs):
    """Within 1e-5, embeddings and the cosines behind the logits (which are cosines times exp(2.5))."""
    for a, b, scale in zip(ours, theirs, (1, 1, np.exp(2.5)), strict=True):
        np.testing.assert_allclose(a / scale, b.detach().numpy() / scale, atol=1e-5, rtol=0)


def assert_same(a, b):
    """Two trees with the same names and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- Hugging Face


def hf_model(config):
    described = architecture.to_hugging_face(config)
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(**described)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.logit_scale.fill_(2.5)
    return model


@torch.no_grad()
def hf_embed(model, config):
    images, tokens = inputs(config)
    pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    out = model(input_ids=torch.tensor(tokens).long(), pixel_values=pixels)
    return out.image_embeds, out.text_embeds, out.logits_per_image


@pytest.mark.parametrize("config", [VIT, ODD], ids=["vit", "odd"])
@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_read_hugging_face(tmp_path, config, shard):
    model = hf_model(config)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "100KB")
    read_config, values = read(tmp_path)
    assert read_config == config
    assert_close(embed(config, values), hf_embed(model, config))


def test_read_hugging_face_half_precision_and_bin(tmp_path):
    model = hf_model(VIT).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    _, values = read(tmp_path / "bf16")
    assert_same(values, read(tmp_path / "bin")[1])
    theirs = model.visual_projection.weight.detach().float().numpy().T
    assert values["params"]["visual"]["proj"].dtype == np.float32
    np.testing.assert_array_equal(values["params"]["visual"]["proj"], theirs)


@pytest.mark.parametrize("config", [VIT, ODD], ids=["vit", "odd"])
def test_write_hugging_face(tmp_path, config):
    write_hf(tmp_path, config, variables(config), bos_id=97)
    model, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(embed(config, variables(config)), hf_embed(model.eval(), config))
    read_config, values = read(tmp_path)
    assert read_config == config
    assert_same(values, variables(config))
    # Theirs, read and written again, is theirs to the bit.
    write_hf(tmp_path / "again", config, read(tmp_path)[1])
    again = transformers.CLIPModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())


def test_scanned_and_bfloat16_parameters_are_written_the_same(tmp_path):
    scanned = {"params": stack_layers(variables(VIT)["params"])}
    write_hf(tmp_path / "scanned", VIT, scanned)
    assert_same(read(tmp_path / "scanned")[1], variables(VIT))
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), variables(VIT))
    write_openai(tmp_path / "half", VIT, half)
    assert_same(read(tmp_path / "half")[1], jax.tree.map(lambda x: np.asarray(x, np.float32), half))


def test_hugging_face_has_no_resnet(tmp_path):
    with pytest.raises(ValueError, match="no ResNet tower; write the openai layout"):
        write_hf(tmp_path / "x", RESNET, variables(RESNET))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blip"}, "unsupported model_type 'blip'; expected 'clip' or 'siglip'"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps 1e-06"),
        ({"vision_config": {"hidden_act": "gelu"}}, "different activations, 'gelu' and 'quick_gelu'"),
        ({"vision_config": {"num_channels": 1}}, "num_channels 1"),
        ({k: {"hidden_act": "relu"} for k in ("text_config", "vision_config")}, "activation='relu'"),
        ({"vision_config": {"image_size": 30}}, "image_size 30 is not a multiple"),
        ({"text_config": {"num_hidden_layers": 3}}, "missing tensors: text_model.encoder.layers.2."),
        ({"text_config": {"num_hidden_layers": 1}}, "unknown tensors: text_model.encoder.layers.1."),
    ],
)  # fmt: skip
def test_hugging_face_config_that_does_not_fit(tmp_path, change, message):
    write_hf(tmp_path, VIT, variables(VIT))
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


def test_old_hugging_face_configs():
    config = {"model_type": "clip", "projection_dim": 768, "vision_config_dict": {"patch_size": 14}}
    ours = architecture.from_hugging_face(config | {"text_config": {"eos_token_id": 2}})
    assert (ours.embed_dim, ours.vision.patch_size, ours.vision.width) == (768, 14, 768)
    assert ours.text.eot_id == 49407  # 2 means the highest id in files of that time


# ---- OpenAI, RankCLIP and open_clip
OPEN_CLIP = {"vit": VIT, "odd": ODD, "tanh": TANH, "resnet": RESNET, "resnet, tanh": RESNET_TANH}


@torch.no_grad()
def open_clip_embed(model, config, batch=4):
    images, tokens = inputs(config, batch)
    z_img, z_txt, scale = model(torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(tokens).long())
    return z_img, z_txt, scale * z_img @ z_txt.T


@pytest.mark.parametrize("config", OPEN_CLIP.values(), ids=OPEN_CLIP)
def test_read_open_clip(open_clip, tmp_path, config):
    model = open_clip_model(open_clip, config)
    expected = open_clip_embed(model, config)
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": architecture.to_open_clip(config), "preprocess_cfg": {}})
    )
    # open_clip's training script and the RankCLIP code save this dict, under DistributedDataParallel with
    # the prefix.
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state}, tmp_path / "epoch_1.pt")
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    for path in (tmp_path / "epoch_1.pt", tmp_path):
        read_config, values = read(path)
        assert read_config == config
        assert_close(embed(config, values), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_read_torchscript_and_architecture_from_weights(open_clip, tmp_path, config):
    """As OpenAI's files are: a TorchScript archive in half precision that nothing else describes."""
    model = open_clip_model(open_clip, config).half()
    images, tokens = inputs(config)
    example = torch.tensor(images).permute(0, 3, 1, 2).half(), torch.tensor(tokens).long()
    torch.jit.save(torch.jit.trace(model, example, check_trace=False), tmp_path / "model.pt")
    read_config, values = read(tmp_path / "model.pt")
    assert read_config == config
    assert_close(embed(config, values), open_clip_embed(model.float(), config))


@pytest.mark.parametrize("config", OPEN_CLIP.values(), ids=OPEN_CLIP)
def test_write_open_clip(open_clip, tmp_path, config):
    write_openai(tmp_path, config, variables(config))
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    assert_close(embed(config, variables(config)), open_clip_embed(model, config))
    read_config, values = read(tmp_path)
    assert read_config == config
    assert_same(values, variables(config))
    # Theirs, saved by PyTorch, read and written again, is theirs to the bit.
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    write_openai(tmp_path / "again", config, read(tmp_path / "theirs.pt")[1])
    again = open_clip.create_model(f"local-dir:{tmp_path / 'again'}").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())


def test_resnet_for_small_images_comes_back(tmp_path):
    write_openai(tmp_path, SMALL, variables(SMALL))
    assert "model_cfg" not in json.loads((tmp_path / "open_clip_config.json").read_text())
    config, values = read(tmp_path)
    assert config == SMALL
    assert_same(values, variables(SMALL))
    (tmp_path / "open_clip_config.json").unlink()
    assert read(tmp_path)[0] == SMALL  # from the shapes alone


LIKE_THEIRS = [name for name in PRESETS if not name.endswith("tiny") and not PRESETS[name].siglip]
QUICK = ("ViT-B/32", "ViT-S/16", "RN50")  # those of the others take seconds to lay out


def open_clips(open_clip, name):
    """(open_clip's description of a preset, whether it has the exact GELU)."""
    gelu = PRESETS[name].activation == "gelu" or name == "ViT-S/16"
    return open_clip.get_model_config(re.sub(r"[/@]", "-", name) + ("" if gelu else "-quickgelu")), gelu


@pytest.mark.parametrize("name", LIKE_THEIRS)
def test_presets_have_the_fields_of_open_clips_and_come_back(open_clip, name):
    config = PRESETS[name]
    described, gelu = open_clips(open_clip, name)
    expected = dataclasses.replace(config, activation="gelu" if gelu else "quick_gelu")
    assert architecture.from_open_clip(described) == expected
    assert architecture.from_open_clip(architecture.to_open_clip(config)) == config
    if isinstance(config.vision, VitConfig):
        assert architecture.from_hugging_face(architecture.to_hugging_face(config)) == config


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LIKE_THEIRS]
)
def test_presets_have_the_names_and_shapes_of_open_clip_and_transformers(open_clip, name):
    """No weight is allocated: PyTorch's on the meta device, ours as shapes, of large ones under a scan."""
    config, described = PRESETS[name], open_clips(open_clip, name)[0]
    model = CLIP(config, scan_layers=name not in QUICK)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs()))
    if model.scan_layers:  # arrays that repeat one number
        tree = unstack_layers(jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), tree))

    def shapes(layout):
        places = {}
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            place = layout("/".join(k.key for k in path[1:]), len(x.shape))
            shape = tuple(x.shape[a] for a in place.axes) if place.axes else x.shape
            places[place.key] = (3 * shape[0], *shape[1:]) if place.part is not None else shape
        return places

    def theirs(model):
        return {k: tuple(v.shape) for k, v in model.state_dict().items() if not layouts.IGNORED.fullmatch(k)}

    ours = shapes(layouts.openai)
    with torch.device("meta"):
        assert theirs(open_clip.CLIP(described["embed_dim"], described["vision_cfg"], described["text_cfg"])) == ours
        if isinstance(config.vision, VitConfig):
            hf = transformers.CLIPModel(transformers.CLIPConfig(**architecture.to_hugging_face(config)))
            assert theirs(hf) == shapes(layouts.hugging_face)
    arrays = {k: types.SimpleNamespace(shape=shape) for k, shape in ours.items()}
    assert architecture.from_weights(arrays, config.activation) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name = 'vit' is not supported"),
        ({"text_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs = .* of one tower alone, or of quick_gelu"),
        ({"text_cfg": {"hf_model_name": "roberta"}}, "hf_model_name = 'roberta' is not supported"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask = True"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type = 'avg'"),
        ({"vision_cfg": {"image_size": [224, 256]}}, "only square images"),
        ({"multimodal_cfg": {"width": 512}}, "multimodal_cfg = "),
    ],
)
def test_open_clip_configs_of_other_models_are_refused(change, message):
    described = architecture.to_open_clip(PRESETS["ViT-B/32"])
    for key, value in change.items():
        described[key] = {**described.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        architecture.from_open_clip(described)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_full_size_models_give_open_clips_embeddings(open_clip, tmp_path, name):
    config = PRESETS[name]
    torch.manual_seed(0)
    model = open_clip.create_model(name.replace("/", "-") + "-quickgelu").eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    read_config, values = read(tmp_path / "model.pt")
    assert read_config == config
    model.logit_scale.data.fill_(2.5)
    values["params"]["logit_scale"] = np.float32(2.5)
    assert_close(embed(config, values, batch=1), open_clip_embed(model, config, batch=1))
