"""The weighted sum of the terms over one batch, on one device or a mesh, with its gradient in closed form.

The backward pass only scales what the forward pass kept: two (B, D) arrays. Only the embeddings travel: two
all-gathers of (B, D) there, two reduce-scatters back, and one all-reduce of a few scalars.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from rankclip_jax.losses.chunked import Job, list_terms, local_terms
from rankclip_jax.losses.plackett_luce import first_order_only
from rankclip_jax.losses.sorting import by_platform
from rankclip_jax.losses.spec import RANK_TERMS, LossSpec


class Placement(NamedTuple):
    """Where the rows are and how many are taken at a time; hashable, as a static argument must be."""

    mesh: jax.sharding.Mesh | None = None
    axes: tuple[str, ...] = ()
    chunk: int | None = None


def _batch_terms(img_BxD, txt_BxD, scale, bias, weights, spec, place, with_grad):
    """Means of the terms over the batch; with_grad also the gradients of their weighted sum."""
    compute = functools.partial(_on_platform, spec=spec, place=place, with_grad=with_grad)
    return by_platform(compute, img_BxD, txt_BxD, scale, bias, weights)


def _on_platform(platform, img_BxD, txt_BxD, scale, bias, weights, spec, place, with_grad):
    batch, terms = img_BxD.shape[0], sorted(weights)
    listed = [term for term in terms if term in RANK_TERMS] if spec.list_size else []
    whole = [term for term in terms if term not in listed]

    def body(img_RxD, txt_RxD, scale, bias, weights):
        rows = columns = (img_RxD, txt_RxD)
        count, first_row = img_RxD.shape[0], 0
        reduce_sum = scatter = lambda x: x
        # Lists that lie within a device's rows need no others.
        apart = bool(listed) and count % spec.list_size == 0
        if place.mesh is not None:
            reduce_sum = functools.partial(lax.psum, axis_name=place.axes)
        if place.mesh is not None and (whole or not apart):
            columns = tuple(lax.all_gather(x, axis_name=place.axes, tiled=True) for x in rows)
            scatter = functools.partial(lax.psum_scatter, axis_name=place.axes, tiled=True)
            first_row = lax.axis_index(place.axes) * count

        def job(some):
            return Job(scale, bias, {term: weights[term] for term in some}, spec, platform, with_grad, place.chunk)

        found = [local_terms(rows, columns, first_row, job(whole))] if whole else []
        if listed:
            found.append(list_terms(rows, None if apart else columns, first_row, spec.list_size, job(listed)))
        sums = {term: value for part, _ in found for term, value in part.terms.items()}
        # One all-reduce for all scalars.
        d_scale, d_bias = (_total([getattr(part, name) for part, _ in found]) for name in ("d_scale", "d_bias"))
        scalars = jnp.stack([*(sums[name] for name in terms), d_scale, d_bias])
        *totals, d_scale, d_bias = reduce_sum(scalars) / batch
        means = dict(zip(terms, totals, strict=True))
        if not with_grad:
            return means

        def of_rows(i):
            of_all = [part.d_all[i] for part, _ in found if part.d_all]
            scattered = [scatter(_total(of_all))] if of_all else []
            return _total(scattered + [d_rows[i] for _, d_rows in found]) / batch

        return means, of_rows(0), of_rows(1), d_scale, d_bias

    if place.mesh is None:
        return body(img_BxD, txt_BxD, scale, bias, weights)
    by_row = P(place.axes)
    out_specs = (P(), by_row, by_row, P(), P()) if with_grad else P()
    # Gradients are made here by hand and never by differentiating through shard_map, so its replication check
    # has nothing to add.
    return jax.shard_map(
        body, mesh=place.mesh, in_specs=(by_row, by_row, P(), P(), P()), out_specs=out_specs, check_vma=False
    )(img_BxD, txt_BxD, scale, bias, weights)


def _total(arrays):
    return functools.reduce(jnp.add, arrays)


def _weighted(means, weights):
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
    return _weighted(means, weights), means


def _forward(img_BxD, txt_BxD, scale, bias, weights, spec, place):
    img_BxD, txt_BxD, scale, bias = (first_order_only(x) for x in (img_BxD, txt_BxD, scale, bias))
    found = _batch_terms(img_BxD, txt_BxD, scale, bias, weights, spec, place, with_grad=True)
    means, d_img, d_txt, d_scale, d_bias = found
    d_img, d_txt = d_img.astype(img_BxD.dtype), d_txt.astype(txt_BxD.dtype)
    return (_weighted(means, weights), means), (d_img, d_txt, d_scale, d_bias, means)


def _backward(spec, place, kept, cotangents):
    del spec, place
    d_img, d_txt, d_scale, d_bias, means = kept
    g, _ = cotangents
    d_img, d_txt = ((g * d).astype(d.dtype) for d in (d_img, d_txt))
    return d_img, d_txt, g * d_scale, g * d_bias, {name: g * mean for name, mean in means.items()}


weighted_terms.defvjp(_forward, _backward)
