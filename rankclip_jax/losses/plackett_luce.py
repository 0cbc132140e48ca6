"""The Plackett-Luce negative log-likelihood of a ranking, exact in float32, with its closed-form gradient.

Placing items 1..n in the order of `reference`, the loss of position k is log(sum_{j>=k} exp(s_j)) - s_k.
A suffix sum of exponentials never cancels, so one cumulative sum is exact wherever it neither overflows nor
underflows: in units of e^-70 float32 holds exp(y) with all its bits for y in [-130, 0]. Lists whose scores
spread over more than 130 take another pass over what is left, anchored at its largest score (cosines times
100: two at most). That replaces a scan of logaddexp, which is some 30 times as slow, and loses nothing.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rankclip_jax.losses.sorting import by_platform, ranked, ranked_top

_UNIT = 2.0**101  # the anchor's exponential, e^70; a power of two, so that scaling by it rounds nothing
_SMALLEST = math.exp(-60.0)
_RELEASED_EPS = 1e-10  # inside the logarithm of the authors' code


def position_weights(n: int, decay: str | None) -> jax.Array:
    """(n,) float32 weights of the list positions: 1, or 1 / log(k + 1) with k from 1 for decay="log"."""
    if decay is None:
        return jnp.ones((n,), jnp.float32)
    if decay == "log":
        return 1.0 / jnp.log(jnp.arange(2, n + 2, dtype=jnp.float32))
    raise ValueError(f'decay={decay!r}. Expected None or "log"')


# Items of a block of a cumulative sum by a triangular matmul. For a million on 2 CPU cores it takes 0.7 ms, lax.cumsum
# 3.2 ms. On TPU, 128 lists of 32,768: 0.14 million cycles of the compiler's against 2.0 million.
_BLOCK = {"cpu": 32, "tpu": 128}


def _cumsum(x_RxN: jax.Array, platform: str, reverse: bool = False) -> jax.Array:
    """Cumulative sums of non-negative rows."""
    if platform not in _BLOCK:
        return lax.cumsum(x_RxN, axis=1, reverse=reverse)
    # In blocks, then over the blocks: no less exact than one by one, since nothing here is negative.
    (rows, n), block = x_RxN.shape, _BLOCK[platform]
    blocks = -(-n // block)
    padded = jnp.pad(x_RxN, ((0, 0), (0, blocks * block - n))).reshape(rows * blocks, block)
    triangle = jnp.triu(jnp.ones((block, block), jnp.float32))
    within = jnp.matmul(padded, triangle.T if reverse else triangle, precision=lax.Precision.HIGHEST)
    within = within.reshape(rows, blocks, block)
    total = within[:, :, 0 if reverse else -1]
    before = _shift(lax.cumsum(total, axis=1, reverse=reverse), left=reverse)
    return (within + before[:, :, None]).reshape(rows, blocks * block)[:, :n]


def _shift(x_RxN: jax.Array, left: bool) -> jax.Array:
    """Rows moved by one place, a zero coming in."""
    zero = jnp.zeros_like(x_RxN[:, :1])
    return jnp.concatenate([x_RxN[:, 1:], zero] if left else [zero, x_RxN[:, :-1]], axis=1)


def _sorted_nlls(lists: list[tuple], platform: str, with_grad: bool) -> list[tuple]:
    """(loss (R,), gradient (R, N)) of each (scores (R, N), weights (N,)) that already stands in its order."""

    def one_pass(states):
        return [_place(*one, *state, platform, with_grad) for one, state in zip(lists, states, strict=True)]

    states = []
    for scores_RxN, _ in lists:
        top = jnp.max(scores_RxN, axis=1, keepdims=True)
        grad = jnp.zeros_like(scores_RxN) if with_grad else jnp.zeros((), jnp.float32)
        states.append((top, jnp.ones(scores_RxN.shape, bool), jnp.zeros(scores_RxN.shape[:1], jnp.float32), grad))
    if platform == "gpu":
        # Out of the loop, the first pass needs no zeros to start with, which would be copied into the loop.
        states = one_pass(states)
    states = lax.while_loop(
        lambda states: jnp.any(jnp.stack([jnp.any(jnp.isfinite(anchor)) for anchor, *_ in states])),
        one_pass,
        states,
    )
    return [(nll, grad if with_grad else None) for _, _, nll, grad in states]


def _place(scores_RxN, weights_N, anchor_Rx1, pending_RxN, nll_R, grad_RxN, platform, with_grad):
    """One pass: what the items add that the anchor lets float32 hold, and the anchor of those still pending."""
    # The anchor is one of the scores, so that those near it lose no bits in the difference.
    y = scores_RxN - jnp.where(jnp.isfinite(anchor_Rx1), anchor_Rx1, 0.0)
    root = jnp.exp(jnp.minimum(y, 0.0) / 2)  # larger ones have been placed already and must not overflow
    e = (root * 2.0**50) * (root * 2.0**51)  # exp(y) * _UNIT: float32 has no exp(-130), but its root
    suffix_sum = _cumsum(e, platform, reverse=True)
    placed = pending_RxN & (suffix_sum >= _SMALLEST)
    weight = jnp.where(placed, weights_N, 0.0)
    later_sum = jnp.where(placed, _shift(suffix_sum, left=True), 0.0)
    suffix_sum = jnp.where(placed, suffix_sum, 1.0)
    # The probability that a later item takes this position. Both uses below keep all bits when it is small,
    # where log(suffix sum) - y and softmax - 1 would cancel to nothing.
    p_later = later_sum / suffix_sum
    large = suffix_sum > 1.0
    log_sum = jnp.log(jnp.where(large, suffix_sum / _UNIT, suffix_sum)) - jnp.where(large, 0.0, math.log(_UNIT))
    nll_k = jnp.where(p_later < 0.5, -jnp.log1p(-jnp.minimum(p_later, 0.5)), log_sum - y)
    nll_R += jnp.sum(jnp.where(placed, weight * nll_k, 0.0), axis=1)
    if with_grad:
        # d nll / d s_i = sum_{k < i} w_k e_i / S_k  -  w_i p_later_i
        earlier = _shift(_cumsum(weight / suffix_sum, platform), left=False)
        grad_RxN += e * earlier - weight * p_later
    pending_RxN &= ~placed
    next_anchor = jnp.max(jnp.where(pending_RxN, scores_RxN, -jnp.inf), axis=1, keepdims=True)
    return next_anchor, pending_RxN, nll_R, grad_RxN


@jax.custom_jvp
def first_order_only(x: jax.Array) -> jax.Array:
    """The identity; differentiating it says why there is no second derivative.

    It guards what the forward rules compute, which is differentiated only for a derivative of the gradient.
    """
    return x


@first_order_only.defjvp
def _no_second_order(primals, tangents):
    del primals, tangents
    raise NotImplementedError(
        "the losses of rankclip_jax have a closed-form gradient and no second derivative: a gradient penalty "
        "or a Hessian through them is not supported; put jax.lax.stop_gradient around the inner gradient"
    )


def _released_nll(scores_RxN: jax.Array, weights_N: jax.Array, platform: str, with_grad: bool) -> tuple:
    """As one of _sorted_nlls, but as the authors' code has it: float32 log(sum + 1e-10), right up to a spread of 20.

    Its gradient is what autograd makes of that code, the maximum that it subtracts included.
    """
    top = jnp.max(scores_RxN, axis=1, keepdims=True)
    e = jnp.exp(scores_RxN - top)
    suffix_sum = _cumsum(e, platform, reverse=True) + _RELEASED_EPS
    nll = jnp.sum(weights_N * (jnp.log(suffix_sum) - (scores_RxN - top)), axis=1)
    if not with_grad:
        return nll, None
    grad = e * _cumsum(weights_N / suffix_sum, platform) - weights_N
    is_top = lax.broadcasted_iota(jnp.int32, grad.shape, 1) == jnp.argmax(scores_RxN, axis=1)[:, None]
    return nll, grad - jnp.where(is_top, jnp.sum(grad, axis=1, keepdims=True), 0.0)


def lists_nll(
    lists: Sequence[tuple[jax.Array, jax.Array]],
    decay: str | None,
    top_k: int | None,
    platform: str,
    with_grad: bool,
    released: bool = False,
) -> list[tuple[jax.Array, jax.Array | None]]:
    """(loss (R,), gradient with respect to the scores (R, N)) of each (scores, reference), (R, N) float32.

    A list with a score that is NaN or infinite, or a reference that is NaN, has a loss and gradient of NaN.

    Args:
      decay, top_k: as `plackett_luce_nll`.
      platform: "cpu", "gpu" or "tpu", where it will run.
      with_grad: False returns None for the gradient and does not compute it.
      released: as the authors' code does.
    """
    opened = [_open_list(*pair, decay, top_k, platform) for pair in lists]
    in_order = [one.in_order for one in opened]
    if released:
        found = [_released_nll(scores, weights, platform, with_grad) for scores, weights in in_order]
    elif platform == "gpu" and lists:  # where the host waits for each loop that a value ends: one for all
        found = _sorted_nlls(in_order, platform, with_grad)
    else:
        found = [_sorted_nlls([one], platform, with_grad)[0] for one in in_order]
    return [one.close(*result) for one, result in zip(opened, found, strict=True)]


class _Opened(NamedTuple):
    """Lists in their order: (scores, weights), and what takes their loss and gradient (or None) back."""

    in_order: tuple[jax.Array, jax.Array]
    close: Callable


def _open_list(scores_RxN, reference_RxN, decay, top_k, platform):
    n = scores_RxN.shape[1]
    weights_N = position_weights(n, decay)
    # Lists that are not finite are found here and not by the loop, whose passes end when each item has been placed: no
    # comparison with NaN places any, and XLA's maximum on CPU drops NaN.
    good_Rx1 = jnp.all(jnp.isfinite(scores_RxN) & ~jnp.isnan(reference_RxN), axis=1, keepdims=True)
    scores_RxN = jnp.where(good_Rx1, scores_RxN, 0.0)

    def opened(in_order, weights, back):
        def close(nll, grad):
            nll = jnp.where(good_Rx1[:, 0], nll, jnp.nan)
            return nll, None if grad is None else jnp.where(good_Rx1, back(grad), jnp.nan)

        return _Opened((in_order, weights), close)

    if top_k is None or top_k >= n:
        in_order, back = ranked(scores_RxN, reference_RxN, platform)
        return opened(in_order, weights_N, back)
    # The items below the cut only appear as a sum, so they enter as one item of weight 0: their logsumexp.
    placed, below, back = ranked_top(scores_RxN, reference_RxN, top_k, platform)
    below_lse = jax.nn.logsumexp(below, axis=1, keepdims=True)
    return opened(
        jnp.concatenate([placed, below_lse], axis=1),
        jnp.append(weights_N[:top_k], 0.0),
        lambda grad: back(grad[:, :-1], jnp.exp(below - below_lse) * grad[:, -1:]),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _nll(scores, reference, decay, top_k):
    return _flat_nll(scores, reference, decay, top_k, with_grad=False)[0]


def _flat_nll(scores, reference, decay, top_k, with_grad):
    n = scores.shape[-1]
    if n == 0:
        return jnp.zeros(scores.shape[:-1], jnp.float32), scores
    nll, grad = by_platform(
        lambda platform, *pair: lists_nll([pair], decay, top_k, platform, with_grad)[0],
        *(x.reshape(-1, n).astype(jnp.float32) for x in (scores, reference)),
    )
    nll = nll.reshape(scores.shape[:-1])
    return nll, grad.reshape(scores.shape).astype(scores.dtype) if with_grad else None


def _nll_forward(scores, reference, decay, top_k):
    return _flat_nll(first_order_only(scores), reference, decay, top_k, with_grad=True)


def _nll_backward(decay, top_k, grad, cotangent):
    del decay, top_k
    return (cotangent[..., None] * grad).astype(grad.dtype), None


_nll.defvjp(_nll_forward, _nll_backward)


def plackett_luce_nll(
    scores: jax.Array, reference: jax.Array, *, decay: str | None = None, top_k: int | None = None
) -> jax.Array:
    """Negative log-likelihood, under Plackett-Luce, of the ranking that `reference` gives.

    This is ListMLE (Xia et al., 2008). Items are placed in descending order of `reference`; ties keep index
    order. Each position costs logsumexp(scores of the items not yet placed) - score of the item placed.

    Args:
      scores: (..., n) floating; computed in float32 whatever comes in.
      reference: (..., n) floating, same shape; no gradient flows to it.
      decay: None, or "log" to weight position k (from 1) by 1 / log(k + 1).
      top_k: keep the first k positions; the remaining items stay in the sums.

    Returns:
      (...) float32, in nats: the sum over list positions. Not averaged.

    Raises:
      ValueError: shapes differ, decay is unknown, or top_k is below 1.
    """
    scores, reference = jnp.asarray(scores), jnp.asarray(reference)
    if scores.shape != reference.shape or scores.ndim == 0:
        raise ValueError(f"scores {scores.shape} and reference {reference.shape} must have one shape (..., n)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: it must be at least 1, or None for the whole list")
    return _nll(scores, lax.stop_gradient(reference), decay, top_k)
