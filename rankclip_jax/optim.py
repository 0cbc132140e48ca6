"""AdamW with decay on matrices only, linear warm-up and cosine decay."""

import re

import jax
import optax

from rankclip_jax.errors import InputError

# By name and not by rank: in scanned towers a norm's scale has two axes. Decayed: dense and convolution kernels,
# projections, the token table. Never: norms of any kind, biases, logit scale, class and position embeddings.
_DECAYED = re.compile(r"(^|/)(kernel|proj|text_projection|token_embedding/embedding)$")


def path_name(path) -> str:
    """A pytree path as "visual/conv1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decay_mask(params):
    """A tree like `params`, True where weight decay applies."""
    return jax.tree_util.tree_map_with_path(lambda p, _: bool(_DECAYED.search(path_name(p))), params)


def learning_rate(config, total_steps: int) -> optax.Schedule:
    """Step (from 0) -> rate. Update number `warmup_steps` has the full rate, the last update rate 0.

    Raises:
      InputError: the warm-up does not end before the run does.
    """
    warmup = config.warmup_steps
    if warmup >= total_steps:
        raise InputError(
            f"config.optim.warmup_steps = {warmup} must be fewer than the run's {total_steps} steps; "
            f"for example --config.optim.warmup_steps={total_steps // 10}"
        )
    return optax.join_schedules(
        [
            optax.linear_schedule(config.lr / max(warmup, 1), config.lr, max(warmup - 1, 1)),
            optax.cosine_decay_schedule(config.lr, max(total_steps - warmup, 1)),
        ],
        [warmup],
    )


def make_optimizer(config, total_steps: int) -> optax.GradientTransformation:
    """Optimiser of `config.optim` for a run of `total_steps`."""
    clip = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
    adamw = optax.adamw(
        learning_rate(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(*clip, adamw)
