"""The exact descending order of each row, by the cheapest sort that the backend offers.

Measured on 2 CPU cores for a million float32 in rows of 4,096: lax.sort of key and index 165 ms; lax.sort of
one 64-bit integer, key above and index below, 41 ms; NumPy's vectorised sort of the same integers 4 ms.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

# What orders the lists where, for people.
SORTS = {
    "cpu": "NumPy's sort of one 64-bit integer, key above and index below, on the host",
    "gpu": "XLA's stable sort of (key, index), by CUB where XLA hands it over",
    "tpu": "XLA's stable sort of (key, index)",
}


def by_platform(compute: Callable, *args: Any) -> Any:
    """compute(platform, *args), platform "cpu", "gpu" or "tpu": the one that the program is lowered for.

    A program compiled ahead of time for a TPU then sorts as TPUs do, whatever machine compiles it.
    """
    cpu, gpu, tpu = (functools.partial(compute, platform) for platform in ("cpu", "gpu", "tpu"))
    return lax.platform_dependent(*args, cpu=cpu, tpu=tpu, default=gpu)


def one_zero(x: jax.Array) -> jax.Array:
    """x with -0.0 as 0.0, so that they tie. XLA would simplify x + 0.0 away."""
    return jnp.where(x == 0, 0.0, x)


def ordered_key(x_float32: jax.Array) -> jax.Array:
    """int32 keys that sort as the floats do, with -0.0 and 0.0 the same key.

    Integers, because XLA's fast sorts take no float with a payload (on GPU, CUB's radix sort takes an integer
    key with one payload).
    """
    bits = lax.bitcast_convert_type(one_zero(x_float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _numpy_order(key):
    """Ascending order, ties by index: key and index share one integer, so that the order is total."""
    packed = np.empty(key.shape, np.int64)
    high, low = (1, 0) if np.little_endian else (0, 1)
    halves = packed.view(np.int32).reshape(*key.shape, 2)
    halves[..., high] = key
    halves[..., low] = np.arange(key.shape[-1], dtype=np.int32)
    packed.sort(axis=-1)
    return (np.ascontiguousarray(halves[..., low]),)


# A primitive of our own and not jax.pure_callback: that one hands its function jax.Arrays made inside the
# callback, and reading them waits for a thread of the pool which is itself busy in callbacks. With one core,
# or several fake devices, it hangs (seen with jax 0.10.2). Here the function gets XLA's own buffer.
_host_order_p = Primitive("rankclip_host_order")
_host_order_p.def_impl(lambda key: jnp.asarray(_numpy_order(np.asarray(key))[0]))
_host_order_p.def_abstract_eval(lambda key: key)


def _lower_host_order(ctx, key):
    results, _, _ = mlir.emit_python_callback(
        ctx,
        _numpy_order,
        None,
        [key],
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=False,
        returns_token=False,
    )
    return results


def _batch_host_order(keys, dims):
    return _host_order_p.bind(jnp.moveaxis(keys[0], dims[0], 0)), 0


mlir.register_lowering(_host_order_p, _lower_host_order, platform="cpu")
batching.primitive_batchers[_host_order_p] = _batch_host_order


@functools.partial(jax.jit, static_argnames="platform")
def descending_order(reference_RxN: jax.Array, platform: str) -> jax.Array:
    """Indices of each row's items, largest first; ties keep index order.

    Args:
      reference_RxN: (R, N) float32.
      platform: "cpu", "gpu" or "tpu", where it will run: it selects the sort, never the result.

    Returns:
      (R, N) int32.
    """
    # Bitwise not reverses the order of integers without overflow: ascending then is largest first.
    key = ~ordered_key(reference_RxN)
    if platform == "cpu":
        return _host_order_p.bind(key)
    # An integer key with one payload is what XLA hands to CUB's radix sort on GPU, which is stable.
    index = lax.broadcasted_iota(jnp.int32, key.shape, 1)
    return lax.sort((key, index), num_keys=1, is_stable=True)[1]
