"""The device mesh, how batches are split over it, and arrays to its devices and back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rankclip_jax.common.errors import InputError


def make_mesh(axes: Mapping[str, int], devices: Sequence | None = None) -> Mesh:
    """A mesh of all devices (or of `devices`), {"data": -1, ...}; -1 stands for all that the other axes leave.

    Raises:
      InputError: there is no axis "data", or the sizes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if "data" not in axes:
        raise InputError(f'config.mesh = {dict(axes)} has no axis "data", over which batches are split')
    fixed = math.prod(size for size in axes.values() if size != -1)
    rest = [name for name, size in axes.items() if size == -1]
    if len(rest) > 1:
        raise InputError(f"config.mesh = {dict(axes)}: expected one axis of -1, which takes what the others leave")
    if count % fixed or (not rest and fixed != count):
        takes = f"takes {'a multiple of ' * len(rest)}{fixed} devices"
        raise InputError(f"config.mesh = {dict(axes)} {takes}; there are {count}")
    sizes = {name: count // fixed if name in rest else size for name, size in axes.items()}
    # jax.make_mesh defaults to Explicit axes, under which sharded layers and z_img @ z_txt.T raise.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which a batch is split: all but "model", whose devices work on the same rows together."""
    return tuple(axis for axis in mesh.axis_names if axis != "model")


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split along their first axis."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """This process's share of a batch (a tree of numpy) -> global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda v: jax.make_array_from_process_local_data(sharding, v), batch)


def to_host(array: jax.Array, mesh: Mesh) -> np.ndarray:
    """This process's share of a global array split as batches are: the way back of `to_devices`."""
    if jax.process_count() > 1:
        array = multihost_utils.global_array_to_host_local_array(array, mesh, batch_sharding(mesh).spec)
    return np.asarray(array)
