"""RankCLIP's loss as the paper writes it (arXiv 2404.09387), in plain differentiable jnp. Read this first.

It holds whole B x B matrices and is exact in float32 as far as logsumexp is. sharded.py and chunked.py compute the
same in row chunks, over meshes, with closed-form gradients; the tests compare the two.
"""

import jax
import jax.numpy as jnp
from jax import lax


def plackett_luce_nll(scores: jax.Array, reference: jax.Array) -> jax.Array:
    """-log P(ranking by `reference` | scores) under Plackett-Luce, (..., n) -> (...), in nats.

    With s_1..s_n the scores in descending order of `reference`: sum_k [log sum_{j >= k} exp(s_j) - s_k]. This is
    ListMLE (Xia et al., 2008).
    """
    order = jnp.argsort(-lax.stop_gradient(reference), axis=-1, stable=True)
    ranked = jnp.take_along_axis(scores, order, axis=-1)
    suffix_lse = lax.cumlogsumexp(ranked, axis=scores.ndim - 1, reverse=True)
    return jnp.sum(suffix_lse - ranked, axis=-1)


def consistency(a_BxN: jax.Array, b_BxN: jax.Array) -> jax.Array:
    """How far the rows of a and b are from the same ranking: each ranked by the other, per row and list position."""
    nll_B = plackett_luce_nll(a_BxN, b_BxN) + plackett_luce_nll(b_BxN, a_BxN)
    return jnp.mean(nll_B) / (2 * a_BxN.shape[1])


def clip_loss(z_img_BxD: jax.Array, z_txt_BxD: jax.Array, scale: jax.Array | float) -> jax.Array:
    """CLIP's contrastive loss (Radford et al., 2021): the mean of both cross-entropies against the pairs."""
    logits_BxB = scale * z_img_BxD @ z_txt_BxD.T
    pairs_B = jnp.diagonal(logits_BxB)
    both = [jax.nn.logsumexp(logits_BxB, axis) - pairs_B for axis in (1, 0)]
    return jnp.mean(jnp.stack(both))


def in_modal(z_img_BxD: jax.Array, z_txt_BxD: jax.Array, scale: jax.Array | float) -> jax.Array:
    """The images rank the batch as their texts do."""
    return consistency(scale * z_img_BxD @ z_img_BxD.T, scale * z_txt_BxD @ z_txt_BxD.T)


def cross_modal(z_img_BxD: jax.Array, z_txt_BxD: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Image i ranks the texts as text i ranks the images."""
    logits_BxB = scale * z_img_BxD @ z_txt_BxD.T
    return consistency(logits_BxB, logits_BxB.T)


def rankclip_loss(
    z_img_BxD: jax.Array,
    z_txt_BxD: jax.Array,
    scale: jax.Array | float,
    rank_weight: jax.Array | float = 1.0,
    lambda_in: float = 1 / 16,
    lambda_cross: float = 1 / 16,
) -> jax.Array:
    """clip + w (lambda_in in_modal + lambda_cross cross_modal); embeddings of unit length, scale the multiplier."""
    z = z_img_BxD, z_txt_BxD, scale
    return clip_loss(*z) + rank_weight * (lambda_in * in_modal(*z) + lambda_cross * cross_modal(*z))
