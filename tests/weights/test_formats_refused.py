"""What does not fit in files of weights is named, and what lies beside them is left out."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from rankclip_jax.weights import architecture, layouts
from rankclip_jax.weights.formats import read, write_openai
from tests.weights.test_formats import ODD, RESNET, VIT, assert_same, embed, inputs, variables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def save(path, state):
    from safetensors.numpy import save_file

    save_file(state, path)


@pytest.fixture
def state():
    return layouts.to_state(variables(VIT), VIT, layouts.openai)


def test_a_wrong_shape_names_the_tensor(tmp_path, state):
    key = "transformer.resblocks.1.attn.in_proj_weight"
    state[key] = state[key][:-1]
    save(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match=rf"{key} has shape \(191, 64\); expected \(192, 64\)"):
        read(tmp_path / "a.safetensors")


def test_missing_and_unknown_tensors_are_named(tmp_path, state):
    del state["visual.ln_pre.bias"]
    save(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match=r"a\.safetensors: missing tensors: visual\.ln_pre\.bias$"):
        read(tmp_path / "a.safetensors")
    state["visual.ln_pre.bias"] = np.zeros(128, np.float32)
    state["logit_gain"] = np.zeros((), np.float32)
    save(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match="unknown tensors: logit_gain; this is not a CLIP"):
        read(tmp_path / "a.safetensors")


def test_other_models_and_guesses_that_cannot_be_made(tmp_path, state):
    save(tmp_path / "a.safetensors", {"encoder.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="these are not the weights of a CLIP"):
        read(tmp_path / "a.safetensors")
    odd = layouts.to_state(variables(ODD), ODD, layouts.openai)
    save(tmp_path / "odd.safetensors", odd)
    with pytest.raises(ValueError, match=r"width 48 is not a multiple of 64.*provide a config"):
        read(tmp_path / "odd.safetensors")
    assert_same(read(tmp_path / "odd.safetensors", config=ODD)[1], variables(ODD))
    save(tmp_path / "hf.safetensors", layouts.to_state(variables(VIT), VIT, layouts.hugging_face))
    with pytest.raises(ValueError, match=r"weights without config\.json"):
        read(tmp_path / "hf.safetensors")


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: f"module.{k}",  # DistributedDataParallel
        lambda k: f"_orig_mod.{k}",  # torch.compile
        lambda k: f"model.{k}",  # Lightning
        lambda k: f"module.model._orig_mod.clip.{k}",
        lambda k: k.replace("visual.", "visual._orig_mod.", 1),  # one tower compiled
        lambda k: k.replace("resblocks.1.", "resblocks.1._checkpoint_wrapped_module."),
        # All around open_clip's CustomTextCLIP.
        lambda k: "module._orig_mod." + (k if k.startswith(("visual", "logit")) else f"text.{k}"),
    ],
)
@pytest.mark.parametrize("layout", [layouts.openai, layouts.hugging_face])
def test_prefixes_of_wrappers_are_stripped(tmp_path, rename, layout):
    state = {rename(k): v for k, v in layouts.to_state(variables(VIT), VIT, layout).items()}
    save(tmp_path / "a.safetensors", state)
    assert_same(read(tmp_path / "a.safetensors", config=VIT)[1], variables(VIT))


def test_what_lies_beside_the_model_is_left_out_and_two_models_are_refused(tmp_path, state):
    held = {f"model.{k}": v for k, v in state.items()}
    beside = {"metric.total": np.zeros(3, np.float32), "loss.logit_scale": np.zeros((), np.float32)}
    save(tmp_path / "a.safetensors", held | beside)
    assert_same(read(tmp_path / "a.safetensors")[1], variables(VIT))
    save(tmp_path / "b.safetensors", held | {f"teacher.{k}": v for k, v in state.items()})
    with pytest.raises(ValueError, match=r"b\.safetensors: holds several models: model\., teacher\.; save the one"):
        read(tmp_path / "b.safetensors")
    save(tmp_path / "c.safetensors", state | {f"ema.{k}": v for k, v in state.items()})
    with pytest.raises(ValueError, match=r"holds several models: without a prefix, ema\.; save the one"):
        read(tmp_path / "c.safetensors")


def test_quantised_weights_are_no_weights(tmp_path, state):
    for dtype in (np.int8, np.bool_, np.uint8):
        save(tmp_path / "a.safetensors", state | {"visual.proj": (state["visual.proj"] * 100).astype(dtype)})
        with pytest.raises(ValueError, match=rf"visual\.proj is {np.dtype(dtype)}\. Expected floating point: "):
            read(tmp_path / "a.safetensors")
    header = json.dumps({"weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"b\.safetensors cannot be read \(.*\); save it as float32 or bfloat16$"):
        read(tmp_path / "b.safetensors")


def test_the_bias_of_siglips_loss_is_left_aside(open_clip, tmp_path, state):
    save(tmp_path / "a.safetensors", state | {"logit_bias": np.array(-10, np.float32)})
    assert_same(read(tmp_path / "a.safetensors")[1], variables(VIT))
    described = architecture.to_open_clip(VIT) | {"init_logit_bias": -10}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    torch.manual_seed(0)
    towers = described["vision_cfg"], described["text_cfg"]
    model = open_clip.CLIP(described["embed_dim"], *towers, quick_gelu=True, init_logit_bias=-10)
    torch.save({"model_state_dict": model.eval().state_dict()}, tmp_path / "open_clip_pytorch_model.bin")
    assert "logit_bias" in model.state_dict()
    config, values = read(tmp_path)
    assert config == VIT
    z_img, z_txt, _ = embed(config, values)
    images, tokens = inputs(config)
    with torch.no_grad():
        expected_img = model.encode_image(torch.tensor(images).permute(0, 3, 1, 2), normalize=True)
        expected_txt = model.encode_text(torch.tensor(tokens).long(), normalize=True)
    np.testing.assert_allclose(z_img, expected_img, atol=1e-5)
    np.testing.assert_allclose(z_txt, expected_txt, atol=1e-5)


def test_neither_torch_nor_tensorflow_is_imported(tmp_path, state):
    save(tmp_path / "a.safetensors", state)
    code = f"""
import sys
import types
sys.modules |= dict.fromkeys(["torch", "tensorflow", "transformers"])  # importing them fails
from rankclip_jax.weights.formats import read, write_hf
config, values = read({str(tmp_path / "a.safetensors")!r})
write_hf({str(tmp_path / "out")!r}, config, values)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_activation_of_undescribed_files(tmp_path, state):
    save(tmp_path / "a.safetensors", state)
    assert read(tmp_path / "a.safetensors")[0] == VIT
    assert read(tmp_path / "a.safetensors", activation="gelu")[0] == dataclasses.replace(VIT, activation="gelu")


@pytest.mark.parametrize("cut", [20, 2000, -8])
def test_truncated_safetensors(tmp_path, state, cut):
    save(tmp_path / "a.safetensors", state)
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or truncated"):
        read(tmp_path / "a.safetensors")


def test_folders_without_weights_or_with_a_missing_shard(tmp_path):
    with pytest.raises(ValueError, match="no weights found"):
        read(tmp_path)
    index = {"weight_map": {"logit_scale": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shard model-00001-of-00002\.safetensors is missing"):
        read(tmp_path)
    index["weight_map"]["logit_scale"] = "../secret.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names a shard in another folder"):
        read(tmp_path)


def test_writing_parameters_of_another_config_names_them(tmp_path):
    other = dataclasses.replace(VIT, embed_dim=25)
    with pytest.raises(ValueError, match=r"params/visual/proj has shape \(128, 24\); expected \(128, 25\)"):
        write_openai(
            tmp_path,
            other,
            {"params": {**variables(VIT)["params"], "text": variables(other)["params"]["text"]}},
        )
    with pytest.raises(ValueError, match=r"batch_stats/visual/.* is missing"):
        write_openai(tmp_path, RESNET, {"params": variables(RESNET)["params"]})
