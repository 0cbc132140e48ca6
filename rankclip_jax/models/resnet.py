"""OpenAI's ModifiedResNet: averaging before every stride, and attention instead of global pooling.

As Radford et al. 2021 (arXiv 2103.00020, section 2.4) describe and their released weights require: three
stem convolutions and an average pool, strides as average pools (after the 3x3 convolution of a bottleneck,
and before the 1x1 of its shortcut), and one attention layer whose query is the mean of the feature map.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rankclip_jax.models.attention import attend
from rankclip_jax.models.layers import BatchNorm, Conv, Linear, avg_pool, normal
from rankclip_jax.models.presets import ResNetConfig
from rankclip_jax.models.transformer import remat_policy


class Bottleneck(nn.Module):
    """1x1, 3x3, average pool by `stride`, 1x1 to 4 * planes; a projected shortcut where shapes differ."""

    planes: int
    stride: int
    train: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        def conv(x, features, kernel_size, name):
            return Conv(features, kernel_size, dtype=self.dtype, name=name)(x)

        def norm(x, name, zero_scale=False):
            return BatchNorm(zero_scale, self.dtype, name=name)(x, self.train)

        out = self.planes * 4
        y = nn.relu(norm(conv(x_BxHxWxC, self.planes, 1, "conv1"), "bn1"))
        y = nn.relu(norm(conv(y, self.planes, 3, "conv2"), "bn2"))
        y = avg_pool(y, self.stride) if self.stride > 1 else y
        # Zero scale: the block starts as its shortcut.
        y = norm(conv(y, out, 1, "conv3"), "bn3", zero_scale=True)
        x = x_BxHxWxC
        if self.stride > 1 or x.shape[-1] != out:
            x = avg_pool(x, self.stride) if self.stride > 1 else x
            x = norm(conv(x, out, 1, "downsample_0"), "downsample_1")
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """(B, H, W, C) -> (B, features): attention of the mean token over itself and all cells."""

    features: int
    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        b, h, w, c = x_BxHxWxC.shape
        x = x_BxHxWxC.reshape(b, h * w, c)
        positions = self.param("positional_embedding", normal(c**-0.5), (h * w + 1, c))
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1) + positions.astype(self.dtype)

        def project(x_NxC, features, name):
            return Linear(features, std=c**-0.5, dtype=self.dtype, name=name)(x_NxC)

        # Only the mean token asks: the other queries' answers would be thrown away.
        q = project(x[:, 0], c, "q_proj").reshape(b, 1, c)
        k = project(x.reshape(-1, c), c, "k_proj").reshape(x.shape)
        v = project(x.reshape(-1, c), c, "v_proj").reshape(x.shape)
        return project(attend(q, k, v, self.heads)[:, 0], self.features, "c_proj")


class ModifiedResNet(nn.Module):
    """(B, H, W, 3) normalised images -> (B, embed_dim), not yet of unit length."""

    config: ResNetConfig
    embed_dim: int
    dtype: DTypeLike = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, images_BxHxWx3: jax.Array, train: bool = False) -> jax.Array:
        cfg = self.config

        def stem(x, i, features, stride=1):
            x = Conv(features, 3, stride, dtype=self.dtype, name=f"conv{i}")(x)
            return nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{i}")(x, train))

        x = images_BxHxWx3.astype(self.dtype)
        if cfg.stem == "small":
            x = stem(x, 1, cfg.width)
        else:
            x = stem(x, 1, cfg.width // 2, stride=2)
            x = stem(x, 2, cfg.width // 2)
            x = avg_pool(stem(x, 3, cfg.width), 2)
        remat = self.remat and not self.is_initializing()  # as in transformer.py
        block = nn.remat(Bottleneck, policy=remat_policy(self.remat)) if remat else Bottleneck
        for stage, blocks in enumerate(cfg.layers):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(cfg.width * 2**stage, stride, train, self.dtype, name=f"layer{stage + 1}_{i}")(x)
        return AttentionPool(self.embed_dim, cfg.heads, self.dtype, name="attnpool")(x)
