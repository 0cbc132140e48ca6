"""The gradient of a loss over a whole batch of embeddings, with the towers' activations of a part of it at a time.

The usual accumulation, a mean of the parts' gradients, is wrong here: every pair of the batch is a negative, or a list
item, of every other. So (as Gao et al., 2021, "GradCache"): embed the parts and keep only the embeddings; take
the loss of them all and its gradient with respect to each; embed each part again and pull its share back into the
parameters. The result is the whole batch's gradient, for one more forward pass.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax


def loss_and_grads(
    embed: Callable, loss: Callable, params: Mapping, batch: Mapping, parts: int, constrain: Callable = lambda x: x
) -> tuple[tuple, dict]:
    """-> ((loss, aux), gradients of params).

    Args:
      embed: (params, batch) -> a tree of (b, ...) embeddings; a row's must depend on nothing but that row, so no batch
        norm in training.
      loss: (params, embeddings of the whole batch) -> (scalar, aux).
      batch: a tree of (B, ...) arrays; `parts` divides B.
      constrain: applied to the batch cut into (parts, B / parts, ...), to keep the rows where they are on a mesh.
    """
    if parts == 1:
        return jax.value_and_grad(lambda p: loss(p, embed(p, batch)), has_aux=True)(params)
    # Every parts-th row goes into a part: each device's rows are then cut in the same way, and none moves.
    cut = constrain(jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch))

    def join(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def pull_back(grads, part):
        rows, d_z = part
        _, vjp = jax.vjp(lambda p: embed(p, rows), params)
        return jax.tree.map(jnp.add, grads, vjp(d_z)[0]), None

    z = jax.tree.map(join, lax.map(lambda rows: embed(params, rows), cut))
    value, (grads, d_z) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, z)
    d_z = constrain(jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), d_z))
    return value, lax.scan(pull_back, grads, (cut, d_z))[0]
