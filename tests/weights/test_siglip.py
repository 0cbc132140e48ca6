"""SigLIP against `transformers.SiglipModel` and big_vision's names: read, embed, train, write."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankclip_jax.models import CLIP, PRESETS, ClipConfig, TextConfig, VitConfig, stack_layers
from rankclip_jax.weights import architecture, formats, layouts, pretrained
from rankclip_jax.weights import view as views

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def siglip(vision, text, embed_dim=None, activation="gelu_tanh"):
    text = TextConfig(*text[:5], eot_id=1, mlp_width=text[5], pool="last")
    return ClipConfig(embed_dim or vision[2], VitConfig(*vision, pool="map"), text, activation)


SHAPES = {
    "plain": siglip((32, 8, 64, 2, 1), (64, 1, 2, 16, 99, None)),
    "pixels beyond the last patch, odd MLPs": siglip((30, 8, 48, 1, 3, 70), (48, 2, 3, 12, 99, 90)),
    "a wider image tower": siglip((32, 16, 96, 3, 4), (64, 4, 1, 9, 120, 100)),
    "one patch, exact GELU": siglip((16, 16, 32, 1, 2), (32, 2, 1, 5, 50, None), activation="gelu"),
}


def made(config, seed=0):
    """A SiglipModel of random weights, nowhere at their initial zeros and ones."""
    model = transformers.SiglipModel(transformers.SiglipConfig(**architecture.to_hugging_face(config))).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(
                torch.rand_like(x) + 0.5 if "norm" in name and name.endswith("weight") else 0.1 * torch.randn_like(x)
            )
        model.logit_scale.fill_(2.5)
        model.logit_bias.fill_(-7.0)
    return model


def inputs(config, batch=5):
    rng, side = np.random.default_rng(1), config.vision.image_size
    tokens = rng.integers(0, config.text.vocab_size, (batch, config.text.context_length)).astype(np.int32)
    return rng.normal(size=(batch, side, side, 3)).astype(np.float32), tokens


def theirs(model, pixels, tokens):
    """Embeddings of both towers and the logits of images by texts."""
    with torch.no_grad():
        images = torch.tensor(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        out = model(pixel_values=images, input_ids=torch.tensor(tokens).long())
    return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


def ours(config, variables, pixels, tokens, **options):
    z_img, z_txt, scale = jax.jit(CLIP(config, **options).apply)(variables, pixels, tokens)
    return z_img, z_txt, scale * z_img @ z_txt.T + variables["params"]["logit_bias"]


def assert_close(found, expected):
    """Within 1e-6 of the largest."""
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 1e-6 * np.abs(b).max()


@pytest.mark.parametrize("name", SHAPES)
def test_embeddings_and_logits_are_those_of_transformers_and_so_is_what_is_written(name, tmp_path):
    config, model = SHAPES[name], made(SHAPES[name])
    model.save_pretrained(tmp_path / "theirs")
    found, variables = formats.read(tmp_path / "theirs")
    assert found == config
    expected = theirs(model, *inputs(config))
    assert_close(ours(config, variables, *inputs(config)), expected)
    scanned = {"params": stack_layers(variables["params"])}
    assert_close(ours(config, scanned, *inputs(config), scan_layers=True, remat=True), expected)
    formats.write_hf(tmp_path / "ours", config, scanned)
    again = transformers.SiglipModel.from_pretrained(tmp_path / "ours").eval()
    for a, b in zip(theirs(again, *inputs(config)), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def big_vision(model, config, scanned):
    """The weights of a SiglipModel as big_vision stores them: an own table, by what its modules are called."""
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    stored = {"params/t": state["logit_scale"], "params/b": state["logit_bias"]}
    stored["params/txt/head/kernel"] = state["text_model.head.weight"].T
    stored["params/txt/head/bias"] = state["text_model.head.bias"]
    stored["params/txt/Embed_0/embedding"] = state["text_model.embeddings.token_embedding.weight"]
    stored["params/img/embedding/kernel"] = state["vision_model.embeddings.patch_embedding.weight"].transpose(
        2, 3, 1, 0
    )
    stored["params/img/embedding/bias"] = state["vision_model.embeddings.patch_embedding.bias"]

    def attention(heads, q, k, v, out):
        for name, (weight, bias) in dict(query=q, key=k, value=v).items():
            yield f"MultiHeadDotProductAttention_0/{name}/kernel", weight.T.reshape(len(weight), heads, -1)
            yield f"MultiHeadDotProductAttention_0/{name}/bias", bias.reshape(heads, -1)
        yield "MultiHeadDotProductAttention_0/out/kernel", out[0].T.reshape(heads, -1, len(out[0]))
        yield "MultiHeadDotProductAttention_0/out/bias", out[1]

    def mlp(prefix):
        for dense, fc in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            yield f"MlpBlock_0/{dense}/kernel", state[f"{prefix}.{fc}.weight"].T
            yield f"MlpBlock_0/{dense}/bias", state[f"{prefix}.{fc}.bias"]

    def pair(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    for tower, encoder, hf, last in (
        (config.vision, "img/Transformer", "vision_model", "post_layernorm"),
        (config.text, "txt/Encoder_0", "text_model", "final_layer_norm"),
    ):
        positions = state[f"{hf}.embeddings.position_embedding.weight"][None]
        stored[f"params/{encoder.split('/')[0]}/pos_embedding"] = positions
        stored |= zip(
            (f"params/{encoder}/encoder_norm/{x}" for x in ("scale", "bias")), pair(f"{hf}.{last}"), strict=True
        )
        blocks = []
        for i in range(tower.layers):
            layer = f"{hf}.encoder.layers.{i}"
            block = dict(attention(tower.heads, *(pair(f"{layer}.self_attn.{n}_proj") for n in ("q", "k", "v", "out"))))
            block |= mlp(f"{layer}.mlp")
            for k in (0, 1):
                block[f"LayerNorm_{k}/scale"], block[f"LayerNorm_{k}/bias"] = pair(f"{layer}.layer_norm{k + 1}")
            blocks.append(block)
        for name in blocks[0]:
            if scanned:
                stored[f"params/{encoder}/encoderblock/{name}"] = np.stack([block[name] for block in blocks])
            else:
                stored |= {f"params/{encoder}/encoderblock_{i}/{name}": b[name] for i, b in enumerate(blocks)}
    head = "vision_model.head"
    fused = zip(*(np.split(state[f"{head}.attention.in_proj_{x}"], 3) for x in ("weight", "bias")), strict=True)
    pooled = dict(attention(config.vision.heads, *fused, pair(f"{head}.attention.out_proj"))) | dict(mlp(f"{head}.mlp"))
    pooled["LayerNorm_0/scale"], pooled["LayerNorm_0/bias"] = pair(f"{head}.layernorm")
    pooled["probe"] = state[f"{head}.probe"]
    return stored | {f"params/img/MAPHead_0/{name}": x for name, x in pooled.items()}


@pytest.mark.parametrize("scanned", [False, True], ids=["SigLIP's", "SigLIP 2's, scanned"])
def test_big_visions_files_give_the_same(scanned, tmp_path):
    config = SHAPES["a wider image tower"]
    model = made(config)
    np.savez(tmp_path / "a.npz", **big_vision(model, config, scanned))
    read = pretrained.read(tmp_path / "a.npz")
    assert read.config == config and read.view == views.usual(config.vision) and read.tokenizer is None
    assert_close(ours(config, read.variables, *inputs(config)), theirs(model, *inputs(config)))


def test_big_visions_files_in_half_precision_and_damaged_ones(tmp_path):
    config = SHAPES["plain"]
    stored = big_vision(made(config), config, scanned=True)
    np.savez(tmp_path / "half.npz", **{name: x.astype(jnp.bfloat16) for name, x in stored.items()})
    params = formats.read(tmp_path / "half.npz")[1]["params"]
    expected = stored["params/txt/head/kernel"].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params["text"]["head"]["kernel"], expected)
    (tmp_path / "lfs.npz").write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")
    with pytest.raises(ValueError, match=r"lfs.npz is a Git LFS pointer to 12,345 bytes"):
        formats.read(tmp_path / "lfs.npz")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "half.npz").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"torn.npz.* is damaged or truncated"):
        formats.read(tmp_path / "torn.npz")
    del stored["params/img/MAPHead_0/probe"]
    np.savez(tmp_path / "gap.npz", **stored)
    with pytest.raises(ValueError, match=r"gap.npz: img/MAPHead_0/probe is missing; these are not SigLIP's two towers"):
        formats.read(tmp_path / "gap.npz")


# Width, layers, heads and MLP of the image towers: big_vision's decode_variant, and timm's vit_giantopt_patch16_siglip.
VISION = {
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "g-opt": (1536, 40, 16, 6144),
}
# Our preset -> open_clip's names of the same architecture.
OPEN_CLIP = {
    "SigLIP-B/32": ["ViT-B-32-SigLIP2-256"],
    "SigLIP-B/16": ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP2"],
    "SigLIP-B/16@256": ["ViT-B-16-SigLIP-256", "ViT-B-16-SigLIP2-256"],
    "SigLIP-B/16@384": ["ViT-B-16-SigLIP-384", "ViT-B-16-SigLIP2-384"],
    "SigLIP-B/16@512": ["ViT-B-16-SigLIP-512", "ViT-B-16-SigLIP2-512"],
    "SigLIP-L/16": ["ViT-L-16-SigLIP-256", "ViT-L-16-SigLIP2-256"],
    "SigLIP-L/16@384": ["ViT-L-16-SigLIP-384", "ViT-L-16-SigLIP2-384"],
    "SigLIP-L/16@512": ["ViT-L-16-SigLIP2-512"],
    "SigLIP-So400m/14": ["ViT-SO400M-14-SigLIP", "ViT-SO400M-14-SigLIP2"],
    "SigLIP-So400m/14@384": ["ViT-SO400M-14-SigLIP-384"],
    "SigLIP-So400m/16": ["ViT-SO400M-16-SigLIP2-256"],
    "SigLIP-So400m/16@384": ["ViT-SO400M-16-SigLIP2-384"],
    "SigLIP-So400m/16@512": ["ViT-SO400M-16-SigLIP2-512"],
    "SigLIP-g-opt/16": ["ViT-gopt-16-SigLIP2-256"],
    "SigLIP-g-opt/16@384": ["ViT-gopt-16-SigLIP2-384"],
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_presets_are_open_clips(open_clip, name):
    config = PRESETS[name]
    text = config.text
    for other in OPEN_CLIP[name]:
        described = open_clip.get_model_config(other)
        sizes = described["text_cfg"]
        assert (config.embed_dim, config.vision.image_size) == (
            described["embed_dim"],
            described["vision_cfg"]["image_size"],
        )
        assert (text.width, text.layers, text.heads) == (sizes["width"], sizes["layers"], sizes["heads"])
        assert (text.mlp_width or 4 * text.width) == int(sizes.get("mlp_ratio", 4) * text.width)
        # One checkpoint of SigLIP has 16 tokens; SigLIP 2's vocabulary is given by its tokenizer.
        assert text.context_length == sizes["context_length"] or other == "ViT-SO400M-14-SigLIP"
        assert text.vocab_size == sizes["vocab_size"] or "SigLIP2" in other
    size, patch = name.removeprefix("SigLIP-").split("@")[0].split("/")
    vision = config.vision
    assert (vision.width, vision.layers, vision.heads, vision.mlp_width or 4 * vision.width) == VISION[size]
    assert vision.patch_size == int(patch)
    assert architecture.from_hugging_face(architecture.to_hugging_face(config)) == config


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPEN_CLIP if "@" not in name])
def test_presets_have_the_shapes_of_transformers(name):
    config = PRESETS[name]
    with torch.device("meta"):
        hf = transformers.SiglipModel(transformers.SiglipConfig(**architecture.to_hugging_face(config)))
    expected = {k: tuple(v.shape) for k, v in hf.state_dict().items() if not k.startswith("logit_")}
    found = {}
    for path, shape in layouts.template(config).items():
        place = layouts.hugging_face(path.partition("/")[2], len(shape))
        shape = tuple(shape[a] for a in place.axes) if place.axes else shape
        found[place.key] = (3 * shape[0], *shape[1:]) if place.part is not None else shape
    assert {k: v for k, v in found.items() if not k.startswith("logit_")} == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "siglip2"}, "a NaFlex checkpoint of SigLIP 2 .* use one of fixed resolution"),
        ({"vision_config": {"vision_use_head": False}}, "unsupported vision_use_head False"),
        ({"text_config": {"layer_norm_eps": 1e-5}}, "unsupported layer_norm_eps 1e-05; expected 1e-06"),
        ({"text_config": {"projection_size": 32}}, "embed_dim 32: SigLIP's image tower has no projection"),
        ({"vision_config": {"hidden_act": "relu"}}, "different activations"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    described = architecture.to_hugging_face(SHAPES["plain"])
    for key, value in change.items():
        described[key] = described[key] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        architecture.from_hugging_face(described)
