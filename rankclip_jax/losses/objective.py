"""The losses of a batch of embeddings: CLIP, ranking consistency, and their weighted sum (RankCLIP)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rankclip_jax.losses.batch_terms import Plan, weighted_terms


class RankTerms(NamedTuple):
    """The two ranking terms, scalars in nats per list position."""

    in_modal: jax.Array
    cross_modal: jax.Array


def _plan(image_embeds, text_embeds, terms, *, mesh, axes, chunk, decay=None, top_k=None, keep_self=True):
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        shapes = f"image_embeds {image_embeds.shape} and text_embeds {text_embeds.shape}"
        raise ValueError(f"{shapes} must have one shape (B, D)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: it must be at least 1, or None for whole lists")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: it must be at least 1 row, or None to choose it from B")
    if mesh is not None:
        axes = tuple(mesh.axis_names) if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        devices = 1
        for axis in axes:
            if axis not in mesh.shape:
                raise ValueError(f"axes={axes}: the mesh has no axis {axis!r}, only {tuple(mesh.axis_names)}")
            devices *= mesh.shape[axis]
        if image_embeds.shape[0] % devices:
            batch = image_embeds.shape[0]
            raise ValueError(f"a batch of {batch} does not divide over the {devices} devices of mesh axes {axes}")
    return Plan(terms, decay, top_k, keep_self, chunk, mesh, axes or ())


def _one(name, image_embeds, text_embeds, logit_scale, **options):
    plan = _plan(image_embeds, text_embeds, (name,), **options)
    scale = jnp.asarray(logit_scale, jnp.float32)
    return weighted_terms(image_embeds, text_embeds, scale, {name: jnp.float32(1)}, plan)[0]


def clip_loss(image_embeds, text_embeds, logit_scale, *, mesh=None, axes=None, chunk=None) -> jax.Array:
    """CLIP's symmetric contrastive loss (Radford et al., 2021): the mean of the two cross-entropies, in nats.

    Args: as `rank_consistency`, which see.
    """
    return _one("clip", image_embeds, text_embeds, logit_scale, mesh=mesh, axes=axes, chunk=chunk)


def rank_consistency(
    image_embeds,
    text_embeds,
    logit_scale,
    *,
    mesh=None,
    axes=None,
    chunk: int | None = None,
    decay: str | None = None,
    top_k: int | None = None,
    keep_self: bool = True,
) -> RankTerms:
    """The two ranking terms of RankCLIP (arXiv 2404.09387), each differentiable on its own.

    in_modal compares how the images rank the batch with how their texts rank it; cross_modal compares the
    ranking of the texts by image i with that of the images by text i. Each is the mean over both directions,
    the rows and the list positions of `plackett_luce_nll`.

    Args:
      image_embeds, text_embeds: (B, D) floating, L2-normalised; row i of one belongs to row i of the other.
      logit_scale: scalar, the multiplier of the cosines (the exponential of the learned parameter).
      mesh: None for one device; otherwise each device computes its own rows under shard_map.
      axes: the mesh axes over which rows are sharded; None means all axes of the mesh.
      chunk: rows of B x B matrices held at a time; None chooses it from B and the backend.
      decay, top_k: as in `plackett_luce_nll`; with top_k the mean is over the k positions kept.
      keep_self: keep item i in its own in-modal lists, as the authors do, or leave it out.

    Returns:
      RankTerms of float32 scalars, in nats.

    Raises:
      ValueError: shapes, options, or a batch that the devices do not divide.
    """
    options = dict(mesh=mesh, axes=axes, chunk=chunk, decay=decay, top_k=top_k)
    return RankTerms(
        _one("in_modal", image_embeds, text_embeds, logit_scale, keep_self=keep_self, **options),
        _one("cross_modal", image_embeds, text_embeds, logit_scale, **options),
    )


def rank_weight(epoch, epochs: int, schedule: str = "ramp"):
    """The common weight of the ranking terms in an epoch (from 1, whole numbers as in the released code).

    "ramp" is the released code's clip(3 (epoch - 1) / (epochs - 1), 0, 2): nothing in the first epoch, 2 from
    two thirds of the way on. With epochs=1, where that divides zero by zero, it is 0, as in the first epoch
    of any other run. "constant" is 1 (arXiv v2). epoch may be traced; a fractional epoch ramps smoothly.

    Raises:
      ValueError: an unknown schedule, or epochs below 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: it must be at least 1")
    if schedule == "constant":
        return jnp.float32(1)
    if schedule == "ramp":
        return jnp.clip(3.0 * (jnp.asarray(epoch, jnp.float32) - 1.0) / max(epochs - 1, 1), 0.0, 2.0)
    raise ValueError(f'schedule={schedule!r}: it must be "ramp" or "constant"')


def objective_loss(
    image_embeds,
    text_embeds,
    logit_scale,
    *,
    objective: str = "rankclip",
    rank_weight=1.0,
    lambda_in=1 / 16,
    lambda_cross=1 / 16,
    decay: str | None = None,
    top_k: int | None = None,
    keep_self: bool = True,
    chunk: int | None = None,
    mesh=None,
    axes=None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """clip + rank_weight * (lambda_in * in_modal + lambda_cross * cross_modal), in one pass over the scores.

    Args:
      objective: "clip", or "rankclip" for the ranking terms too.
      rank_weight: scalar, may be traced (see the function of that name).
      lambda_in, lambda_cross: weights of the terms; one that is the Python number 0 drops its term.
      The others: as `rank_consistency`.

    Returns:
      (loss, parts): a float32 scalar that carries the gradient, and the unweighted parts for metrics, which
      carry none: {"clip", "rank_in_modal", "rank_cross_modal"}, those that were computed.
    """
    if objective not in ("clip", "rankclip"):
        raise ValueError(f'objective={objective!r}: it must be "clip" or "rankclip"')
    lambdas = {"in_modal": lambda_in, "cross_modal": lambda_cross} if objective == "rankclip" else {}
    weights = {"clip": jnp.float32(1)} | {
        term: jnp.asarray(rank_weight * weight, jnp.float32)
        for term, weight in lambdas.items()
        if not (isinstance(weight, int | float) and weight == 0)
    }
    options = dict(mesh=mesh, axes=axes, chunk=chunk, decay=decay, top_k=top_k, keep_self=keep_self)
    plan = _plan(image_embeds, text_embeds, tuple(weights), **options)
    scale = jnp.asarray(logit_scale, jnp.float32)
    loss, means = weighted_terms(image_embeds, text_embeds, scale, weights, plan)
    return loss, {t if t == "clip" else f"rank_{t}": lax.stop_gradient(mean) for t, mean in means.items()}
