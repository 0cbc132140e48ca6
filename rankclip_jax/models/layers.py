"""The small layers that the towers share. Parameters are float32; `dtype` is what a layer computes in.

Initial values are PyTorch's defaults where OpenAI's code does not overrule them: weights and biases of
linear layers and convolutions uniform in +-fan_in^-0.5 (Kaiming uniform with a = sqrt 5).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def symmetric_uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform in [-bound, bound)."""
    return drawn(lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound))


def normal(std: float) -> nn.initializers.Initializer:
    """Normal, of mean 0."""
    return drawn(nn.initializers.normal(std))


def drawn(init: nn.initializers.Initializer) -> nn.initializers.Initializer:
    """A call of its own in any program, which common/drawing.py looks for."""
    return jax.jit(init, static_argnums=(1, 2))


def activate(x: jax.Array, activation: str) -> jax.Array:
    """QuickGELU, x sigmoid(1.702 x), as OpenAI trained with, the exact (erf) GELU, or its tanh approximation."""
    if activation == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=activation == "gelu_tanh")


def l2_normalize(x: jax.Array) -> jax.Array:
    """Rows of unit length, in float32. A zero row stays zero (and has a finite gradient)."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


class Linear(nn.Module):
    """y = x W + b over the last axis. Callers pass two-dimensional x: XLA on CPU is faster so.

    std: normal weights; bound: uniform ones; neither: PyTorch's default. zero_bias: it starts at zero.
    """

    features: int
    std: float | None = None
    bound: float | None = None
    zero_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_NxD: jax.Array) -> jax.Array:
        fan_in_bound = x_NxD.shape[-1] ** -0.5
        uniform = symmetric_uniform(self.bound or fan_in_bound)
        kernel_init = normal(self.std) if self.std else uniform
        bias_init = nn.initializers.zeros if self.zero_bias else symmetric_uniform(fan_in_bound)
        kernel = self.param("kernel", kernel_init, (x_NxD.shape[-1], self.features))
        bias = self.param("bias", bias_init, (self.features,))
        return x_NxD.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm in float32 whatever the compute dtype; returns `dtype`."""

    dtype: DTypeLike = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        # Two passes: E[x^2] - E[x]^2 cancels where a row's mean is far from zero.
        var = jnp.square(centred).mean(axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(var + self.eps) * scale + bias).astype(self.dtype)


class Conv(nn.Module):
    """Convolution without bias, (B, H, W, C) and (kh, kw, C, O), padding kernel // 2, as ResNets use it."""

    features: int
    kernel_size: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        k, channels = self.kernel_size, x_BxHxWxC.shape[-1]
        init = symmetric_uniform((k * k * channels) ** -0.5)
        kernel = self.param("kernel", init, (k, k, channels, self.features)).astype(self.dtype)
        x = x_BxHxWxC.astype(self.dtype)
        if k == 1:  # a matrix product, and XLA on CPU runs it faster when it is written as one
            return (x.reshape(-1, channels) @ kernel[0, 0]).reshape(*x.shape[:-1], self.features)
        pad = (k // 2, k // 2)
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class BatchNorm(nn.Module):
    """Batch norm over (B, H, W) with PyTorch's running statistics (collection `batch_stats`: mean, var).

    New running value = 0.9 old + 0.1 batch, the running variance unbiased (n / (n - 1)), epsilon 1e-5.
    Statistics are in float32 and, under jit over a sharded batch, those of the global batch.
    Raises ValueError in training when a channel has a single value, whose variance is undefined.
    """

    zero_scale: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        channels = x_BxHxWxC.shape[-1]
        init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", init, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        x = x_BxHxWxC.astype(jnp.float32)
        if train:
            n = x.size // channels
            if n < 2:
                raise ValueError("batch norm needs more than one value a channel to train")
            mean = x.mean(axis=(0, 1, 2))
            var = jnp.square(x - mean).mean(axis=(0, 1, 2))
            if not self.is_initializing():
                running_mean.value = 0.9 * running_mean.value + 0.1 * mean
                running_var.value = 0.9 * running_var.value + 0.1 * var * (n / (n - 1))
        else:
            mean, var = running_mean.value, running_var.value
        return ((x - mean) * (jax.lax.rsqrt(var + 1e-5) * scale) + bias).astype(self.dtype)


def avg_pool(x_BxHxWxC: jax.Array, k: int) -> jax.Array:
    """Mean over k x k cells with stride k. H and W are multiples of k: the config made sure."""

    def mean(x):
        b, h, w, c = x.shape
        return x.reshape(b, h // k, k, w // k, k, c).mean(axis=(2, 4))

    def sum_of_cells(x):
        x = x.astype(jnp.float32)
        return jnp.asarray(sum(x[:, i::k, j::k] for i in range(k) for j in range(k)) / k**2, jnp.bfloat16)

    if x_BxHxWxC.dtype != jnp.bfloat16:
        return mean(x_BxHxWxC)
    # jaxlib 0.12 on CPU fuses the mean into wrong numbers, up to NaN, when they are bfloat16.
    return jax.lax.platform_dependent(x_BxHxWxC, cpu=sum_of_cells, default=mean)
