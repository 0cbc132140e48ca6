"""The optimiser of config.optim: a direction (config.optim.name), weight decay, the rates of schedule.py, rules.

Every one takes the step -rate factor (direction + decay weight). config.optim.recipe says whose choice of what is
decayed it is; docs/ranking_loss.md says what differs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

from rankclip_jax.common.trees import path_name
from rankclip_jax.train import rules
from rankclip_jax.train.schedule import learning_rate
from rankclip_jax.weights import lora


def make_optimizer(
    config: ConfigDict, total_steps: int, steps_per_epoch: int | None = None
) -> optax.GradientTransformation:
    """Optimiser of `config.optim` for a run of `total_steps`. What is frozen has no moments and is never changed.

    Args, raises: as `schedule.learning_rate`; its functions also as `rules.treatments`.
    """
    rate = learning_rate(config, total_steps, steps_per_epoch)

    def of(params: optax.Params) -> optax.GradientTransformation:
        every = rules.treatments(config, params)
        treated = {name: _of_trained(treatment) for name, treatment in every.items()}
        clip = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
        step = optax.chain(_DIRECTIONS[config.name](config), _decay(treated), optax.scale_by_learning_rate(rate))
        chain: optax.GradientTransformation = optax.chain(*clip, step)
        if config.layer_lr_decay is not None or any("lr" in fields for _, fields in config.rules):
            chain = optax.chain(chain, optax.stateless(lambda updates, _: _scale(updates, treated)))
        if not any(treatment.frozen for treatment in treated.values()):
            return _of_trained_blocks(chain, every)
        labels = _by_name(lambda name, _: "freeze" if treated[name].frozen else "train", params)
        return _of_trained_blocks(optax.partition({"train": chain, "freeze": optax.set_to_zero()}, labels), every)

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return of(params).update(grads, state, params)

    return optax.GradientTransformation(lambda params: of(params).init(params), update)


def _of_trained(treatment: rules.Treatment) -> rules.Treatment:
    """That of the trained blocks alone, of a stack of which some are frozen."""
    lr, decay, frozen = treatment
    return rules.Treatment(rules.take_trained(lr, frozen), rules.take_trained(decay, frozen), frozen is True)


def _of_trained_blocks(inner: optax.GradientTransformation, treated: dict) -> optax.GradientTransformation:
    """`inner` of stacks' trained blocks, of which alone there are moments, under the stack's name."""
    if not any(isinstance(treatment.frozen, tuple) for treatment in treated.values()):
        return inner

    def taken(tree):
        return _by_name(lambda name, x: rules.take_trained(x, treated[name].frozen), tree)

    def update(grads, state, params=None):
        updates, state = inner.update(taken(grads), state, taken(params))
        return _by_name(lambda name, x: rules.fill_frozen(x, treated[name].frozen), updates), state

    return optax.GradientTransformation(lambda params: inner.init(taken(params)), update)


def _by_name(function: Callable, *trees: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), *trees)


def _scale(updates: optax.Updates, treated: dict) -> optax.Updates:
    return _by_name(lambda name, update: update * treated[name].lr, updates)


def _decay(treated: dict) -> optax.GradientTransformation:
    """Adds decay times weight. Its state is that of optax.adamw, so that older checkpoints fit."""

    def add(name, update, weight):
        decay = treated[name].weight_decay
        return update if isinstance(decay, float) and decay == 0 else update + decay * weight

    return optax.GradientTransformation(
        lambda _: optax.MaskedState(optax.EmptyState()),
        lambda updates, state, params=None: (_by_name(add, updates, params), state),
    )


def _adam(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _lion(config: ConfigDict) -> optax.GradientTransformation:
    """Chen et al., 2023, arXiv 2302.06675."""
    return optax.scale_by_lion(config.b1, config.b2)


def _adafactor(config: ConfigDict) -> optax.GradientTransformation:
    """Shazeer and Stern, 2018, as Zhai et al., 2021 (arXiv 2106.04560) use it for vision transformers: first moments,
    second moments that forget at most as b2 has it, no scaling by the parameter's size."""

    def remembered(step, exponent):
        return jnp.minimum(1 - jnp.asarray(step + 1, jnp.float32) ** -exponent, config.b2)

    moments = [optax.ema(config.b1, debias=False)] if config.b1 else []
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate_fn=remembered),
        optax.stateless(lambda updates, _: _by_name(_clip_rms, updates)),
        *moments,
    )


def _clip_rms(name: str, update: jax.Array) -> jax.Array:
    """Root mean square at most 1, of each block where they are scanned."""
    axes = tuple(range(rules.is_stack(name), update.ndim))
    return update / jnp.maximum(1, jnp.sqrt(jnp.mean(update**2, axes, keepdims=True)))


def _muon(config: ConfigDict) -> optax.GradientTransformation:
    """Jordan et al., 2024, for matrices of attention and MLP, of each block where they are scanned; Adam for the rest.

    A matrix's update has root mean square 0.2, about that of Adam's, whatever its sides (Liu et al., 2025, arXiv
    2502.16982), so that one learning rate and weight decay serve both.
    """

    def label(name, _):
        return "muon" if lora.MATRICES.search(lora.matrix(name)) else "adam"

    def dimensions(updates):
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), updates)

    def scale(update):
        return 0.2 * max(update.shape[-2:]) ** 0.5 * update

    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(scale, updates)),
    )
    return optax.partition({"muon": muon, "adam": _adam(config)}, lambda params: _by_name(label, params))


_DIRECTIONS = {"adamw": _adam, "lion": _lion, "adafactor": _adafactor, "muon": _muon}
