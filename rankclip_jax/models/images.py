"""Images on the device, in front of the towers: cut out and resized, augmented, normalised.

The pipeline lays pictures on a canvas of one size for all, with each one's own size and windows
(input_pipeline/transforms.py). Resizing a window is two small matrix products an image.
"""

import functools

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
    """Cuts a window out of each picture and resizes it as PIL does: bicubic, antialiased, at most one grey level off.

    Args:
      canvas_BxCxCx3: uint8, each picture at its top left; what lies beyond its size is never looked at.
      size_Bx2: height and width of each picture in pixels.
      window_Bx4: float32 (top, left, height, width) in pixels, fractions included, as `box` of PIL's resize.
      side: height and width of the result.

    Returns:
      uint8 (B, side, side, 3).
    """
    side_C = canvas_BxCxCx3.shape[1]
    weights = jax.vmap(jax.vmap(functools.partial(_weights, side=side, side_C=side_C)))  # over B, and over the two axes
    rows_BxSxC, columns_BxSxC = jnp.moveaxis(weights(window_Bx4[:, :2], window_Bx4[:, 2:], size_Bx2), 1, 0)
    # The width first and 8 bits in between, as PIL.
    narrow_BxCxSx3 = _grey_levels(_product("bow,bhwc->bhoc", columns_BxSxC, canvas_BxCxCx3))
    return _grey_levels(_product("boh,bhwc->bowc", rows_BxSxC, narrow_BxCxSx3))


def _weights(begin, length, size, side, side_C):
    """(side, C) float32: how much each pixel of one axis weighs in each pixel of the result; rows sum to 1."""
    # Centres in whole pixels and a fraction: one float32 would be off by 1e-5, enough to round otherwise than PIL.
    twice = (2 * jnp.arange(side) + 1) * length  # exact where the length is a whole number
    whole = jnp.floor(twice / (2 * side))
    fraction = (twice - whole * (2 * side)) / (2 * side) + (begin - jnp.floor(begin))
    pixels = jnp.arange(side_C)
    distance = (pixels - (whole + jnp.floor(begin))[:, None]) + (0.5 - fraction)[:, None]
    weights = _cubic(distance / jnp.maximum(length / side, 1.0)) * (pixels < size)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _cubic(x):
    """Keys' cubic convolution kernel with a = -0.5, PIL's bicubic."""
    x = jnp.abs(x)
    return jnp.where(x < 1, (1.5 * x - 2.5) * x * x + 1, jnp.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))


def _product(subscripts, weights, pixels):
    """einsum of float32 weights and uint8 pixels in float32.

    Accelerators multiply bfloat16 fastest, which holds grey levels exactly. The weights are split into two, whose sum
    is off by 2^-17 of them at most: a thousandth of a grey level.
    """
    # Chosen where the program is lowered: a step compiled ahead of time is not for the machine that compiles it.
    return lax.platform_dependent(
        weights,
        pixels,
        cpu=functools.partial(_whole_product, subscripts),
        default=functools.partial(_split_product, subscripts),
    )


def _whole_product(subscripts, weights, pixels):
    return jnp.einsum(subscripts, weights, pixels.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _split_product(subscripts, weights, pixels):
    high = weights.astype(jnp.bfloat16)
    low = (weights - high.astype(jnp.float32)).astype(jnp.bfloat16)
    pixels = pixels.astype(jnp.bfloat16)
    parts = (jnp.einsum(subscripts, part, pixels, preferred_element_type=jnp.float32) for part in (low, high))
    return sum(parts)


def _grey_levels(x):
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


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


def normalize(images_BxHxWx3: jax.Array) -> jax.Array:
    """Pixels in [0, 255] -> float32, (x / 255 - mean) / std."""
    mean, std = jnp.array(MEAN, jnp.float32), jnp.array(STD, jnp.float32)
    return (images_BxHxWx3.astype(jnp.float32) / 255 - mean) / std
