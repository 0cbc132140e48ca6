"""Images on the device, in front of the towers: cut out and resized, augmented, normalised.

The pipeline lays pictures on a canvas of one size for all, with each one's own size and windows
(input_pipeline/transforms.py).
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

# Mean and standard deviation of OpenAI's training images, per channel, of pixels in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def views(batch: dict, side: int) -> jax.Array:
    """The pictures of a batch of the pipeline, uint8 (B, V, side, side, 3): V views of each, one unless it sent two.

    batch["image"] is a canvas (B, C, C, 3) where the batch has "size" (B, 2) and "windows" (B, V, 4); otherwise it
    was resized on the host, (B, side, side, 3) or (B, V, side, side, 3).
    """
    images = batch["image"]
    if "windows" in batch:
        return jax.vmap(lambda window: resize(images, batch["size"], window, side), 1, 1)(batch["windows"])
    return images if images.ndim == 5 else images[:, None]


def resize(canvas_BxCxCx3: jax.Array, size_Bx2: jax.Array, window_Bx4: jax.Array, side: int) -> jax.Array:
    """Cuts a window out of each picture and resizes it to PIL's pixels: bicubic, antialiased, the width first.

    Args:
      canvas_BxCxCx3: uint8, each picture at its top left; what lies beyond its size is never looked at.
      size_Bx2: height and width of each picture in pixels.
      window_Bx4: float32 (top, left, height, width) in pixels, fractions included, as `box` of PIL's resize; at most
        C high and wide.
      side: height and width of the result.

    Returns:
      uint8 (B, side, side, 3).
    """
    weights = functools.partial(_weights, side=side, side_C=canvas_BxCxCx3.shape[1])
    # Over B, and over the two axes.
    first_Bx2xS, weights_Bx2xSxT = jax.vmap(jax.vmap(weights))(window_Bx4[:, :2], window_Bx4[:, 2:], size_Bx2)
    # Chosen where the program is lowered: a step compiled ahead of time is not for the machine that compiles it.
    return lax.platform_dependent(canvas_BxCxCx3, first_Bx2xS, weights_Bx2xSxT, tpu=_by_products, default=_by_gathering)


_BITS = 22  # of PIL's fixed point: 32, less 8 for grey levels and 2 for weights beyond 0 to 1


def _weights(begin, length, size, side, side_C):
    """The T pixels that weigh in each pixel of one axis of the result: the first, int32 (side,), and 2^22 times their
    weights, int32 (side, T), zero beyond the picture."""
    taps = min(side_C, 2 * math.ceil(2 * max(1, side_C / side)) + 1)
    with jax.enable_x64(True):  # as PIL; in float32 a third of the weights would round otherwise, and so do exact ties
        begin, length, size = (x.astype(jnp.float64) for x in (begin, length, size))
        step = length / side
        stretch = jnp.maximum(step, 1.0)
        centre_Sx1 = begin + (jnp.arange(side, dtype=jnp.float64)[:, None] + 0.5) * step
        first_Sx1 = jnp.maximum(jnp.floor(centre_Sx1 - 2 * stretch + 0.5), 0.0)
        last_Sx1 = jnp.minimum(jnp.floor(centre_Sx1 + 2 * stretch + 0.5), size)
        pixels_SxT = first_Sx1 + jnp.arange(taps, dtype=jnp.float64)
        weights = _cubic((pixels_SxT - centre_Sx1 + 0.5) / stretch) * (pixels_SxT < last_Sx1)
        total = jnp.sum(weights, axis=1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1.0, total) * 2.0**_BITS  # 0: a row that fills up a batch
        weights = jnp.sign(weights) * jnp.floor(jnp.abs(weights) + 0.5)
        return first_Sx1[:, 0].astype(jnp.int32), weights.astype(jnp.int32)


def _cubic(x):
    """Keys' cubic convolution kernel with a = -0.5, PIL's bicubic."""
    x = jnp.abs(x)
    return jnp.where(x < 1, (1.5 * x - 2.5) * x * x + 1, jnp.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))


def _by_gathering(canvas_BxCxCx3, first_Bx2xS, weights_Bx2xSxT):
    """Fetches the T pixels: the least work."""

    def one(image, first_2xS, weights_2xSxT):
        for axis in (1, 0):
            total = 0
            for tap in range(weights_2xSxT.shape[2]):
                pixels = jnp.take(image, first_2xS[axis] + tap, axis=axis, mode="clip").astype(jnp.int32)
                total += pixels * jnp.expand_dims(weights_2xSxT[axis, :, tap], (1 - axis, 2))
            image = _grey_levels(total)
        return image

    return jax.vmap(one)(canvas_BxCxCx3, first_Bx2xS, weights_Bx2xSxT)


def _by_products(canvas_BxCxCx3, first_Bx2xS, weights_Bx2xSxT):
    """The same by matrix products, for TPUs."""
    offset_Bx2xSxC = jnp.arange(canvas_BxCxCx3.shape[1]) - first_Bx2xS[..., None]
    taps = range(weights_Bx2xSxT.shape[3])
    weights_Bx2xSxC = sum(jnp.where(offset_Bx2xSxC == tap, weights_Bx2xSxT[..., tap, None], 0) for tap in taps)
    narrow_BxCxSx3 = _grey_levels(_product("bow,bhwc->bhoc", weights_Bx2xSxC[:, 1], canvas_BxCxCx3))
    return _grey_levels(_product("boh,bhwc->bowc", weights_Bx2xSxC[:, 0], narrow_BxCxSx3))


def _product(subscripts, weights, pixels):
    """einsum of int32 weights and uint8 pixels, exact: bfloat16 holds grey levels and digits of 8 bits, -128 to 127,
    and float32 the sums of 512 products of both.

    Splitting float32 weights into bfloat16 and remainder would not do: XLA takes w - f32(bf16(w)) for 0.
    """
    total = 0
    for shift in (0, 8, 16):
        digit = ((weights + 128) & 255) - 128 if shift < 16 else weights
        weights = (weights - digit) >> 8
        operands = digit.astype(jnp.bfloat16), pixels.astype(jnp.bfloat16)
        total += jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32).astype(jnp.int32) << shift
    return total


def _grey_levels(total):
    return jnp.clip((total + (1 << _BITS - 1)) >> _BITS, 0, 255).astype(jnp.uint8)


def augment(
    key: jax.Array, images_BxHxWx3: jax.Array, *, flip: bool, jitter: tuple[float, float, float] | None
) -> jax.Array:
    """Random mirroring and colour jitter, each image by itself.

    Args:
      images_BxHxWx3: uint8.
      flip: mirror left to right with probability one half.
      jitter: None, or (brightness, contrast, saturation), scaled in this order by factors drawn uniformly from
        [max(0, 1 - x), 1 + x], as torchvision's ColorJitter defines the three.

    Returns:
      uint8 without jitter, float32 in [0, 255] with it.
    """
    flip_key, jitter_key = jax.random.split(key)
    images = random_flip(flip_key, images_BxHxWx3) if flip else images_BxHxWx3
    return color_jitter(jitter_key, images, *jitter) if jitter else images


def random_flip(key: jax.Array, images_BxHxWx3: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half."""
    flip_B = jax.random.bernoulli(key, shape=images_BxHxWx3.shape[:1])
    return jnp.where(flip_B[:, None, None, None], images_BxHxWx3[:, :, ::-1], images_BxHxWx3)


def color_jitter(
    key: jax.Array, images_BxHxWx3: jax.Array, brightness: float, contrast: float, saturation: float
) -> jax.Array:
    """Brightness, contrast and saturation of each image scaled at random (see `augment`) -> float32 in [0, 255]."""
    uniform_3xB = jax.random.uniform(key, (3, len(images_BxHxWx3)))
    low, high = (jnp.array([[max(0, 1 + sign * x)] for x in (brightness, contrast, saturation)]) for sign in (-1, 1))
    factors = (low + (high - low) * uniform_3xB)[:, :, None, None, None]

    def blend(images, others, factor):
        return jnp.clip(factor * images + (1 - factor) * others, 0, 255)

    x = images_BxHxWx3.astype(jnp.float32)
    x = blend(x, 0.0, factors[0])
    x = blend(x, jnp.mean(_luma(x), axis=(1, 2), keepdims=True), factors[1])
    return blend(x, _luma(x), factors[2])


def _luma(x_BxHxWx3):
    return jnp.sum(x_BxHxWx3 * jnp.array([0.299, 0.587, 0.114]), axis=-1, keepdims=True)  # ITU-R 601, as PIL's "L"


def draw_patches(key: jax.Array, rows: int, patches: int, kept: int) -> jax.Array:
    """The patches that each image keeps, int32 (rows, kept): numbers below `patches`, all different, in any order.

    A row's draw depends on the key and its place alone, wherever it is computed.
    """
    return jnp.argsort(jax.random.bits(key, (rows, patches)), axis=1)[:, :kept]


def normalize(
    images_BxHxWx3: jax.Array, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> jax.Array:
    """Pixels in [0, 255] -> float32, (x / 255 - mean) / std, channel by channel. None: CLIP's."""
    mean, std = jnp.array(mean or MEAN, jnp.float32), jnp.array(std or STD, jnp.float32)
    return (images_BxHxWx3.astype(jnp.float32) / 255 - mean) / std
