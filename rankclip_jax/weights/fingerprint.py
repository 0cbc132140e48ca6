"""Checksums of arrays that do not depend on devices or sharding, to verify that a checkpoint is read bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rankclip_jax.common.trees import by_name


def fingerprints(tree: Any) -> dict[str, int]:
    """Path of a leaf -> 32-bit checksum: a sum of integers, which does not depend on the order, and so on the sharding.

    Every flipped bit changes the checksum of its leaf. Other damage is missed once in four billion times.
    """
    # One at a time: sums of sharded arrays, queued on several CPU devices at once, wait for each other for ever.
    return {name: int(_sum(leaf)) for name, leaf in by_name(tree).items()}


@jax.jit  # of one leaf, since most are alike: a program of 900 leaves takes XLA ten times as long as these
def _sum(x: jax.typing.ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Each position has its own odd weight: swapped values change the sum, and an odd factor loses no bit.
    weight = ((place + 1) * np.uint32(0x9E3779B1)) | np.uint32(1)
    weight = (weight ^ (weight >> 15)) | np.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)
