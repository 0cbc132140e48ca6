"""The device mesh, and which parameter lies where on it: rules in the config, outside the model."""

import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rankclip_jax.errors import InputError
from rankclip_jax.optim import path_name


def make_mesh(axes: dict[str, int]) -> Mesh:
    """A mesh of all devices, {"data": -1, ...}; -1 stands for all devices that the other axes leave.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = dict(axes)
    fixed = 1
    for size in sizes.values():
        fixed *= max(size, 1)
    sizes = {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
    product = 1
    for size in sizes.values():
        product *= size
    if product != devices:
        raise InputError(f"config.mesh = {dict(axes)} takes {product} devices, but there are {devices}")
    # jax.make_mesh defaults to Explicit axes, under which sharded layers and z_img @ z_txt.T raise.
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


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
