"""Every term of the objective over one batch, with its gradient, in row chunks and over a mesh.

The similarities of a batch are four B x B matrices: image-image, text-text, image-text, text-image. None is
ever held whole: a device takes its own rows, a chunk at a time, and has the loss and the gradient of a chunk
before it starts the next (the gradients are in closed form, so the backward pass only scales what the forward
pass kept: two (B, D) arrays). Only the embeddings travel: two all-gathers of (B, D) there, two
reduce-scatters back, and one all-reduce of a few scalars.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from rankclip_jax.losses.plackett_luce import first_order_only
from rankclip_jax.losses.sorting import by_platform
from rankclip_jax.losses.spec import MATRICES, LossSpec
from rankclip_jax.losses.terms import row_terms

# Scores err by scale * eps, so at logit scale 100 anything below full float32 products (TF32, one or three
# bfloat16 passes) would break the 1e-5 that the loss promises. bfloat16 embeddings multiply exactly as is.
_PRECISION = lax.Precision.HIGHEST


class Placement(NamedTuple):
    """Where the rows are and how many are taken at a time; hashable, as a static argument must be."""

    mesh: jax.sharding.Mesh | None = None
    axes: tuple[str, ...] = ()
    chunk: int | None = None


def _scores(rows_RxD, all_BxD):
    return jnp.matmul(rows_RxD, all_BxD.T, precision=_PRECISION, preferred_element_type=jnp.float32)


def _mix(grad_RxB, all_BxD, platform):
    # The gradient promises 1e-4. Three bfloat16 passes (HIGH on TPU) err by 4e-6 and halve the time of six; on
    # GPU HIGH means TF32, which errs by 3e-4. Norm-wise, on random matrices of 2,048 terms, emulated in NumPy.
    precision = lax.Precision.HIGH if platform == "tpu" else lax.Precision.HIGHEST
    return jnp.matmul(grad_RxB, all_BxD.astype(jnp.float32), precision=precision)


def _chunk_terms(img_RxD, txt_RxD, img_BxD, txt_BxD, scale, bias, weights, labels_R, spec, platform, with_grad):
    """Sums over one chunk of rows {term: scalar}; weighted gradients of the score matrices and of the bias."""
    rows, columns = {"i": img_RxD, "t": txt_RxD}, {"i": img_BxD, "t": txt_BxD}
    used = sorted({matrix for term in weights for matrix in MATRICES[term]})
    scores = {matrix: scale * _scores(rows[matrix[0]], columns[matrix[1]]) for matrix in used}
    sums, grads, d_bias = {}, {}, jnp.zeros((), jnp.float32)
    pairs = {term: tuple(scores[matrix] for matrix in MATRICES[term]) for term in weights}
    results = row_terms(pairs, bias, labels_R, spec, platform, with_grad)
    for term in weights:
        pair, result = MATRICES[term], results[term]
        sums[term] = result.loss
        d_bias += weights[term] * result.grad_bias
        for matrix, grad in zip(pair, (result.grad_a, result.grad_b), strict=True):
            if grad is not None:
                grads[matrix] = grads.get(matrix, 0.0) + weights[term] * grad
    return sums, grads, d_bias


def _chunk_size(rows: int, batch: int, platform: str) -> int:
    """Rows at a time: half a million scores a matrix on CPU, near the cache; eight million elsewhere.

    At least 64 rows, below which adding up the (B, D) gradients of the chunks costs more than they do.
    """
    return min(rows, max(64, (1 << (19 if platform == "cpu" else 23)) // batch))


def _local_terms(
    img_RxD, txt_RxD, img_BxD, txt_BxD, scale, bias, weights, first_row, spec, chunk, platform, with_grad
):
    """Sums of the terms over this device's rows; gradients of its rows, all embeddings, the scale and the bias."""
    rows, batch = img_RxD.shape[0], img_BxD.shape[0]
    chunk = min(rows, chunk or _chunk_size(rows, batch, platform))

    def one_chunk(carry, first, img_CxD, txt_CxD):
        sums, d_img_all, d_txt_all, d_scale, d_bias = carry
        labels = first_row + first + jnp.arange(img_CxD.shape[0], dtype=jnp.int32)
        new, grads, new_d_bias = _chunk_terms(
            img_CxD, txt_CxD, img_BxD, txt_BxD, scale, bias, weights, labels, spec, platform, with_grad
        )
        sums = {name: sums[name] + new[name] for name in sums}
        if not with_grad:
            return (sums, d_img_all, d_txt_all, d_scale, d_bias), None
        d_rows = {"i": jnp.zeros(img_CxD.shape, jnp.float32), "t": jnp.zeros(txt_CxD.shape, jnp.float32)}
        d_all = {"i": d_img_all, "t": d_txt_all}
        row, col = {"i": img_CxD, "t": txt_CxD}, {"i": img_BxD, "t": txt_BxD}
        for (a, b), grad in grads.items():
            d_rows[a] += _mix(grad, col[b], platform)
            d_all[b] += scale * _mix(grad.T, row[a], platform)
        # <row, d score / d row> summed is the gradient of the scale; it saves a pass over the scores.
        d_scale += jnp.sum(d_rows["i"] * img_CxD) + jnp.sum(d_rows["t"] * txt_CxD)
        return (sums, d_all["i"], d_all["t"], d_scale, d_bias + new_d_bias), (scale * d_rows["i"], scale * d_rows["t"])

    zero = jnp.zeros((), jnp.float32)
    zeros_BxD = jnp.zeros(img_BxD.shape if with_grad else (), jnp.float32)
    carry = ({name: zero for name in weights}, zeros_BxD, zeros_BxD, zero, zero)
    full = rows // chunk
    split = full * chunk
    shaped = [x[:split].reshape(full, chunk, -1) for x in (img_RxD, txt_RxD)]
    carry, d_rows = lax.scan(
        lambda c, xs: one_chunk(c, *xs), carry, (jnp.arange(full, dtype=jnp.int32) * chunk, *shaped)
    )
    if with_grad:
        d_rows = tuple(d.reshape(split, -1) for d in d_rows)
    if split < rows:
        carry, last = one_chunk(carry, split, img_RxD[split:], txt_RxD[split:])
        if with_grad:
            d_rows = tuple(jnp.concatenate(pair) for pair in zip(d_rows, last, strict=True))
    return carry, d_rows


def _batch_terms(img_BxD, txt_BxD, scale, bias, weights, spec, place, with_grad):
    """Means of the terms over the batch; with_grad also the gradients of their weighted sum."""

    def compute(platform, *args):
        return _on_platform(platform, *args, spec, place, with_grad)

    return by_platform(compute, img_BxD, txt_BxD, scale, bias, weights)


def _on_platform(platform, img_BxD, txt_BxD, scale, bias, weights, spec, place, with_grad):
    batch, terms = img_BxD.shape[0], sorted(weights)

    def body(img_RxD, txt_RxD, scale, bias, weights):
        if place.mesh is None:
            gather = reduce_sum = scatter = lambda x: x
            first_row = 0
        else:
            gather = functools.partial(lax.all_gather, axis_name=place.axes, tiled=True)
            scatter = functools.partial(lax.psum_scatter, axis_name=place.axes, tiled=True)
            reduce_sum = functools.partial(lax.psum, axis_name=place.axes)
            first_row = lax.axis_index(place.axes) * img_RxD.shape[0]
        rows, columns = (img_RxD, txt_RxD), (gather(img_RxD), gather(txt_RxD))
        (sums, d_img_all, d_txt_all, d_scale, d_bias), d_rows = _local_terms(
            *rows, *columns, scale, bias, weights, first_row, spec, place.chunk, platform, with_grad
        )
        # One all-reduce for all scalars.
        scalars = jnp.stack([*(sums[name] for name in terms), d_scale, d_bias])
        *totals, d_scale, d_bias = reduce_sum(scalars) / batch
        means = dict(zip(terms, totals, strict=True))
        if not with_grad:
            return means
        d_img, d_txt = ((scatter(a) + r) / batch for a, r in zip((d_img_all, d_txt_all), d_rows, strict=True))
        return means, d_img, d_txt, d_scale, d_bias

    if place.mesh is None:
        return body(img_BxD, txt_BxD, scale, bias, weights)
    by_row = P(place.axes)
    out_specs = (P(), by_row, by_row, P(), P()) if with_grad else P()
    # Gradients are made here by hand and never by differentiating through shard_map, so its replication check
    # has nothing to add.
    return jax.shard_map(
        body, mesh=place.mesh, in_specs=(by_row, by_row, P(), P(), P()), out_specs=out_specs, check_vma=False
    )(img_BxD, txt_BxD, scale, bias, weights)


def _total(means, weights):
    return sum(weights[name] * means[name] for name in means)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def weighted_terms(
    img_BxD: jax.Array,
    txt_BxD: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    weights: Mapping[str, jax.Array],
    spec: LossSpec,
    place: Placement,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-> (sum of weights[name] * means[name], means). Only the sum carries gradient."""
    means = _batch_terms(img_BxD, txt_BxD, scale, bias, weights, spec, place, with_grad=False)
    return _total(means, weights), means


def _forward(img_BxD, txt_BxD, scale, bias, weights, spec, place):
    img_BxD, txt_BxD, scale, bias = (first_order_only(x) for x in (img_BxD, txt_BxD, scale, bias))
    means, *grads = _batch_terms(img_BxD, txt_BxD, scale, bias, weights, spec, place, with_grad=True)
    d_img, d_txt, d_scale, d_bias = grads
    d_img, d_txt = d_img.astype(img_BxD.dtype), d_txt.astype(txt_BxD.dtype)
    return (_total(means, weights), means), (d_img, d_txt, d_scale, d_bias, means)


def _backward(spec, place, kept, cotangents):
    del spec, place
    d_img, d_txt, d_scale, d_bias, means = kept
    g, _ = cotangents
    d_img, d_txt = ((g * d).astype(d.dtype) for d in (d_img, d_txt))
    return d_img, d_txt, g * d_scale, g * d_bias, {name: g * mean for name, mean in means.items()}


weighted_terms.defvjp(_forward, _backward)
