"""Every term of the objective over one batch, with its gradient, in row chunks and over a mesh.

The similarities of a batch are four B x B matrices: image-image, text-text, image-text, text-image. None is
ever held whole: a device takes its own rows, a chunk at a time, and has the loss and the gradient of a chunk
before it starts the next (the gradients are in closed form, so the backward pass only scales what the forward
pass kept: two (B, D) arrays). Only the embeddings travel: two all-gathers of (B, D) there, two
reduce-scatters back, and one all-reduce of a few scalars.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from rankclip_jax.losses.plackett_luce import first_order_only, list_nll, position_weights

# Scores err by scale * eps, so at logit scale 100 anything below full float32 products (TF32, one or three
# bfloat16 passes) would break the 1e-5 that the loss promises. bfloat16 embeddings multiply exactly as is.
_PRECISION = lax.Precision.HIGHEST


class Plan(NamedTuple):
    """What is static about the computation; hashable, so that it can be a custom_vjp's nondiff argument."""

    terms: tuple[str, ...]  # of "clip", "in_modal", "cross_modal"
    decay: str | None
    top_k: int | None
    keep_self: bool
    chunk: int | None
    mesh: jax.sharding.Mesh | None
    axes: tuple[str, ...]

    @property
    def platform(self):
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform


def _scores(rows_RxD, all_BxD):
    return jnp.matmul(rows_RxD, all_BxD.T, precision=_PRECISION, preferred_element_type=jnp.float32)


def _mix(grad_RxB, all_BxD, platform):
    # The gradient promises 1e-4. Three bfloat16 passes (HIGH on TPU) err by 4e-6 and halve the time of six; on
    # GPU HIGH means TF32, which errs by 3e-4. Norm-wise, on random matrices of 2,048 terms, emulated in NumPy.
    precision = lax.Precision.HIGH if platform == "tpu" else lax.Precision.HIGHEST
    return jnp.matmul(grad_RxB, all_BxD.astype(jnp.float32), precision=precision)


def _contrastive(logits_RxB, labels_R, with_grad):
    """Cross-entropy (R,) of each row against its own pair, exact also when it is nearly zero."""
    is_pair = lax.broadcasted_iota(jnp.int32, logits_RxB.shape, 1) == labels_R[:, None]
    positive = jnp.sum(jnp.where(is_pair, logits_RxB, 0.0), axis=1)
    others = jnp.where(is_pair, -jnp.inf, logits_RxB)
    others_lse = jax.nn.logsumexp(others, axis=1)
    loss = jax.nn.softplus(others_lse - positive)
    if not with_grad:
        return loss, None
    pair_grad = -jax.nn.sigmoid(others_lse - positive)[:, None]
    log_total = jnp.logaddexp(others_lse, positive)[:, None]
    return loss, jnp.where(is_pair, pair_grad, jnp.exp(others - log_total))


def _drop_self(x_RxB, labels_R):
    """(R, B) -> (R, B - 1): each row without its own item, the rest in their order."""
    column = lax.broadcasted_iota(jnp.int32, (x_RxB.shape[0], x_RxB.shape[1] - 1), 1)
    return jnp.where(column < labels_R[:, None], x_RxB[:, :-1], x_RxB[:, 1:])


def _restore_self(grad_RxM, labels_R):
    """The transpose of _drop_self: zero for the item itself."""
    zero = jnp.zeros((grad_RxM.shape[0], 1), jnp.float32)
    before, after = jnp.concatenate([grad_RxM, zero], 1), jnp.concatenate([zero, grad_RxM], 1)
    column = lax.broadcasted_iota(jnp.int32, before.shape, 1)
    label = labels_R[:, None]
    return jnp.where(column < label, before, jnp.where(column > label, after, 0.0))


def _rank_pair(a_RxN, b_RxN, plan: Plan, with_grad):
    """Both directions of one term: the rows' mean nll, summed (scalar), and the gradients of a and b."""
    n = a_RxN.shape[1]
    weights = position_weights(n, plan.decay)
    kept = max(1, n if plan.top_k is None else min(plan.top_k, n))
    loss, grads = 0.0, []
    for scores, reference in ((a_RxN, b_RxN), (b_RxN, a_RxN)):
        nll, grad = list_nll(scores, reference, weights, plan.top_k, plan.platform, with_grad)
        loss += jnp.sum(nll) / (2 * kept)
        grads.append(grad / (2 * kept) if with_grad else None)
    return loss, grads


def _chunk_terms(img_RxD, txt_RxD, img_BxD, txt_BxD, scale, weights, labels_R, plan: Plan, with_grad):
    """Sums over one chunk of rows: {term: scalar}; and the weighted gradients of the four score matrices."""
    sums, g = {}, dict.fromkeys(("ii", "tt", "it", "ti"))

    def add(name, weight, grad):
        g[name] = weight * grad if g[name] is None else g[name] + weight * grad

    if "in_modal" in plan.terms:
        ii, tt = scale * _scores(img_RxD, img_BxD), scale * _scores(txt_RxD, txt_BxD)
        if not plan.keep_self:
            ii, tt = _drop_self(ii, labels_R), _drop_self(tt, labels_R)
        sums["in_modal"], grads = _rank_pair(ii, tt, plan, with_grad)
        if with_grad:
            for name, grad in zip(("ii", "tt"), grads, strict=True):
                add(name, weights["in_modal"], grad if plan.keep_self else _restore_self(grad, labels_R))
    if "clip" in plan.terms or "cross_modal" in plan.terms:
        it, ti = scale * _scores(img_RxD, txt_BxD), scale * _scores(txt_RxD, img_BxD)
        if "cross_modal" in plan.terms:
            sums["cross_modal"], grads = _rank_pair(it, ti, plan, with_grad)
            if with_grad:
                for name, grad in zip(("it", "ti"), grads, strict=True):
                    add(name, weights["cross_modal"], grad)
        if "clip" in plan.terms:
            (loss_it, grad_it), (loss_ti, grad_ti) = (_contrastive(x, labels_R, with_grad) for x in (it, ti))
            sums["clip"] = (jnp.sum(loss_it) + jnp.sum(loss_ti)) / 2
            if with_grad:
                add("it", weights["clip"] / 2, grad_it)
                add("ti", weights["clip"] / 2, grad_ti)
    return sums, g


def _chunk_size(rows: int, batch: int, platform: str) -> int:
    """Rows at a time: half a million scores a matrix on CPU, near the cache; eight million elsewhere.

    At least 64 rows, below which adding up the (B, D) gradients of the chunks costs more than they do.
    """
    return min(rows, max(64, (1 << (19 if platform == "cpu" else 23)) // batch))


def _local_terms(img_RxD, txt_RxD, img_BxD, txt_BxD, scale, weights, first_row, plan: Plan, with_grad):
    """Sums of the terms over this device's rows; gradients of its rows, of all embeddings, of the scale."""
    rows, batch = img_RxD.shape[0], img_BxD.shape[0]
    chunk = min(rows, plan.chunk or _chunk_size(rows, batch, plan.platform))

    def one_chunk(carry, first, img_CxD, txt_CxD):
        sums, d_img_all, d_txt_all, d_scale = carry
        labels = first_row + first + jnp.arange(img_CxD.shape[0], dtype=jnp.int32)
        new, g = _chunk_terms(img_CxD, txt_CxD, img_BxD, txt_BxD, scale, weights, labels, plan, with_grad)
        sums = {name: sums[name] + new[name] for name in sums}
        if not with_grad:
            return (sums, d_img_all, d_txt_all, d_scale), None
        d_rows = {"i": jnp.zeros(img_CxD.shape, jnp.float32), "t": jnp.zeros(txt_CxD.shape, jnp.float32)}
        d_all = {"i": d_img_all, "t": d_txt_all}
        row, col = {"i": img_CxD, "t": txt_CxD}, {"i": img_BxD, "t": txt_BxD}
        for name, grad in g.items():
            if grad is not None:
                a, b = name
                d_rows[a] += _mix(grad, col[b], plan.platform)
                d_all[b] += scale * _mix(grad.T, row[a], plan.platform)
        # <row, d score / d row> summed is the gradient of the scale; it saves a pass over the scores.
        d_scale += jnp.sum(d_rows["i"] * img_CxD) + jnp.sum(d_rows["t"] * txt_CxD)
        return (sums, d_all["i"], d_all["t"], d_scale), (scale * d_rows["i"], scale * d_rows["t"])

    zero = jnp.zeros((), jnp.float32)
    zeros_BxD = jnp.zeros(img_BxD.shape if with_grad else (), jnp.float32)
    carry = ({name: zero for name in plan.terms}, zeros_BxD, zeros_BxD, zero)
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


def _batch_terms(img_BxD, txt_BxD, scale, weights, plan: Plan, with_grad):
    """Means of the terms over the batch; with_grad also the gradients of their weighted sum."""
    batch = img_BxD.shape[0]

    def body(img_RxD, txt_RxD, scale, weights):
        if plan.mesh is None:
            gather = reduce_sum = scatter = lambda x: x
            first_row = 0
        else:
            gather = functools.partial(lax.all_gather, axis_name=plan.axes, tiled=True)
            scatter = functools.partial(lax.psum_scatter, axis_name=plan.axes, tiled=True)
            reduce_sum = functools.partial(lax.psum, axis_name=plan.axes)
            first_row = lax.axis_index(plan.axes) * img_RxD.shape[0]
        (sums, d_img_all, d_txt_all, d_scale), d_rows = _local_terms(
            img_RxD, txt_RxD, gather(img_RxD), gather(txt_RxD), scale, weights, first_row, plan, with_grad
        )
        # One all-reduce for all scalars.
        *totals, d_scale = reduce_sum(jnp.stack([*(sums[name] for name in plan.terms), d_scale])) / batch
        means = dict(zip(plan.terms, totals, strict=True))
        if not with_grad:
            return means
        d_img, d_txt = ((scatter(a) + r) / batch for a, r in zip((d_img_all, d_txt_all), d_rows, strict=True))
        return means, d_img, d_txt, d_scale

    if plan.mesh is None:
        return body(img_BxD, txt_BxD, scale, weights)
    by_row = P(plan.axes)
    out_specs = (P(), by_row, by_row, P()) if with_grad else P()
    # Gradients are made here by hand and never by differentiating through shard_map, so its replication check
    # has nothing to add.
    return jax.shard_map(
        body, mesh=plan.mesh, in_specs=(by_row, by_row, P(), P()), out_specs=out_specs, check_vma=False
    )(img_BxD, txt_BxD, scale, weights)


def _total(means, weights):
    return sum(weights[name] * means[name] for name in means)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_terms(img_BxD, txt_BxD, scale, weights, plan: Plan):
    """-> (sum of weights[name] * means[name], means). Only the sum carries gradient."""
    means = _batch_terms(img_BxD, txt_BxD, scale, weights, plan, with_grad=False)
    return _total(means, weights), means


def _forward(img_BxD, txt_BxD, scale, weights, plan):
    img_BxD, txt_BxD, scale = (first_order_only(x) for x in (img_BxD, txt_BxD, scale))
    means, d_img, d_txt, d_scale = _batch_terms(img_BxD, txt_BxD, scale, weights, plan, with_grad=True)
    d_img, d_txt = d_img.astype(img_BxD.dtype), d_txt.astype(txt_BxD.dtype)
    return (_total(means, weights), means), (d_img, d_txt, d_scale, means)


def _backward(plan, kept, cotangents):
    del plan
    d_img, d_txt, d_scale, means = kept
    g, _ = cotangents
    d_img, d_txt = ((g * d).astype(d.dtype) for d in (d_img, d_txt))
    return d_img, d_txt, g * d_scale, {name: g * mean for name, mean in means.items()}


weighted_terms.defvjp(_forward, _backward)
