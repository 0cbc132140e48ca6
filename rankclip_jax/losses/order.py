"""The exact descending order of each row, by the cheapest sort that the backend offers."""

import jax
import jax.numpy as jnp
from jax import lax


def ordered_key(x_float32: jax.Array) -> jax.Array:
    """int32 keys that sort as the floats do, -0.0 and 0.0 the same key.

    Integer keys, because XLA's fast sorts (radix on GPU, single-operand on CPU) take no float with a payload.
    """
    bits = lax.bitcast_convert_type(x_float32 + 0.0, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def descending_order(reference_RxN: jax.Array, platform: str) -> jax.Array:
    """(R, N) float32 -> (R, N) int32: indices of each row's items, largest first; ties keep index order."""
    del platform
    # Bitwise not reverses the order of integers without overflow: ascending then is largest first.
    key = ~ordered_key(reference_RxN)
    index = lax.broadcasted_iota(jnp.int32, key.shape, key.ndim - 1)
    return lax.sort((key, index), num_keys=1, is_stable=True)[1]
