"""Images on the device: flipped if wanted, and normalised as every published CLIP expects them."""

import jax
import jax.numpy as jnp

# Mean and standard deviation of OpenAI's training images, per channel, of pixels in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(images_BxHxWx3: jax.Array) -> jax.Array:
    """uint8 pixels -> float32, (x / 255 - mean) / std."""
    mean, std = jnp.array(MEAN, jnp.float32), jnp.array(STD, jnp.float32)
    return (images_BxHxWx3.astype(jnp.float32) / 255 - mean) / std


def random_flip(key: jax.Array, images_BxHxWx3: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half."""
    flip_B = jax.random.bernoulli(key, shape=images_BxHxWx3.shape[:1])
    return jnp.where(flip_B[:, None, None, None], images_BxHxWx3[:, :, ::-1], images_BxHxWx3)
