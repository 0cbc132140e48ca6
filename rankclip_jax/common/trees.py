"""Names for what is inside a tree: "visual/conv1/kernel" of arrays, "optim.lr" of a configuration."""

from collections.abc import Mapping
from typing import Any


def path_name(path: tuple) -> str:
    """A pytree path as "visual/conv1/kernel"."""
    import jax  # here, so that whoever only flattens a configuration needs none

    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_name(tree: Any) -> dict[str, Any]:
    """Name -> leaf of any pytree, in the order of its leaves."""
    import jax

    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """The dicts in dicts whose `by_name` is `named`."""
    tree: dict = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def overlaid(tree: Mapping, others: Mapping) -> dict[str, Any]:
    """Dicts in dicts like `tree`, with the leaves of `others` in place of its own of the same names."""
    return nested(by_name(tree) | by_name(others))


def flatten(groups: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim": {"lr": 1.0}} -> {"optim.lr": 1.0}, for plain dicts of any values. Empty groups vanish."""
    flat = {}
    for key, value in groups.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in flatten(value).items()}
        else:
            flat[key] = value
    return flat
