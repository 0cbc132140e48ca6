"""Runs of one objective as a few programs: fresh states, and an epoch as one scan over data on the device.

Seeds and learning rates are arguments of the programs, so that one compilation serves all runs of an objective, and
several of them can train together under vmap.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.study.batches import batch_of, epoch_order
from rankclip_jax.train import optim
from rankclip_jax.train import step as steps


class Job(NamedTuple):
    """One run of an objective."""

    lr: float
    seed: int


def with_rate(config: ConfigDict, total_steps: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optimiser of config.optim whose peak rate is a number in its state ("lr"), not in its program.

    Every optimiser's update is proportional to the rate, decay and schedule included.

    Raises:
      InputError: config.optim has what a study does not train: adapters, averages.
    """
    for key in ("ema", "lora"):
        if config[key] is not None:
            raise InputError(f"config.optim.{key}={config[key]}. Expected None: a study compares whole models")
    unit = config.copy_and_resolve_references()
    unit.lr = 1.0
    inner = optim.make_optimizer(unit, total_steps, steps_per_epoch)

    def init(params):
        return {"lr": jnp.float32(config.lr), "inner": inner.init(params)}

    def update(grads, state, params=None):
        updates, new = inner.update(grads, state["inner"], params)
        return jax.tree.map(lambda u: state["lr"] * u, updates), {"lr": state["lr"], "inner": new}

    return optax.GradientTransformation(init, update)


class Programs:
    """What trains runs of one configuration; states carry a leading axis of jobs where there are several."""

    def __init__(self, model: models.CLIP, config: ConfigDict, count: int):
        """`config`: complete, of one objective; `count`: training pairs.

        Raises:
          InputError: config has what a study does not train.
        """
        if config.model.vision.get("patch_dropout"):
            raise InputError("config.model.vision.patch_dropout: expected 0: a study trains with whole images")
        self.steps_per_epoch = count // config.batch_size
        total = self.steps_per_epoch * config.epochs
        self._tx = with_rate(config.optim, total, self.steps_per_epoch)
        step = steps.train_step_function(
            model, self._tx, config, None, total_steps=total, steps_per_epoch=self.steps_per_epoch
        )

        def init(seed, lr):
            state = steps.fresh_state(model, self._tx, seed)
            return dataclasses.replace(state, opt_state=state.opt_state | {"lr": lr})

        def epoch(state, seed, data):
            step_key, order_key, window_key = jax.random.split(jax.random.key(seed), 3)
            number = state.step // self.steps_per_epoch

            def one(state, rows_B):
                key = jax.random.fold_in(window_key, state.step)
                batch = batch_of(data, rows_B, key, config.data.crop_scale)
                return step(state, batch, step_key)

            order_SxB = epoch_order(order_key, number, count, config.batch_size)
            state, metrics = jax.lax.scan(one, state, order_SxB)
            return state, jax.tree.map(jnp.mean, metrics)

        self._one = jax.jit(init), jax.jit(epoch, donate_argnums=0)
        self._many = jax.jit(jax.vmap(init)), jax.jit(jax.vmap(epoch, (0, 0, None)), donate_argnums=0)

    def train(self, jobs: list[Job], data: dict, epochs: int, seen: Callable) -> None:
        """Trains the jobs together, and calls seen(job, state, metrics) for each after every epoch.

        data: as `batches.batch_of`; state: returns the job's; metrics: the epoch's means, {name: float}.
        """
        many = len(jobs) > 1
        init, epoch = self._many if many else self._one
        lrs = jnp.array([job.lr for job in jobs], jnp.float32)
        seeds = jnp.array([job.seed for job in jobs], jnp.int32)
        if not many:
            lrs, seeds = lrs[0], seeds[0]
        states = init(seeds, lrs)
        for _ in range(epochs):
            states, metrics = epoch(states, seeds, data)
            numbers = {key: np.ravel(value) for key, value in metrics.items()}
            for i, job in enumerate(jobs):
                state = lambda i=i: jax.tree.map(lambda x: x[i], states) if many else states  # noqa: E731, B023
                seen(job, state, {key: float(value[i]) for key, value in numbers.items()})
