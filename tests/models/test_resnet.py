"""ModifiedResNet against an oracle put together from torch.nn pieces after the paper's description."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankclip_jax.models import ResNetConfig
from rankclip_jax.models.resnet import Bottleneck, ModifiedResNet

torch = pytest.importorskip("torch")
F = torch.nn.functional

CONFIGS = {
    "imagenet": ResNetConfig(64, (2, 1, 1, 1), 8),
    "small": ResNetConfig(16, (1, 2, 1), 16, "small"),
}


class TorchOracle:
    """The forward pass as plain functions of a dict of tensors named by our own parameter paths, in float64: in float32
    a ReLU near 0 takes its other side with another number of threads, and a twentieth of a gradient with it."""

    def __init__(self, config, params, stats):
        self.config = config
        leaves = jax.tree_util.tree_leaves_with_path
        self.p = {_path(k): _double(v).requires_grad_() for k, v in leaves(params)}
        self.stats = {_path(k): _double(v) for k, v in leaves(stats)}

    def conv(self, x, name, stride=1):
        w = self.p[f"{name}/kernel"].permute(3, 2, 0, 1)
        return F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)

    def norm(self, x, name, train):
        mean, var = self.stats[f"{name}/mean"], self.stats[f"{name}/var"]
        scale, bias = self.p[f"{name}/scale"], self.p[f"{name}/bias"]
        return F.batch_norm(x, mean, var, scale, bias, training=train, momentum=0.1, eps=1e-5)

    def bottleneck(self, x, name, planes, stride, train):
        y = F.relu(self.norm(self.conv(x, f"{name}/conv1"), f"{name}/bn1", train))
        y = F.relu(self.norm(self.conv(y, f"{name}/conv2"), f"{name}/bn2", train))
        y = F.avg_pool2d(y, stride)
        y = self.norm(self.conv(y, f"{name}/conv3"), f"{name}/bn3", train)
        if stride > 1 or x.shape[1] != 4 * planes:
            x = self.conv(F.avg_pool2d(x, stride), f"{name}/downsample_0")
            x = self.norm(x, f"{name}/downsample_1", train)
        return F.relu(x + y)

    def attnpool(self, x):
        def weight(name):
            return self.p[f"attnpool/{name}/kernel"].T

        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
        tokens = tokens + self.p["attnpool/positional_embedding"][:, None]
        biases = [self.p[f"attnpool/{n}_proj/bias"] for n in "qkv"]
        out, _ = F.multi_head_attention_forward(
            tokens, tokens, tokens, tokens.shape[-1], self.config.heads,
            None, torch.cat(biases), None, None, False, 0.0,
            weight("c_proj"), self.p["attnpool/c_proj/bias"],
            use_separate_proj_weight=True, need_weights=False,
            q_proj_weight=weight("q_proj"), k_proj_weight=weight("k_proj"), v_proj_weight=weight("v_proj"),
        )  # fmt: skip
        return out[0]

    def __call__(self, images_BxHxWx3, train):
        x, cfg = images_BxHxWx3.permute(0, 3, 1, 2), self.config
        convs = [(1, 1)] if cfg.stem == "small" else [(1, 2), (2, 1), (3, 1)]
        for i, stride in convs:
            x = F.relu(self.norm(self.conv(x, f"conv{i}", stride), f"bn{i}", train))
        if cfg.stem == "imagenet":
            x = F.avg_pool2d(x, 2)
        for stage, blocks in enumerate(cfg.layers):
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                x = self.bottleneck(x, f"layer{stage + 1}_{i}", cfg.width * 2**stage, stride, train)
        return self.attnpool(x)


def _double(x):
    return torch.tensor(np.array(x), dtype=torch.float64)


def _path(keys):
    return "/".join(k.key for k in keys)


@functools.cache
def _setup(stem, batch=5):
    """Variables that are nowhere at their initial zeros and ones (drawn by NumPy: no compiling)."""
    config, rng = CONFIGS[stem], np.random.default_rng(1)
    model = ModifiedResNet(config, embed_dim=24)
    images = jnp.asarray(rng.normal(size=(batch, config.image_size, config.image_size, 3)), jnp.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), images))

    def draw(path, x):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32)
        return jnp.asarray(rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape), jnp.float32)

    return config, model, images, jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("stem", CONFIGS)
@pytest.mark.parametrize("train", [False, True])
def test_forward_matches_torch(stem, train):
    config, model, images, variables = _setup(stem)
    oracle = TorchOracle(config, variables["params"], variables["batch_stats"])
    expected = oracle(_double(images), train).detach().numpy()
    apply = jax.jit(lambda v, x: model.apply(v, x, train, mutable=["batch_stats"]))
    z, new = apply(variables, images)
    np.testing.assert_allclose(z, expected, atol=1e-5, rtol=1e-5)
    for keys, value in jax.tree_util.tree_leaves_with_path(new["batch_stats"]):
        # F.batch_norm has updated the oracle's statistics in place (in training only).
        np.testing.assert_allclose(value, oracle.stats[_path(keys)].numpy(), atol=1e-6, rtol=1e-5)


def test_running_variance_is_unbiased():
    config, model, images, variables = _setup("small", batch=2)
    _, new = jax.jit(lambda v: model.apply(v, images, True, mutable=["batch_stats"]))(variables)
    kernel = np.array(variables["params"]["conv1"]["kernel"])
    conv = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    batch = np.array(conv, np.float64).reshape(-1, config.width).var(axis=0, ddof=1)
    expected = 0.9 * np.array(variables["batch_stats"]["bn1"]["var"]) + 0.1 * batch
    np.testing.assert_allclose(new["batch_stats"]["bn1"]["var"], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stem", CONFIGS)
def test_gradients_match_torch(stem):
    config, model, images, variables = _setup(stem)
    weights = np.random.default_rng(0).normal(size=(len(images), 24)).astype(np.float32)

    def loss(params, images):
        z, _ = model.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])
        return jnp.sum(z * weights)

    grads, image_grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], images)
    oracle = TorchOracle(config, variables["params"], variables["batch_stats"])
    torch_images = _double(images).requires_grad_()
    (oracle(torch_images, True) * torch.tensor(weights)).sum().backward()

    def close(ours, theirs, name):
        # Batch norm's gradients cancel, so small entries carry rounding of the large ones: absolute
        # tolerance relative to the largest entry of the whole gradient.
        assert np.abs(np.array(ours) - theirs).max() < 1e-5 * largest, name

    expected = {k: v.grad.numpy() for k, v in oracle.p.items()}
    largest = max(np.abs(v).max() for v in expected.values())
    assert largest > 0.1
    for keys, value in jax.tree_util.tree_leaves_with_path(grads):
        close(value, expected[_path(keys)], _path(keys))
    largest = np.abs(torch_images.grad.numpy()).max()
    close(image_grads, torch_images.grad.numpy(), "images")


@pytest.mark.slow
def test_remat_changes_nothing():
    _, model, images, variables = _setup("small")
    remat = model.clone(remat=True)

    def loss(model):
        return lambda p: model.apply({**variables, "params": p}, images, True, mutable=["batch_stats"])[
            0
        ].sum()

    plain, again = (jax.jit(jax.grad(loss(m)))(variables["params"]) for m in (model, remat))
    largest = max(jnp.abs(x).max() for x in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), plain, again)


def test_block_starts_as_its_shortcut():
    bottleneck = Bottleneck(planes=4, stride=1, train=False, dtype=jnp.float32)
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 4, 4, 16)))
    variables = jax.jit(bottleneck.init)(jax.random.key(1), x)
    assert variables["params"]["conv3"]["kernel"].all() and variables["params"]["bn1"]["scale"].all()
    np.testing.assert_array_equal(bottleneck.apply(variables, x), x)


def test_one_value_a_channel_cannot_train():
    config = ResNetConfig(2, (1, 1), 16, "small")  # one image of 2 pixels: a 1x1 map after the stride
    model = ModifiedResNet(config, 8)
    images = jnp.ones((1, 2, 2, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    with pytest.raises(ValueError, match="more than one value a channel"):  # its shape says so: nothing is computed
        jax.eval_shape(lambda variables: model.apply(variables, images, True, mutable=["batch_stats"]), variables)


def test_bfloat16_stays_near_float32():
    _, model, images, variables = _setup("small")
    z32, z16 = (jax.jit(m.apply)(variables, images) for m in (model, model.clone(dtype=jnp.bfloat16)))
    assert z16.dtype == jnp.bfloat16
    z32, z16 = np.array(z32), np.array(z16, np.float32)
    cosine = (z32 * z16).sum(-1) / np.linalg.norm(z32, axis=-1) / np.linalg.norm(z16, axis=-1)
    assert cosine.min() > 0.999
