"""The device mesh, and which parameter lies where on it: rules in the config, outside the model."""

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rankclip_jax.errors import InputError
from rankclip_jax.optim import path_name


def make_mesh(axes: Mapping[str, int], devices: Sequence | None = None) -> Mesh:
    """A mesh of all devices (or of `devices`), {"data": -1, ...}; -1 stands for all that the other axes leave.

    Raises:
      InputError: there is no axis "data", or the sizes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if "data" not in axes:
        raise InputError(f'config.mesh = {dict(axes)} has no axis "data", over which batches are split')
    fixed = math.prod(size for size in axes.values() if size != -1)
    sizes = {name: count // fixed if size == -1 else size for name, size in axes.items()}
    if math.prod(sizes.values()) != count:
        raise InputError(f"config.mesh = {dict(axes)} takes {math.prod(sizes.values())} devices; there are {count}")
    # jax.make_mesh defaults to Explicit axes, under which sharded layers and z_img @ z_txt.T raise.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split along their first axis over the axis "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def state_shardings(abstract_state, mesh: Mesh, rules):
    """Shardings for a state of ShapeDtypeStructs: the first rule whose regex is found in a leaf's path.

    Optimiser moments carry their parameter's path within theirs, and so lie where it does. Scalars are replicated.

    Raises:
      InputError: a rule that matches no parameter, or a parameter that no rule matches.
    """
    used = set()

    def place(path, leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                used.add(pattern)
                return NamedSharding(mesh, PartitionSpec(*spec))
        raise InputError(f"config.sharding has no rule for {name}; end the rules with ('.*', ())")

    shardings = jax.tree_util.tree_map_with_path(place, abstract_state)
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise InputError(f"config.sharding: the rule {unused[0]!r} matches no parameter")
    return shardings
