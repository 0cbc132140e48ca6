"""The losses of a batch of embeddings, each alone, and the weighted sums of them that have names (RankCLIP first)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rankclip_jax.losses.batch_terms import Plan, weighted_terms
from rankclip_jax.losses.row_terms import MATRICES

# The terms of each objective besides the ranking terms, with their weights: CLIP (Radford et al., 2021), SigLIP
# (Zhai et al., 2023) and CyCLIP (Goel et al., 2022). RANKING are the objectives that have the ranking terms too.
OBJECTIVES = {
    "clip": {"clip": 1.0},
    "rankclip": {"clip": 1.0},
    "rank": {},
    "siglip": {"siglip": 1.0},
    "cyclip": {"clip": 1.0, "cyclic_in_modal": 0.25, "cyclic_cross_modal": 0.25},
}
RANKING = ("rankclip", "rank")


class RankTerms(NamedTuple):
    """The two ranking terms, scalars in nats per list position."""

    in_modal: jax.Array
    cross_modal: jax.Array


def _plan(image_embeds, text_embeds, terms, *, mesh, axes, chunk, decay=None, top_k=None, keep_self=True, form="exact"):
    if form not in ("exact", "released"):
        raise ValueError(f'form={form!r}: it must be "exact" or "released"')
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
    return Plan(terms, decay, top_k, keep_self, form == "released", chunk, mesh, axes or ())


def _one(name, image_embeds, text_embeds, logit_scale, bias=0.0, **options):
    plan = _plan(image_embeds, text_embeds, (name,), **options)
    scale, bias = jnp.asarray(logit_scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    return weighted_terms(image_embeds, text_embeds, scale, bias, {name: jnp.float32(1)}, plan)[0]


def clip_loss(
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    logit_scale: jax.Array | float,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axes: Sequence[str] | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """CLIP's symmetric contrastive loss (Radford et al., 2021): the mean of the two cross-entropies, in nats.

    Args: as `rank_consistency`, which see.
    """
    return _one("clip", image_embeds, text_embeds, logit_scale, mesh=mesh, axes=axes, chunk=chunk)


def siglip_loss(
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    logit_scale: jax.Array | float,
    logit_bias: jax.Array | float,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axes: Sequence[str] | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """SigLIP's pairwise sigmoid loss (Zhai et al., 2023, equation 1): summed over a row, mean over the rows, in nats.

    Args:
      logit_bias: scalar added to every scaled cosine; learned, from -10, beside a scale learned from 10.
      The others: as `rank_consistency`.
    """
    return _one("siglip", image_embeds, text_embeds, logit_scale, logit_bias, mesh=mesh, axes=axes, chunk=chunk)


def rank_consistency(
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    logit_scale: jax.Array | float,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axes: Sequence[str] | None = None,
    chunk: int | None = None,
    decay: str | None = None,
    top_k: int | None = None,
    keep_self: bool = True,
    form: str = "exact",
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
      form: "exact", or "released": float32 log(sum of exponentials + 1e-10) with its gradient, as the authors'
        code has it, to compare what that does to training.

    Returns:
      RankTerms of float32 scalars, in nats.

    Raises:
      ValueError: shapes, options, or a batch that the devices do not divide.
    """
    options = dict(mesh=mesh, axes=axes, chunk=chunk, decay=decay, top_k=top_k, form=form)
    return RankTerms(
        _one("in_modal", image_embeds, text_embeds, logit_scale, keep_self=keep_self, **options),
        _one("cross_modal", image_embeds, text_embeds, logit_scale, **options),
    )


def rank_weight(epoch: jax.Array | int, epochs: int, schedule: str = "ramp") -> jax.Array:
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
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    logit_scale: jax.Array | float,
    logit_bias: jax.Array | float = 0.0,
    *,
    objective: str = "rankclip",
    rank_weight: jax.Array | float = 1.0,
    lambda_in: float = 1 / 16,
    lambda_cross: float = 1 / 16,
    terms: Mapping | None = None,
    decay: str | None = None,
    top_k: int | None = None,
    keep_self: bool = True,
    form: str = "exact",
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axes: Sequence[str] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of an objective's terms, in one pass over the scores.

    rankclip: clip + rank_weight * (lambda_in * in_modal + lambda_cross * cross_modal). rank: the same without clip.
    clip, siglip, cyclip: see OBJECTIVES. CyCLIP's terms are B times the mean squared difference of the cosines
    (image-image against text-text; image-text against its transpose), which does not depend on the scale.

    Args:
      logit_bias: scalar, of the siglip term only.
      objective: a key of OBJECTIVES.
      rank_weight: scalar, may be traced (see the function of that name).
      lambda_in, lambda_cross: weights of the ranking terms.
      terms: weights of terms (of row_terms.MATRICES) to add to the objective, or to put in place of its own. A weight
        that is the Python number 0, here or above, drops its term.
      The others: as `rank_consistency`.

    Returns:
      (loss, parts): a float32 scalar that carries the gradient, and the unweighted parts for metrics, which
      carry none: "clip", "rank_in_modal", "rank_cross_modal", "siglip" ..., those that were computed.

    Raises:
      ValueError: an unknown objective or term, none left, or what `rank_consistency` refuses.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: it must be one of {', '.join(OBJECTIVES)}")
    lambdas = {"in_modal": lambda_in, "cross_modal": lambda_cross} if objective in RANKING else {}
    wanted = OBJECTIVES[objective] | {t: w if _is_zero(w) else rank_weight * w for t, w in lambdas.items()}
    wanted |= dict(terms or {})
    if unknown := sorted(set(wanted) - set(MATRICES)):
        raise ValueError(f"terms: no term {unknown[0]!r}, only {', '.join(MATRICES)}")
    weights = {t: jnp.asarray(w, jnp.float32) for t, w in wanted.items() if not _is_zero(w)}
    if not weights:
        raise ValueError(f"objective={objective!r}: every weight is zero")
    options = dict(mesh=mesh, axes=axes, chunk=chunk, decay=decay, top_k=top_k, keep_self=keep_self, form=form)
    plan = _plan(image_embeds, text_embeds, tuple(weights), **options)
    scale, bias = jnp.asarray(logit_scale, jnp.float32), jnp.asarray(logit_bias, jnp.float32)
    # The cyclic terms are of cosines, the matrices hold scale times those.
    units = {t: 1 / jnp.square(scale) if t.startswith("cyclic") else jnp.float32(1) for t in weights}
    in_units = {t: weights[t] * units[t] for t in weights}
    loss, means = weighted_terms(image_embeds, text_embeds, scale, bias, in_units, plan)
    return loss, {_metric(t): lax.stop_gradient(mean * units[t]) for t, mean in means.items()}


def _is_zero(weight) -> bool:
    return isinstance(weight, int | float) and weight == 0


def _metric(term: str) -> str:
    return f"rank_{term}" if term in ("in_modal", "cross_modal") else term
