"""AdamW with decay on matrices, linear warm-up and cosine decay; or as the authors' released code has it.

config.optim.recipe names the two; docs/ranking_loss.md says what differs.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import path_name

# By name and not by rank: in scanned towers a norm's scale has two axes.
_DECAYED = {
    # Dense and convolution kernels, projections, the token table. Never: norms of any kind, biases, logit scale, class
    # and position embeddings.
    "standard": re.compile(r"(^|/)(kernel|proj|text_projection|token_embedding/embedding)$"),
    # Also class and position embeddings, and the gain of the norm of a ResNet's shortcut.
    "released": re.compile(r"(^|/)(kernel|proj|text_projection|embedding|(class|positional)_embedding|downsample_1/scale)$"),
}


def decay_mask(params: Mapping, recipe: str = "standard") -> dict:
    """A tree like `params`, True where weight decay applies."""
    decayed = _DECAYED[recipe]
    return jax.tree_util.tree_map_with_path(lambda p, _: bool(decayed.search(path_name(p))), params)


def learning_rate(config: ConfigDict, total_steps: int, steps_per_epoch: int | None = None) -> optax.Schedule:
    """Step s, from 0 -> the rate of update s + 1.

    With w warm-up steps and T = total_steps: lr (s + 1) / w before step w, then lr / 2 (1 + cos(pi (s - w) / (T - w))).
    So update w has the full rate, and the last update one just above 0. The recipe "released" has at step s what this
    formula gives for s + steps_per_epoch: an epoch early.

    Args:
      steps_per_epoch: for the recipe "released".

    Raises:
      InputError: the warm-up does not end before the run does.
    """
    warmup = config.warmup_steps
    if warmup >= total_steps:
        raise InputError(
            f"config.optim.warmup_steps = {warmup} must be fewer than the run's {total_steps} steps; "
            f"for example --config.optim.warmup_steps={total_steps // 10}"
        )
    if config.recipe == "released":
        if steps_per_epoch is None:
            raise ValueError("the recipe released needs steps_per_epoch")
        return functools.partial(_an_epoch_early, config.lr, warmup, total_steps, steps_per_epoch)
    return optax.join_schedules(
        [
            optax.linear_schedule(config.lr / max(warmup, 1), config.lr, max(warmup - 1, 1)),
            optax.cosine_decay_schedule(config.lr, max(total_steps - warmup, 1)),
        ],
        [warmup],
    )


def _an_epoch_early(lr, warmup, total_steps, steps_per_epoch, step):
    step = step + steps_per_epoch
    cosine = (1 + jnp.cos(jnp.pi * (step - warmup) / (total_steps - warmup))) / 2  # rises again after total_steps
    return lr * jnp.where(step < warmup, (step + 1) / max(warmup, 1), cosine)


# What follows the last block of a tower.
_HEADS = ("ln_post", "proj", "attnpool", "ln_final", "text_projection")


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
    """Optimiser of `config.optim` for a run of `total_steps`. A frozen tower has no moments and is never changed."""
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
