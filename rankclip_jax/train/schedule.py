"""The learning rate of every update: config.optim.schedule, or the released code's (config.optim.recipe)."""

import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError


def learning_rate(config_optim: ConfigDict, total_steps: int, steps_per_epoch: int | None = None) -> optax.Schedule:
    """Step u, from 0 -> the rate of update u + 1.

    With w = warmup_steps, T = total_steps and d = decay_steps, all rise as lr (u + 1) / w for u < w. Then

        cosine      lr / 2 (1 + cos(pi (u - w) / (T - w)))    the last update has u = T - 1; u = T would be 0
        constant    lr
        wsd         lr, and lr (T - u) / d in the last d updates

    The recipe "released" has at u what cosine's formula gives at u + steps_per_epoch: 0 at the start of the last epoch,
    then it rises, to at most lr / 2 (1 - cos(pi steps_per_epoch / (T - w))).

    Args:
      steps_per_epoch: for the recipe "released".

    Raises:
      InputError: the run is too short for the warm-up, the decay or the recipe.
    """
    config, lr, warmup = config_optim, config_optim.lr, config_optim.warmup_steps
    _check(config, total_steps, steps_per_epoch)
    rise = optax.linear_schedule(lr / max(warmup, 1), lr, max(warmup - 1, 1))
    if config.recipe == "released":
        cosine = _cosine_that_rises_again(lr, total_steps - warmup)
        planned = optax.join_schedules([rise, cosine], [warmup])
        return lambda step: planned(step + steps_per_epoch)
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(lr)], [warmup])
    if config.schedule == "wsd":
        fall = optax.linear_schedule(lr, 0.0, config.decay_steps)
        return optax.join_schedules(
            [rise, optax.constant_schedule(lr), fall], [warmup, total_steps - config.decay_steps]
        )
    return optax.join_schedules([rise, optax.cosine_decay_schedule(lr, max(total_steps - warmup, 1))], [warmup])


def free_until(config_optim: ConfigDict, total_steps: int, steps_per_epoch: int | None = None) -> float:
    """The number of first updates whose rates do not depend on total_steps: those before the fall, and its first.

    A run that has done at most so many steps can be given more: it is then what a longer run would have been.
    """
    config, after_warmup = config_optim, config_optim.warmup_steps + 1
    if config.recipe == "released":
        if steps_per_epoch is None:
            raise ValueError("the recipe released needs steps_per_epoch")
        return max(after_warmup - steps_per_epoch, 0)
    if config.schedule == "constant":
        return math.inf
    return total_steps - config.decay_steps + 1 if config.schedule == "wsd" else after_warmup


def patch_dropout_steps(config_vision: ConfigDict, total_steps: int) -> int:
    """The number of first steps that leave patches out: config.model.vision.patch_dropout_until of all."""
    return round(config_vision.patch_dropout_until * total_steps) if config_vision.patch_dropout else 0


def _check(config: ConfigDict, total_steps: int, steps_per_epoch: int | None) -> None:
    warmup, decay = config.warmup_steps, config.decay_steps
    if warmup >= total_steps:
        raise InputError(
            f"config.optim.warmup_steps = {warmup} must be fewer than the run's {total_steps} steps; "
            f"for example --config.optim.warmup_steps={total_steps // 10}"
        )
    if config.schedule == "wsd" and warmup + decay > total_steps:
        raise InputError(
            f"config.optim.decay_steps = {decay} leaves no room for {warmup} steps of warm-up in the run's "
            f"{total_steps} steps. Expected at most {total_steps - warmup}"
        )
    if config.recipe == "released":
        if steps_per_epoch is None:
            raise ValueError("the recipe released needs steps_per_epoch")
        if total_steps <= steps_per_epoch:
            raise InputError(
                f"config.optim.recipe=released takes the rates an epoch early, and the run has {total_steps} steps in "
                f"epochs of {steps_per_epoch}. Expected more than one epoch, or config.optim.recipe=standard"
            )


def _cosine_that_rises_again(lr: float, steps: int) -> optax.Schedule:
    """optax.cosine_decay_schedule stays at 0 after `steps`; the released code's does not."""

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        return lr * (1 + jnp.cos(jnp.pi * jnp.asarray(step) / steps)) / 2

    return rate
