"""Which parameter lies where on the mesh: rules in the config, outside the model."""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import by_name, path_name

# Parameters this small stay whole on every device: gathering them would cost more time than they cost memory.
_SMALL = 2**14


def _tensor(other):
    """Each transformer layer's first products split by their outputs, its second by their inputs (Megatron's way)."""
    return (
        (r"(attn|attnpool)/[qkv]_proj/kernel|mlp/c_fc/kernel", (other, "model")),
        (r"(attn|attnpool)/[qkv]_proj/bias|mlp/c_fc/bias", ("model",)),
        (r"attn/out_proj/kernel|attnpool/c_proj/kernel|mlp/c_proj/kernel", ("model", other)),
    )


# config.sharding by name. A rule is (regex over the parameter's path, the mesh axes of its last dimensions); an axis
# in place of the dimensions means: the largest dimension that divides over it.
KINDS = {
    "replicated": ((".*", ()),),
    "fsdp": ((".*", "fsdp"),),
    "tensor": (*_tensor(None), (".*", ())),
    "fsdp+tensor": (*_tensor("fsdp"), (".*", "fsdp")),
}


def state_shardings(abstract_state: Any, mesh: Mesh, rules: str | Sequence | None) -> Any:
    """Shardings for a state of ShapeDtypeStructs: the first rule whose regex is found in a leaf's path.

    Optimiser moments carry their parameter's path within theirs, and so lie where it does. Of an optimiser's arrays of
    other shapes (Adafactor's rows and columns), a rule with axes for dimensions leaves each whole. Scalars are
    replicated.

    Args:
      rules: config.sharding: a key of KINDS, a sequence of rules as they stand there, or None for "replicated".

    Raises:
      InputError: no such kind; an axis that the mesh lacks, or that a dimension does not divide over; a rule that
        matches no parameter; a parameter that no rule matches.
    """
    rules = rules or "replicated"
    if isinstance(rules, str):
        if rules not in KINDS:
            raise InputError(
                f"Unknown config.sharding={rules!r}. Expected one of {', '.join(KINDS)}, or a list of (regex, axes) "
                "rules"
            )
    pairs: Sequence = KINDS[rules] if isinstance(rules, str) else rules
    used = set()
    shapes = {name: leaf.shape for name, leaf in by_name(abstract_state).items() if name.startswith("params/")}

    def place(path, leaf):
        whole = NamedSharding(mesh, PartitionSpec())
        if leaf.ndim == 0:
            return whole
        name = path_name(path)
        own = shapes.get(_parameter(name, shapes) or "", ())
        # Of scanned blocks of which some are frozen, an optimiser has the others alone.
        stack = "/resblocks/" in name and leaf.ndim > 1 and own[1:] == leaf.shape[1:]
        other = name.startswith("opt_state/") and own != leaf.shape and not stack
        for pattern, spec in pairs:
            if re.search(pattern, name):
                used.add(pattern)
                if other and not isinstance(spec, str):
                    return whole
                return NamedSharding(mesh, _spec(leaf.shape, spec, mesh, name))
        if other:
            return whole
        raise InputError(f"config.sharding has no rule for {name}; end the rules with ('.*', ())")

    shardings = jax.tree_util.tree_map_with_path(place, abstract_state)
    unused = [pattern for pattern, _ in pairs if pattern not in used]
    if unused:
        raise InputError(f"config.sharding: the rule {unused[0]!r} matches no parameter")
    return shardings


def _parameter(name: str, shapes: Collection[str]) -> str | None:
    """The parameter whose path ends the path of an optimiser's array."""
    parts = name.split("/")
    ends = ("/".join(["params", *parts[i:]]) for i in range(1, len(parts)))
    return next((end for end in ends if end in shapes), None)


def params_shardings(params: Any, mesh: Mesh, rules: str | Sequence | None) -> Any:
    """`state_shardings` of the parameters alone."""
    return state_shardings({"params": params}, mesh, rules)["params"]


def gather(params: Any, mesh: Mesh, rules: str | Sequence | None) -> Any:
    """Parameters as a step uses them, inside jit: whole but for the axis "model", whatever axes they are kept over.

    A product of rows and weights that are split over the same devices is XLA's to arrange, and it sums the activations
    over the devices: 300 GB a step for ViT-B/32 with 32,768 pairs on 128 chips, compiled. Gathering is the parameters,
    once, and takes the memory of one whole copy of them while the step lasts.
    """

    def whole(sharding):
        return NamedSharding(mesh, PartitionSpec(*[axis if axis == "model" else None for axis in sharding.spec]))

    return jax.lax.with_sharding_constraint(params, jax.tree.map(whole, params_shardings(params, mesh, rules)))


def _spec(shape: tuple[int, ...], spec: str | Sequence[str | None], mesh: Mesh, name: str) -> PartitionSpec:
    for axis in (spec,) if isinstance(spec, str) else spec:
        if axis is not None and axis not in mesh.shape:
            raise InputError(
                f"config.sharding asks for an axis {axis!r}, which config.mesh lacks; for example "
                f"--config.mesh=\"{{'data': -1, '{axis}': 2}}\""
            )
    if isinstance(spec, str):
        fits = [i for i, size in enumerate(shape) if size % mesh.shape[spec] == 0]
        if math.prod(shape) < _SMALL or not fits:
            return PartitionSpec()
        largest = fits[int(np.argmax([shape[i] for i in fits]))]
        return PartitionSpec(*[spec if i == largest else None for i in range(len(shape))])
    if not any(spec):
        return PartitionSpec()
    if len(spec) > len(shape):
        raise InputError(f"config.sharding: {name} {shape} has fewer dimensions than its rule's axes {tuple(spec)}")
    axes = [None] * (len(shape) - len(spec)) + list(spec)  # scanned layers have a dimension before the others
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise InputError(f"config.sharding: {name} {shape} does not divide over {axis!r} = {mesh.shape[axis]}")
    return PartitionSpec(*axes)
