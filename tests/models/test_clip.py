"""The whole dual encoder: sizes, the towers against `transformers`, layouts, masks, first values, errors."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankclip_jax.models import (
    CLIP,
    ClipConfig,
    TextConfig,
    VitConfig,
    build,
    configure,
    stack_layers,
    unstack_layers,
)
from rankclip_jax.models.transformer import ResidualAttentionBlock

TINY = ClipConfig(24, VitConfig(32, 8, 32, 3, 2), TextConfig(48, 3, 2, 12, vocab_size=99, eot_id=97))


def _tokens(batch=4, length=12):
    """Rows that end at different places; padding 0 and the id above the end-of-text id both occur."""
    tokens = np.random.default_rng(0).integers(1, 97, (batch, length)).astype(np.int32)
    tokens[:, 1] = 98
    for row, end in enumerate((3, 7, length - 1, 5)):
        tokens[row, end] = 97
        tokens[row, end + 1 :] = 0
    return jnp.array(tokens)


@functools.cache
def _model(config=TINY):
    """A model and parameters that are nowhere at their initial zeros and ones (NumPy draws: no compiling)."""
    model, rng = CLIP(config), np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs()))["params"]

    def draw(path, x):
        offset = 1.0 if path[-1].key == "scale" else 2.0 if path[-1].key == "logit_scale" else 0.0
        return jnp.asarray(offset + rng.normal(0, 0.15, x.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def _images(model, batch=4):
    size = model.config.vision.image_size
    return jax.random.normal(jax.random.key(2), (batch, size, size, 3))


PARAMETERS = {
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-L/14@336": 427_944_193,
    "ViT-H/14": 986_109_441,
    "ViT-g/14": 1_366_678_273,
    "ViT-bigG/14": 2_539_567_105,
}
# Unrolled blocks, which are traced one by one, have the shapes of the scanned ones, whatever the model is.
CASES = [(name, True) for name in PARAMETERS] + [("ViT-B/32", False), ("RN50", False)]
SLOW = ("RN50x16", "RN50x64")


@pytest.mark.parametrize(
    ("name", "scan_layers"), [pytest.param(*c, marks=pytest.mark.slow if c[0] in SLOW else ()) for c in CASES]
)
def test_parameter_count(name, scan_layers):
    model = build(name, scan_layers=scan_layers)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs()))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == PARAMETERS[name]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))


def _copy_block(block, theirs, torch):
    def put(target, name):
        tree = block
        for part in name.split("/"):
            tree = tree[part]
        for kind, value in tree.items():
            value = torch.tensor(np.array(value))
            getattr(target, "bias" if kind == "bias" else "weight").copy_(
                value.T if kind == "kernel" else value
            )

    for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
        put(getattr(theirs.self_attn, n), f"attn/{n}")
    put(theirs.layer_norm1, "ln_1")
    put(theirs.layer_norm2, "ln_2")
    put(theirs.mlp.fc1, "mlp/c_fc")
    put(theirs.mlp.fc2, "mlp/c_proj")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_towers_match_transformers(activation):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, p = _model(dataclasses.replace(TINY, activation=activation))
    vision, text = model.config.vision, model.config.text
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                "vocab_size": text.vocab_size, "hidden_size": text.width, "intermediate_size": 4 * text.width,
                "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
                "max_position_embeddings": text.context_length, "hidden_act": activation,
                "bos_token_id": 96, "eos_token_id": text.eot_id, "projection_dim": 24,
            },
            vision_config={
                "hidden_size": vision.width, "intermediate_size": 4 * vision.width,
                "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads,
                "image_size": vision.image_size, "patch_size": vision.patch_size, "hidden_act": activation,
                "projection_dim": 24,
            },
            projection_dim=24,
        )
    ).eval()  # fmt: skip

    def tensor(x):
        return torch.tensor(np.array(x))

    with torch.no_grad():
        v, t = theirs.vision_model, theirs.text_model
        v.embeddings.patch_embedding.weight.copy_(tensor(p["visual"]["conv1"]["kernel"]).permute(3, 2, 0, 1))
        v.embeddings.class_embedding.copy_(tensor(p["visual"]["class_embedding"]))
        v.embeddings.position_embedding.weight.copy_(tensor(p["visual"]["positional_embedding"]))
        t.embeddings.token_embedding.weight.copy_(tensor(p["text"]["token_embedding"]["embedding"]))
        t.embeddings.position_embedding.weight.copy_(tensor(p["text"]["positional_embedding"]))
        norms = [
            (v.pre_layrnorm, p["visual"]["ln_pre"]),
            (v.post_layernorm, p["visual"]["ln_post"]),
            (t.final_layer_norm, p["text"]["ln_final"]),
        ]
        for norm, values in norms:
            norm.weight.copy_(tensor(values["scale"]))
            norm.bias.copy_(tensor(values["bias"]))
        for tower, layers in ((p["visual"], v.encoder.layers), (p["text"], t.encoder.layers)):
            for i, layer in enumerate(layers):
                _copy_block(tower["transformer"][f"resblocks_{i}"], layer, torch)
        theirs.visual_projection.weight.copy_(tensor(p["visual"]["proj"]).T)
        theirs.text_projection.weight.copy_(tensor(p["text"]["text_projection"]).T)
        theirs.logit_scale.copy_(tensor(p["logit_scale"]))

        images, tokens = _images(model), _tokens()
        out = theirs(
            input_ids=tensor(tokens).long(), pixel_values=tensor(images).permute(0, 3, 1, 2).contiguous()
        )
    z_img, z_txt, scale = jax.jit(model.apply)({"params": p}, images, tokens)
    np.testing.assert_allclose(z_img, out.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(z_txt, out.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(scale * z_img @ z_txt.T, out.logits_per_image.numpy(), atol=2e-4)


def test_embeddings_are_unit_float32_in_bfloat16_too():
    model, params = _model()
    images, tokens = _images(model), _tokens()
    exact = jax.jit(model.apply)({"params": params}, images, tokens)
    rough = jax.jit(model.clone(dtype=jnp.bfloat16).apply)({"params": params}, images, tokens)
    for z32, z16 in zip(exact[:2], rough[:2], strict=True):
        assert z16.dtype == jnp.float32 and z16.shape == (4, 24)
        np.testing.assert_allclose(jnp.linalg.norm(z16, axis=1), 1, atol=1e-6)
        assert (z32 * z16).sum(1).min() > 0.999
        assert jnp.abs(z32 - z16).max() > 1e-5  # it did compute in bfloat16
    assert rough[2].dtype == jnp.float32
    np.testing.assert_allclose(rough[2], jnp.exp(params["logit_scale"]), rtol=1e-6)


@pytest.mark.slow
def test_scan_and_remat_change_nothing():
    model, params = _model(dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, layers=2)))
    images, tokens = _images(model), _tokens()

    def value_and_grad(model, params):
        def loss(params):
            z_img, z_txt, scale = model.apply({"params": params}, images, tokens)
            return -jnp.mean(jnp.diag(jax.nn.log_softmax(scale * z_img @ z_txt.T)))

        return jax.jit(jax.value_and_grad(loss))(params)

    value, grads = value_and_grad(model, params)
    for scan, remat in ((False, True), (True, False), (True, True)):
        other = model.clone(scan_layers=scan, remat=remat)
        value2, grads2 = value_and_grad(other, stack_layers(params) if scan else params)
        np.testing.assert_allclose(value, value2, rtol=1e-5)
        grads2 = unstack_layers(grads2)
        assert jax.tree.structure(grads2) == jax.tree.structure(grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, grads2)


def test_the_blocks_of_a_tower_are_traced_once(monkeypatch):
    model, params = _model()
    traced, call = [], ResidualAttentionBlock.__call__
    monkeypatch.setattr(ResidualAttentionBlock, "__call__", lambda self, *x: traced.append(x) or call(self, *x))
    step = jax.jit(jax.grad(lambda params: model.apply({"params": params}, _images(model), _tokens())[0].sum()))
    named = str(step.lower(params).as_text(debug_info=True))
    assert model.config.vision.layers > 1 and model.config.text.layers > 1 and len(traced) == 2
    assert all(f"visual/transformer/resblocks_{i}" in named for i in range(model.config.vision.layers))


def test_without_a_jit_around_it_a_tower_compiles_nothing_anew():
    model, params = _model()
    encode = functools.partial(model.apply, {"params": params}, _images(model), method=model.encode_image)
    encode()
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    encode()
    assert "/jax/core/compile/backend_compile_duration" not in events
    jax.jit(lambda x: x * len(events))(1.0)  # which is what a compilation is called
    assert "/jax/core/compile/backend_compile_duration" in events


def test_stack_layers_round_trip_on_host_and_device():
    _, params = _model()
    for tree in (params, jax.tree.map(np.asarray, params)):
        stacked = stack_layers(tree)
        leaf = stacked["text"]["transformer"]["resblocks"]["attn"]["q_proj"]["kernel"]
        assert leaf.shape == (2, 48, 48) and type(leaf) is type(jax.tree.leaves(tree)[0])
        back = unstack_layers(stacked)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, tree)))
    # A scanned model's own parameters have exactly that structure.
    scanned = CLIP(TINY, scan_layers=True)
    shapes = jax.eval_shape(lambda: scanned.init(jax.random.key(0), *scanned.example_inputs()))["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda x: x.shape, shapes)


def test_text_is_causal_and_pooled_at_the_first_end_of_text():
    model, params = _model()
    encode = jax.jit(lambda tokens: model.apply({"params": params}, tokens, method="encode_text"))
    tokens = _tokens()
    z = encode(tokens)
    after = jnp.cumsum(tokens == 97, axis=1) - (tokens == 97) > 0
    assert after.any()
    for filler in (5, 97, 98):  # ordinary, a second end-of-text, an id above it
        np.testing.assert_array_equal(encode(jnp.where(after, filler, tokens)), z)
    changed = encode(tokens.at[:, 0].set((tokens[:, 0] + 1) % 97))
    assert (jnp.abs(changed - z).max(axis=1) > 1e-4).all()
    # Rows may be cut to a shorter length as long as the end-of-text token stays.
    np.testing.assert_allclose(encode(tokens[1:2, :8]), z[1:2], atol=1e-6)


def test_images_of_a_batch_do_not_mix():
    model, params = _model()
    images = _images(model)
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode_image"))
    np.testing.assert_allclose(encode(images)[1:2], encode(images[1:2]), atol=1e-6)


@pytest.mark.slow
def test_initial_values():
    config = ClipConfig(256, VitConfig(64, 8, 256, 2, 4), TextConfig(192, 3, 3, 77, 5000, 4999))
    model = CLIP(config)
    p = jax.jit(model.init)(jax.random.key(0), *model.example_inputs())["params"]
    visual, text = p["visual"], p["text"]
    v, t = visual["transformer"]["resblocks_1"], text["transformer"]["resblocks_1"]

    def std(x, expected):
        # Standard error of a normal's std is std / sqrt(2n); 5 of them, for 16 draws.
        np.testing.assert_allclose(np.std(x), expected, rtol=5 / math.sqrt(2 * x.size))

    def uniform(x, bound):
        assert 0.95 * bound < np.abs(x).max() <= bound
        std(x, bound / math.sqrt(3))

    np.testing.assert_allclose(p["logit_scale"], math.log(1 / 0.07), rtol=1e-6)
    std(text["token_embedding"]["embedding"], 0.02)
    std(text["positional_embedding"], 0.01)
    std(text["text_projection"], 192**-0.5)
    for n in ("q_proj", "k_proj", "v_proj"):
        std(t["attn"][n]["kernel"], 192**-0.5)
        uniform(v["attn"][n]["kernel"], (6 / (256 + 3 * 256)) ** 0.5)
        assert not t["attn"][n]["bias"].any() and not v["attn"][n]["bias"].any()
    std(t["attn"]["out_proj"]["kernel"], 192**-0.5 * (2 * 3) ** -0.5)
    std(t["mlp"]["c_fc"]["kernel"], (2 * 192) ** -0.5)
    std(t["mlp"]["c_proj"]["kernel"], 192**-0.5 * (2 * 3) ** -0.5)
    uniform(v["attn"]["out_proj"]["kernel"], 256**-0.5)
    uniform(v["mlp"]["c_fc"]["kernel"], 256**-0.5)
    uniform(v["mlp"]["c_proj"]["kernel"], (4 * 256) ** -0.5)
    uniform(t["mlp"]["c_fc"]["bias"], 192**-0.5)
    uniform(visual["conv1"]["kernel"], (3 * 8 * 8) ** -0.5)
    std(visual["class_embedding"], 256**-0.5)
    std(visual["positional_embedding"], 256**-0.5)
    std(visual["proj"], 256**-0.5)
    assert not np.array_equal(
        *(visual["transformer"][f"resblocks_{i}"]["mlp"]["c_fc"]["kernel"] for i in (0, 1))
    )


def test_zero_features_have_a_zero_embedding_and_finite_gradients():
    from rankclip_jax.models.layers import l2_normalize

    x = jnp.array([[0.0, 0.0], [3.0, 4.0], [3e-15, 4e-15]])
    np.testing.assert_allclose(l2_normalize(x)[:2], [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert jnp.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(x)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ViT-B/23"}, r"unknown model 'ViT-B/23'; did you mean 'ViT-B/32'\?"),
        ({"vision": {"pach_size": 16}}, "unknown vision field 'pach_size'; did you mean 'patch_size'"),
        ({"text": {"layer": 2}}, "unknown text field 'layer'; did you mean 'layers'"),
        (
            {"image_size": 225},
            "image_size 225 is not a multiple of the vision tower's patch size 32; try 224",
        ),
        ({"image_size": 0}, "image_size 0. Expected whole numbers from 1 to 16,777,216"),
        ({"name": "RN50", "image_size": 240}, "image_size 240 is not a multiple .* stride 32; try 256"),
        ({"vocab_size": 1000}, "end-of-text id 49407 is not in a vocabulary of 1000"),
        ({"vision": {"heads": 7}}, "vision width 768 is not a multiple of its 7 heads"),
        ({"activation": "relu"}, "activation='relu'. Expected one of quick_gelu, gelu, gelu_tanh"),
        ({"name": "RN50", "vision": {"stem": "tiny"}}, "stem 'tiny' is neither"),
        ({"dtype": "float16"}, "dtype='float16'. Expected 'float32' or 'bfloat16'"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build(**{"name": "ViT-B/32"} | arguments)
    assert "\n" not in str(error.value)


def test_overrides_reach_the_config():
    config = configure(
        "RN-tiny", image_size=48, vocab_size=100, eot_id=99, vision={"layers": [1, 2]}, text={"layers": 1}
    )
    assert (config.vision.image_size, config.vision.layers, config.text.layers) == (48, (1, 2), 1)
    assert (config.text.vocab_size, config.text.eot_id, config.text.context_length) == (100, 99, 32)
    hash(config)  # a static argument of jit


def test_wrong_input_shapes_are_refused():
    model, params = _model()
    with pytest.raises(ValueError, match=r"images \(1, 64, 64, 3\) given to a model of \(batch, 32, 32, 3\)"):
        model.apply({"params": params}, jnp.zeros((1, 64, 64, 3)), method="encode_image")
    with pytest.raises(ValueError, match=r"tokens \(1, 13\) given to a model of \(batch, 1..12\)"):
        model.apply({"params": params}, jnp.zeros((1, 13), jnp.int32), method="encode_text")
