"""Averages of the weights over the steps (config.optim.ema), of what is trained and of batch statistics.

At step u, counted from 0: average = d average + (1 - d) weights, d = min(ema, (1 + u) / (10 + u)), so that a short run
does not keep its start.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rankclip_jax.common.trees import by_name, nested
from rankclip_jax.train import rules


def begin(params: Mapping, batch_stats: Mapping, config: ConfigDict) -> dict:
    """{"params", "batch_stats"} before the first step: copies, since a step donates its state.

    Without frozen weights, which are their own average, and without what is empty. Stacks of scanned blocks of which
    some are frozen are whole. `config`: config.optim.
    """
    treated = rules.treatments(config, params)
    trained = {name: x for name, x in by_name(params).items() if treated[name].frozen is not True}
    return jax.tree.map(jnp.copy, nested(by_name({"params": nested(trained), "batch_stats": batch_stats})))


def update(average: Mapping, params: Mapping, batch_stats: Mapping, step: jax.Array, decay: float) -> dict:
    """The average after the step of this number, whose new weights are `params`."""
    now = by_name({"params": params, "batch_stats": batch_stats})
    rest = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return nested({name: old + rest * (now[name] - old) for name, old in by_name(average).items()})
