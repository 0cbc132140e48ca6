"""AdamW: what is decayed, frozen or slowed, with the rates of schedule.py.

config.optim.recipe says whose choice it is; docs/ranking_loss.md says what differs.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from rankclip_jax.common.trees import path_name
from rankclip_jax.train.schedule import learning_rate

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


def decay_mask(params: Mapping, recipe: str = "standard") -> dict:
    """A tree like `params`, True where weight decay applies."""
    decayed = _DECAYED[recipe]
    return jax.tree_util.tree_map_with_path(lambda p, _: bool(decayed.search(path_name(p))), params)


# What follows the last block of a tower.
_HEADS = ("ln_post", "proj", "attnpool", "ln_final", "text_projection", "head")


def layer_scales(params: Mapping, decay: float) -> dict:
    """A tree like `params` of factors for the learning rate: decay^d, d blocks before the end of a tower.

    Heads and the logit scale have 1, the last block `decay`, what comes before the first of n blocks decay^(n + 1).
    Scanned blocks get an array over their leading axis.
    """

    def tower(tree):
        blocks = tree.get("transformer") or {k: v for k, v in tree.items() if re.fullmatch(r"layer\d+_\d+", k)}
        names = sorted(blocks, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
        scanned = names == ["resblocks"]
        count = len(jax.tree.leaves(blocks)[0]) if scanned else len(names)
        if scanned:
            factors = decay ** np.arange(count, 0, -1, dtype=np.float32)
            scaled = jax.tree.map(lambda x: factors.reshape(-1, *[1] * (x.ndim - 1)), blocks)
        else:
            scaled = {name: _constant(blocks[name], decay ** (count - i)) for i, name in enumerate(names)}
        rest = {k: _constant(v, 1.0 if k in _HEADS else decay ** (count + 1)) for k, v in tree.items()}
        return rest | ({"transformer": scaled} if "transformer" in tree else scaled)

    return {k: tower(v) if k in ("visual", "text") else _constant(v, 1.0) for k, v in params.items()}


def _constant(tree: Any, value: float | str) -> Any:
    return jax.tree.map(lambda _: value, tree)


FROZEN = {"vision": "visual", "text": "text"}  # config.optim.freeze -> the subtree of the parameters


def hold(params: Mapping, freeze: str | None) -> Mapping:
    """Params through which no gradient flows to the frozen tower, so that none is computed."""
    if freeze is None:
        return params
    return {**params, FROZEN[freeze]: jax.lax.stop_gradient(params[FROZEN[freeze]])}


def make_optimizer(
    config: ConfigDict, total_steps: int, steps_per_epoch: int | None = None
) -> optax.GradientTransformation:
    """Optimiser of `config.optim` for a run of `total_steps`. A frozen tower has no moments and is never changed.

    Args, raises: as `schedule.learning_rate`.
    """
    clip = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
    adamw = optax.adamw(
        learning_rate(config, total_steps, steps_per_epoch),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=functools.partial(decay_mask, recipe=config.recipe),
    )
    chain = optax.chain(*clip, adamw)
    if config.layer_lr_decay is not None:
        chain = optax.chain(chain, optax.stateless(lambda updates, _: _scaled(updates, config.layer_lr_decay)))
    if config.freeze is None:
        return chain
    frozen = FROZEN[config.freeze]
    return optax.partition(
        {"train": chain, "freeze": optax.set_to_zero()},
        lambda params: {k: _constant(v, "freeze" if k == frozen else "train") for k, v in params.items()},
    )


def _scaled(updates: dict, decay: float) -> dict:
    # A frozen tower's place holds no arrays here, so it needs no factors.
    here = {k: v for k, v in updates.items() if jax.tree.leaves(v)}
    return updates | jax.tree.map(lambda update, factor: update * factor, here, layer_scales(here, decay))
