"""Batches from arrays on the device: order, crops and all made there, so that an epoch is one program."""

import math

import jax
import jax.numpy as jnp

_TRIES = 10


def epoch_order(key: jax.Array, epoch: jax.Array, count: int, batch_size: int) -> jax.Array:
    """Rows of one epoch, int32 (steps, batch_size): every row once, less a last batch that would not be full."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), count)
    steps = count // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def batch_of(data: dict, rows_B: jax.Array, key: jax.Array, crop_scale: tuple[float, float]) -> dict:
    """A batch as images.views takes it.

    data: "image" uint8 (N, C, C, 3), "size" int32 (N, 2), "tokens" int32 (N, L).
    """
    batch = {name: array[rows_B] for name, array in data.items()}
    keys_B = jax.random.split(key, rows_B.shape[0])
    windows_Bx4 = jax.vmap(lambda k, size: random_window(k, size, crop_scale))(keys_B, batch["size"])
    return batch | {"windows": windows_Bx4[:, None]}


def random_window(key: jax.Array, size_2: jax.Array, scale: tuple[float, float]) -> jax.Array:
    """(top, left, height, width) float32 of a random resized crop: whole pixels, inside the picture.

    Drawn as torchvision's RandomResizedCrop and input_pipeline/transforms.py do: `scale` of the area, uniformly; aspect
    ratio 3/4 to 4/3, log-uniformly; where ten draws do not fit, the largest central window of an allowed ratio.
    """
    limit_2x1 = size_2.astype(jnp.float32)[:, None]
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    area_T = jax.random.uniform(area_key, (_TRIES,), minval=scale[0], maxval=scale[1]) * jnp.prod(limit_2x1)
    stretch_T = jnp.exp(jax.random.uniform(aspect_key, (_TRIES,), minval=-0.5, maxval=0.5) * math.log(4 / 3))
    drawn_2xT = jnp.sqrt(area_T) * jnp.stack([1 / stretch_T, stretch_T])
    central_2x1 = jnp.minimum(limit_2x1, limit_2x1[::-1] * 4 / 3)
    sizes = jnp.maximum(jnp.round(jnp.concatenate([drawn_2xT, central_2x1], axis=1)), 1)
    first = jnp.argmax(jnp.all(sizes <= limit_2x1, axis=0))  # the central one always fits
    room_2 = limit_2x1[:, 0] - sizes[:, first]
    anywhere_2 = jnp.floor(jax.random.uniform(place_key, (2,)) * (room_2 + 1))
    corner_2 = jnp.where(first < _TRIES, jnp.minimum(anywhere_2, room_2), jnp.floor(room_2 / 2))
    return jnp.concatenate([corner_2, sizes[:, first]])
