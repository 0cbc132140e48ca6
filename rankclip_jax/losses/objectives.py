"""The losses of a batch of embeddings, each alone, and the weighted sums of them that have names (RankCLIP first)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rankclip_jax.losses.sharded import Placement, weighted_terms
from rankclip_jax.losses.spec import RANK_TERMS, LossSpec


class RankTerms(NamedTuple):
    """The two ranking terms, scalars in nats per list position."""

    in_modal: jax.Array
    cross_modal: jax.Array


def clip_loss(
    image_embeds: jax.Array, text_embeds: jax.Array, logit_scale: jax.Array | float, **where: Any
) -> jax.Array:
    """CLIP's symmetric contrastive loss (Radford et al., 2021): the mean of the two cross-entropies, in nats.

    Args: as `rank_consistency`; `where`: its mesh, axes and chunk.
    """
    weights = {"clip": 1.0}
    return weighted_loss(image_embeds, text_embeds, logit_scale, 0.0, LossSpec("clip"), weights, **where)[0]


def siglip_loss(
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    logit_scale: jax.Array | float,
    logit_bias: jax.Array | float,
    **where: Any,
) -> jax.Array:
    """SigLIP's pairwise sigmoid loss (Zhai et al., 2023, equation 1): summed over a row, mean over the rows, in nats.

    Args:
      logit_bias: scalar added to every scaled cosine; learned, from -10, beside a scale learned from 10.
      The others: as `rank_consistency`; `where`: its mesh, axes and chunk.
    """
    spec = LossSpec("siglip")
    return weighted_loss(image_embeds, text_embeds, logit_scale, logit_bias, spec, spec.weights(), **where)[0]


def rank_consistency(
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    logit_scale: jax.Array | float,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axes: Sequence[str] | None = None,
    chunk: int | None = None,
    list_size: int | None = None,
    **lists: Any,
) -> RankTerms:
    """The two ranking terms of RankCLIP (arXiv 2404.09387), each differentiable on its own.

    in_modal compares how the images rank the batch with how their texts rank it; cross_modal compares the
    ranking of the texts by image i with that of the images by text i. Each is the mean over both directions,
    the rows and the list positions of `plackett_luce_nll` (reference.consistency).

    Args:
      image_embeds, text_embeds: (B, D) floating, L2-normalised; row i of one belongs to row i of the other.
      logit_scale: scalar, the multiplier of the cosines (the exponential of the learned parameter).
      mesh: None for one device; otherwise each device computes its own rows under shard_map.
      axes: the mesh axes over which rows are sharded; None means all axes of the mesh.
      chunk: rows of B x B matrices held at a time; None chooses it from B and the platform.
      list_size: rank within groups of so many consecutive rows, the mean over all groups; None: the whole batch.
      lists: decay, top_k, keep_self and form of LossSpec.

    Returns:
      RankTerms of float32 scalars, in nats.

    Raises:
      ValueError: shapes, options, or a batch that the devices or list_size do not divide.
    """
    spec = LossSpec("rank", list_size=list_size, **lists)

    def alone(term):
        embeds, where = (image_embeds, text_embeds), dict(mesh=mesh, axes=axes, chunk=chunk)
        return weighted_loss(*embeds, logit_scale, 0.0, spec, {term: 1.0}, **where)[0]

    return RankTerms(*map(alone, RankTerms._fields))


def rank_weight(epoch: jax.Array | int, epochs: int, schedule: str = "ramp") -> jax.Array:
    """The common weight of the ranking terms in an epoch (from 1, whole numbers as in the released code).

    "ramp" is the released code's clip(3 (epoch - 1) / (epochs - 1), 0, 2): nothing in the first epoch, 2 from
    two thirds of the way on. With epochs=1, where that divides zero by zero, it is 0, as in the first epoch
    of any other run. After `epochs` it keeps its last value. "constant" is 1 (arXiv v2). epoch may be traced; a
    fractional epoch ramps smoothly.

    Raises:
      ValueError: an unknown schedule, or epochs below 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs}. Expected at least 1")
    if schedule == "constant":
        return jnp.float32(1)
    if schedule == "ramp":
        ramped = jnp.minimum(jnp.asarray(epoch, jnp.float32), epochs)
        return jnp.clip(3.0 * (ramped - 1.0) / max(epochs - 1, 1), 0.0, 2.0)
    raise ValueError(f'schedule={schedule!r}. Expected "ramp" or "constant"')


def objective_loss(
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    logit_scale: jax.Array | float,
    logit_bias: jax.Array | float = 0.0,
    *,
    rank_weight: jax.Array | float = 1.0,
    mesh: jax.sharding.Mesh | None = None,
    axes: Sequence[str] | None = None,
    chunk: int | None = None,
    **fields: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of an objective's terms, in one pass over the scores.

    rankclip: clip + rank_weight * (lambda_in * in_modal + lambda_cross * cross_modal). rank: the same without clip.
    clip, siglip, cyclip: see OBJECTIVES. CyCLIP's terms are B times the mean squared difference of the cosines
    (image-image against text-text; image-text against its transpose), which does not depend on the scale.

    Args:
      logit_bias: scalar, of the siglip term only.
      rank_weight: scalar, may be traced: the value of the schedule (see the function of that name).
      fields: of LossSpec; terms as {name: weight}.
      The others: as `rank_consistency`.

    Returns, raises: as `weighted_loss`.
    """
    spec = LossSpec(**fields)
    embeds, weights = (image_embeds, text_embeds), spec.weights(rank_weight)
    return weighted_loss(*embeds, logit_scale, logit_bias, spec, weights, mesh=mesh, axes=axes, chunk=chunk)


def weighted_loss(
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    logit_scale: jax.Array | float,
    logit_bias: jax.Array | float,
    spec: LossSpec,
    weights: Mapping[str, jax.Array | float],
    *,
    mesh: jax.sharding.Mesh | None = None,
    axes: Sequence[str] | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum of weights[term] * term, and the terms; `weights` as `spec.weights` gives them, the rest as `objective_loss`.

    Returns:
      (loss, parts): a float32 scalar that carries the gradient, and the unweighted parts for metrics, which
      carry none: "clip", "rank_in_modal", "rank_cross_modal", "siglip" ..., those that were computed.

    Raises:
      ValueError: shapes, options, or a batch that the devices or list_size do not divide.
    """
    place = _placement(image_embeds, text_embeds, mesh, axes, chunk)
    if place.mesh and AxisType.Explicit in place.mesh.axis_types:  # no array moves by itself
        by_row = NamedSharding(place.mesh, P(place.axes))
        image_embeds, text_embeds = jax.reshard(image_embeds, by_row), jax.reshard(text_embeds, by_row)
    if spec.list_size and image_embeds.shape[0] % spec.list_size:
        raise ValueError(f"list_size={spec.list_size} does not divide the batch of {image_embeds.shape[0]}")
    scale, bias = jnp.asarray(logit_scale, jnp.float32), jnp.asarray(logit_bias, jnp.float32)
    # The cyclic terms are of cosines, the matrices hold scale times those.
    units = {t: 1 / jnp.square(scale) if t.startswith("cyclic") else jnp.float32(1) for t in weights}
    in_units = {t: jnp.asarray(weights[t], jnp.float32) * units[t] for t in weights}
    loss, means = weighted_terms(image_embeds, text_embeds, scale, bias, in_units, spec, place)
    return loss, {_metric(t): lax.stop_gradient(mean * units[t]) for t, mean in means.items()}


def _placement(
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    mesh: jax.sharding.Mesh | None,
    axes: Sequence[str] | None,
    chunk: int | None,
) -> Placement:
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        shapes = f"image_embeds {image_embeds.shape} and text_embeds {text_embeds.shape}"
        raise ValueError(f"{shapes} must have one shape (B, D)")
    if not image_embeds.shape[0]:
        raise ValueError("a batch of 0 pairs has no loss")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}. Expected at least 1 row, or None to choose it from B")
    if mesh is None:
        return Placement(chunk=chunk)
    axes = tuple(mesh.axis_names) if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    devices = 1
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(f"axes={axes}: the mesh has no axis {axis!r}, only {tuple(mesh.axis_names)}")
        devices *= mesh.shape[axis]
    if image_embeds.shape[0] % devices:
        batch = image_embeds.shape[0]
        raise ValueError(f"a batch of {batch} does not divide over the {devices} devices of mesh axes {axes}")
    return Placement(mesh, axes, chunk)


def _metric(term: str) -> str:
    return f"rank_{term}" if term in RANK_TERMS else term
