"""What to watch while training: how far the modalities agree, and whether the two losses pull the same way.

All of it is computed on the first `sample` pairs of the batch, so that it costs the same at any batch size
and only (sample, D) embeddings move between devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rankclip_jax.losses.objectives import clip_loss, objective_loss, rank_consistency


def _similarities(a_NxD, b_MxD):
    # By default TPUs multiply in bfloat16 and GPUs in TF32: other rankings than those that the loss compares.
    return jnp.matmul(a_NxD, b_MxD.T, precision=lax.Precision.HIGHEST)


def _ranks(scores_NxM):
    return jnp.argsort(jnp.argsort(-scores_NxM, axis=1, stable=True), axis=1)


def _agreement(a_NxM, b_NxM, top_k):
    """Spearman's correlation of the rows' rankings, and the share of the k best that they have in common."""
    m = a_NxM.shape[1]
    ranks_a, ranks_b = _ranks(a_NxM), _ranks(b_NxM)
    squares = jnp.sum(jnp.square((ranks_a - ranks_b).astype(jnp.float32)), axis=1)
    spearman = 1 - 6 * squares / (m * (m * m - 1.0))
    shared = jnp.sum((ranks_a < top_k) & (ranks_b < top_k), axis=1) / top_k
    return jnp.mean(spearman), jnp.mean(shared)


def _uniformity(z_NxD, others):
    """log E exp(-2 |x - x'|^2) over distinct pairs (Wang & Isola, 2020); lower is more uniform."""
    squared_distance = jnp.maximum(2 - 2 * _similarities(z_NxD, z_NxD), 0)
    return jnp.log(jnp.sum(jnp.where(others, jnp.exp(-2 * squared_distance), 0)) / jnp.sum(others))


def embedding_diagnostics(
    image_embeds: jax.Array, text_embeds: jax.Array, *, sample: int = 256, top_k: int = 10
) -> dict:
    """Agreement and geometry of a batch, as float32 scalars; no gradient flows through them.

    Args:
      image_embeds, text_embeds: (B, D) floating, L2-normalised, row i of one paired with row i of the other.
      sample: how many pairs, from the first, to look at.
      top_k: how many nearest items the overlap compares (fewer where the lists are shorter).

    Returns:
      spearman_in_modal, spearman_cross_modal: mean over rows of Spearman's correlation, -1 to 1, of the
        rankings that the terms compare (in-modal lists without the item itself; ties keep index order).
      overlap_in_modal, overlap_cross_modal: mean share of the top_k that both rankings have, 0 to 1.
      similarity_positive, similarity_negative: mean cosine of the pairs and of all others.
      modality_gap: distance between the mean image and the mean text embedding (Liang et al., 2022).
      alignment: mean squared distance of the pairs; uniformity_image, uniformity_text (Wang & Isola, 2020).

    Raises:
      ValueError: fewer than 3 pairs, for which a correlation says nothing.
    """
    n = min(sample, image_embeds.shape[0])
    if n < 3:
        raise ValueError(f"diagnostics need at least 3 pairs, not {n}")
    z_img, z_txt = (lax.stop_gradient(z[:n].astype(jnp.float32)) for z in (image_embeds, text_embeds))
    others = ~jnp.eye(n, dtype=bool)
    column = jnp.arange(n - 1) + (jnp.arange(n - 1) >= jnp.arange(n)[:, None])  # every row without its own item
    ii, tt, it = _similarities(z_img, z_img), _similarities(z_txt, z_txt), _similarities(z_img, z_txt)
    ii, tt = (jnp.take_along_axis(x, column, axis=1) for x in (ii, tt))
    spearman_in, overlap_in = _agreement(ii, tt, min(top_k, n - 1))
    spearman_cross, overlap_cross = _agreement(it, it.T, min(top_k, n))
    positive = jnp.diagonal(it)
    return {
        "spearman_in_modal": spearman_in,
        "spearman_cross_modal": spearman_cross,
        "overlap_in_modal": overlap_in,
        "overlap_cross_modal": overlap_cross,
        "similarity_positive": jnp.mean(positive),
        "similarity_negative": jnp.sum(jnp.where(others, it, 0)) / (n * (n - 1)),
        "modality_gap": jnp.linalg.norm(jnp.mean(z_img, axis=0) - jnp.mean(z_txt, axis=0)),
        "alignment": jnp.mean(jnp.sum(jnp.square(z_img - z_txt), axis=1)),
        "uniformity_image": _uniformity(z_img, others),
        "uniformity_text": _uniformity(z_txt, others),
    }


def gradient_cosine(
    image_embeds: jax.Array,
    text_embeds: jax.Array,
    logit_scale: jax.Array | float,
    *,
    sample: int = 256,
    **rank_options: Any,
) -> jax.Array:
    """Cosine between the gradients of the CLIP loss and of the ranking terms with respect to the embeddings.

    Near 1 the ranking terms repeat what CLIP asks for, near 0 they add to it, below 0 they work against it.

    Args:
      image_embeds, text_embeds, logit_scale: as `rank_consistency`; only the first `sample` pairs are used.
      rank_options: decay, top_k, keep_self of `rank_consistency`.

    Returns:
      A float32 scalar, -1 to 1; 0 where either gradient vanishes.
    """
    embeds = tuple(z[:sample].astype(jnp.float32) for z in (image_embeds, text_embeds))
    clip = jax.grad(lambda z: clip_loss(z[0], z[1], logit_scale))(embeds)
    rank = jax.grad(lambda z: sum(rank_consistency(z[0], z[1], logit_scale, **rank_options)))(embeds)
    return _cosine(_flat(clip), _flat(rank))


def _flat(grads):
    return jnp.concatenate([g.ravel() for g in grads])


def _cosine(a, b):
    norms = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return jnp.vdot(a, b, precision=lax.Precision.HIGHEST) / jnp.where(norms == 0, 1, norms)


def term_gradients(
    image_embeds: jax.Array, text_embeds: jax.Array, logit_scale: jax.Array | float, *, sample: int = 256
) -> dict:
    """How the gradients of single terms with respect to the embeddings sit with each other, as float32 scalars.

    Args: as `gradient_cosine`; the terms have their plain form, without decay or top_k.

    Returns:
      norm_TERM of clip, in_modal, cross_modal, cyclic_in_modal, cyclic_cross_modal, each with weight 1; cosine_A_B
      of clip with each other one, and of in_modal with cross_modal; 0 where a gradient vanishes.
    """
    embeds = tuple(z[:sample].astype(jnp.float32) for z in (image_embeds, text_embeds))

    def gradient(term):
        def loss(z):
            return objective_loss(*z, logit_scale, objective="rank", lambda_in=0, lambda_cross=0, terms={term: 1.0})[0]

        return _flat(jax.grad(loss)(embeds))

    others = ("in_modal", "cross_modal", "cyclic_in_modal", "cyclic_cross_modal")
    grads = {term: gradient(term) for term in ("clip", *others)}
    pairs = [("clip", other) for other in others] + [("in_modal", "cross_modal")]
    norms = {f"norm_{term}": jnp.linalg.norm(grad) for term, grad in grads.items()}
    return norms | {f"cosine_{a}_{b}": _cosine(grads[a], grads[b]) for a, b in pairs}
