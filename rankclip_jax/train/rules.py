"""How each parameter is trained: config.optim.rules, and the keys that are written with such rules.

A rule is (regex, {"lr", "weight_decay", "freeze"}). Of those whose regex is found in a parameter's name, such as
visual/transformer/resblocks_0/mlp/c_fc/kernel, the first counts. Scanned blocks have the names of unrolled ones, and
an adapter (weights/lora.py) has that of its matrix. config.optim.freeze and layer_lr_decay are rules behind the others.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import by_name, path_name
from rankclip_jax.weights import lora

# By name and not by rank: in scanned towers a norm's scale has two axes.
_DECAYED = {
    # Dense and convolution kernels, projections, the token table. Never: norms of any kind, biases, logit scale, class
    # and position embeddings.
    "standard": re.compile(r"(^|/)(kernel|proj|text_projection|token_embedding/embedding)$"),
    # Also class and position embeddings, and the gain of the norm of a ResNet's shortcut.
    "released": re.compile(
        r"(^|/)(kernel|proj|text_projection|token_embedding/embedding|(class|positional)_embedding|downsample_1/scale)$"
    ),
}
FROZEN = {"vision": "visual", "text": "text"}  # config.optim.freeze -> the subtree of the parameters
_HEADS = "ln_post|proj|attnpool|ln_final|text_projection|head"  # what follows the last block of a tower
_BLOCK = re.compile(r"(visual|text)/(transformer/resblocks|layer\d+)_\d+/")
_STACK = "/resblocks/"  # of scanned blocks, with a leading axis over them


class Treatment(NamedTuple):
    """Of one leaf: the factor on the learning rate, the weight decay (0: none), and whether it stays as it is.

    Where they differ among scanned blocks, `lr` and `weight_decay` are float32 arrays that broadcast over the leaf, and
    `frozen` has a bool for each block.
    """

    lr: float | np.ndarray
    weight_decay: float | np.ndarray
    frozen: bool | tuple[bool, ...]


def treatments(config: ConfigDict, params: Mapping) -> dict[str, Treatment]:
    """Name of a leaf -> how it is trained. Looks at names and shapes alone.

    Args:
      config: config.optim.
      params: all parameters of the model, arrays or their shapes.

    Raises:
      InputError: a rule that is no trainable parameter's first, or nothing is left to train.
    """
    leaves = by_name(params)
    singles = {name: block_names(name, leaf) for name, leaf in leaves.items()}
    rules: list[tuple[str, Mapping[str, Any]]] = list(config.rules)
    if config.freeze is not None:
        rules.append((f"^{FROZEN[config.freeze]}/", {"freeze": True}))
    if config.layer_lr_decay is not None:
        every = [name for names in singles.values() for name in names]
        rules += _by_layer(every, config.layer_lr_decay, any(_STACK in name for name in leaves))
    patterns = [re.compile(pattern) for pattern, _ in rules]
    used: set[int | None] = set()

    def fields_of(name: str) -> Mapping[str, Any]:
        first = next((number for number, pattern in enumerate(patterns) if pattern.search(name)), None)
        used.add(first)
        return {} if first is None else rules[first][1]

    def treat(name: str) -> Treatment:
        if _is_adapted(config, name):
            return Treatment(1.0, 0.0, True)
        each = [fields_of(single) for single in singles[name]]
        flags = tuple(bool(fields.get("freeze")) for fields in each)
        usual = config.weight_decay if _DECAYED[config.recipe].search(lora.matrix(name)) else 0.0
        given = [fields.get("weight_decay") for fields in each]
        decays = [usual if decay is None else decay for decay in given]
        rates = [fields.get("lr", 1.0) for fields in each]
        axes = leaves[name].ndim
        frozen = flags if len(set(flags)) > 1 else flags[0]
        return Treatment(_joined(rates, axes), _joined(decays, axes), frozen)

    found = {name: treat(name) for name in leaves}
    names = [single for name in leaves if not _is_adapted(config, name) for single in singles[name]]
    for number, (pattern, _) in enumerate(config.rules):
        if number not in used:
            of = "" if config.lora is None else " of an adapter or the logit scale (config.optim.lora)"
            raise InputError(
                f"config.optim.rules: {pattern!r} is found in no parameter's name{of}, or a rule before it counts for "
                f"all of them; names are such as {min(names, key=len)} and {max(names, key=len)}"
            )
    if all(treatment.frozen is True for treatment in found.values()):
        raise InputError("config.optim freezes all parameters, so nothing would be trained. Expected some that are not")
    return found


def _is_adapted(config: ConfigDict, name: str) -> bool:
    """Whether a parameter is of a tower that stays as it is, since adapters are trained instead."""
    return config.lora is not None and name.startswith(("visual/", "text/"))


def count(config: ConfigDict, params: Mapping) -> int:
    """The number of trained parameters."""
    treated = treatments(config, params)

    def share(frozen):
        return np.mean(np.logical_not(frozen))

    return round(sum(leaf.size * share(treated[name].frozen) for name, leaf in by_name(params).items()))


def freezes(config: ConfigDict) -> bool:
    """Whether config.optim asks for something to be frozen."""
    return bool(config.freeze or config.lora or any(fields.get("freeze") for _, fields in config.rules))


def trained_names(config: ConfigDict, params: Mapping) -> set[str]:
    """Names of the trained parameters, of each block; of an adapter that of its matrix, whose gradient is computed."""
    found, treated = set(), treatments(config, params)
    for name, leaf in by_name(params).items():
        singles, frozen = block_names(name, leaf), treated[name].frozen
        flags = frozen if isinstance(frozen, tuple) else [frozen] * len(singles)
        found.update(single for single, stays in zip(singles, flags, strict=True) if not stays)
    return found


def split(params: Mapping, config: ConfigDict) -> tuple[dict, dict]:
    """(what is trained, what is frozen): two trees like `params`, each with None in the other's places.

    A stack of which some blocks are frozen is cut (models.cut_layers) where that changes.
    """
    treated, cut = treatments(config, params), dict(params)
    for tower in FROZEN.values():
        flags = [treatment.frozen for name, treatment in treated.items() if lora.matrix(name).startswith(f"{tower}/")]
        if starts := sorted({begin for each in flags if isinstance(each, tuple) for begin, _, _ in _runs(each)} - {0}):
            cut[tower] = models.cut_layers(cut[tower], starts)
            if "lora" in cut:
                cut["lora"] = cut["lora"] | {tower: models.cut_layers(cut["lora"][tower], starts)}

    def is_frozen(name: str) -> bool:
        start = models.part_start(name)
        if start is None:
            return treated[name].frozen is True
        flags = treated[name.replace(f"/resblocks_from_{start}/", _STACK)].frozen
        return flags[start] if isinstance(flags, tuple) else flags

    def part(frozen: bool) -> dict:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if is_frozen(path_name(path)) == frozen else None, cut
        )

    return part(False), part(True)


def join(trained: Mapping, frozen: Mapping) -> dict:
    """The inverse of `split`, but for the cuts."""
    return jax.tree.map(lambda x, y: y if x is None else x, trained, frozen, is_leaf=lambda x: x is None)


def is_stack(name: str) -> bool:
    """Whether a leaf has a leading axis over scanned blocks."""
    return _STACK in name


def take_trained(x: Any, frozen: bool | tuple[bool, ...]) -> Any:
    """Of a leaf, a gradient or a factor on it, the blocks that are trained; `x` itself where that does not differ."""
    if not isinstance(frozen, tuple) or not np.ndim(x):
        return x
    parts = [x[begin:end] for begin, end, stays in _runs(frozen) if not stays]
    return np.concatenate(parts) if isinstance(x, np.ndarray) else jnp.concatenate(parts)


def fill_frozen(x: jax.Array, frozen: bool | tuple[bool, ...]) -> jax.Array:
    """The inverse of `take_trained`, with zeros for the blocks that are frozen."""
    if not isinstance(frozen, tuple):
        return x
    parts, used = [], 0
    for begin, end, stays in _runs(frozen):
        count = end - begin
        parts.append(jnp.zeros((count, *x.shape[1:]), x.dtype) if stays else x[used : used + count])
        used += 0 if stays else count
    return jnp.concatenate(parts)


def _runs(flags: tuple[bool, ...]) -> list[tuple[int, int, bool]]:
    """(first, one behind the last, flag) of each run of equal flags."""
    starts = [i for i in range(len(flags)) if not i or flags[i] != flags[i - 1]]
    return [(begin, end, flags[begin]) for begin, end in zip(starts, [*starts[1:], len(flags)], strict=True)]


def block_names(name: str, leaf: Any) -> list[str]:
    """The names that a leaf has in rules: one for each of its blocks."""
    name = lora.matrix(name)
    return [name.replace(_STACK, f"/resblocks_{i}/") for i in range(leaf.shape[0])] if _STACK in name else [name]


def _by_layer(names: Iterable[str], decay: float, scanned: bool) -> list[tuple[str, dict]]:
    """layer_lr_decay as rules: decay^d, d blocks before the end of a tower.

    Heads and what is in no tower have 1, the last block `decay`, what comes before the first of n blocks decay^(n + 1).
    """
    rules: list[tuple[str, dict]] = []
    for tower in ("visual", "text"):
        own = {match[0] for name in names if (match := _BLOCK.match(name)) and match[1] == tower}
        blocks = sorted(own, key=lambda block: [int(n) for n in re.findall(r"\d+", block)])
        powers = [decay**n for n in range(len(blocks), 0, -1)]
        if scanned:  # in float32, as they always were there
            powers = (decay ** np.arange(len(blocks), 0, -1, dtype=np.float32)).tolist()
        rules.append((f"^{tower}/({_HEADS})(/|$)", {"lr": 1.0}))
        rules += [(f"^{block}", {"lr": power}) for block, power in zip(blocks, powers, strict=True)]
        rules.append((f"^{tower}/", {"lr": decay ** (len(blocks) + 1)}))
    return rules


def _joined(values: list[float], axes: int) -> float | np.ndarray:
    """One number, or one for each block of a leaf with so many axes."""
    if len(set(values)) == 1:
        return values[0]
    return np.array(values, np.float32).reshape(-1, *[1] * (axes - 1))
