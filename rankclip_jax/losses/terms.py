"""Each term of the objective on some rows of the score matrices: its sum over the rows, and its gradient.

A term looks at one pair of matrices: (image-image, text-text) or (image-text, text-image), R rows of B scores each.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rankclip_jax.losses.plackett_luce import lists_nll
from rankclip_jax.losses.spec import RANK_TERMS, LossSpec


class Rows(NamedTuple):
    """A term on R rows: the sum of its rows' losses, gradients of it (None: zero, or not asked for).

    Attributes:
      loss: float32 scalar.
      grad_a, grad_b: (R, B), with respect to the first and the second matrix.
      grad_bias: with respect to the bias.
    """

    loss: jax.Array
    grad_a: jax.Array | None = None
    grad_b: jax.Array | None = None
    grad_bias: jax.Array | float = 0.0


def row_terms(
    pairs: Mapping[str, tuple[jax.Array, jax.Array]],
    bias: jax.Array,
    labels_R: jax.Array,
    spec: LossSpec,
    platform: str,
    with_grad: bool,
) -> dict[str, Rows]:
    """The terms {name of spec.MATRICES: its two matrices, (R, B)}; labels_R are the columns of the rows' own items."""
    ranking = {name: pair for name, pair in pairs.items() if name in RANK_TERMS}
    others = {name: pair for name, pair in pairs.items() if name not in RANK_TERMS}
    found = {name: _row_term(name, *pair, bias, labels_R, with_grad) for name, pair in others.items()}
    return found | (_rank_terms(ranking, labels_R, spec, platform, with_grad) if ranking else {})


def _row_term(name, a_RxB, b_RxB, bias, labels_R, with_grad):
    if name == "clip":
        (loss_a, grad_a), (loss_b, grad_b) = (_cross_entropy(x, labels_R, with_grad) for x in (a_RxB, b_RxB))
        return Rows((loss_a + loss_b) / 2, *((grad_a / 2, grad_b / 2) if with_grad else ()))
    if name == "siglip":
        return _siglip(a_RxB, bias, labels_R, with_grad)
    difference = a_RxB - b_RxB  # cyclic
    return Rows(jnp.sum(jnp.square(difference)), *((2 * difference, -2 * difference) if with_grad else ()))


def _rank_terms(pairs, labels_R, spec, platform, with_grad):
    """Both directions of each ranking term: the rows' mean nll, summed (scalar), and the gradients of a and b."""
    without_self = {name for name in pairs if name == "in_modal" and not spec.keep_self}
    lists = []
    for name, pair in pairs.items():
        a, b = (_drop_self(x, labels_R) for x in pair) if name in without_self else pair
        if a.shape[1]:
            lists += [(a, b), (b, a)]
    results = iter(lists_nll(lists, spec.decay, spec.top_k, platform, with_grad, spec.form == "released"))
    found = {}
    for name, (a_RxB, _) in pairs.items():
        n = a_RxB.shape[1] - (name in without_self)
        if n == 0:
            found[name] = Rows(jnp.zeros((), jnp.float32), *([jnp.zeros_like(a_RxB)] * 2 if with_grad else []))
            continue
        kept = n if spec.top_k is None else min(spec.top_k, n)
        loss, grads = 0.0, []
        for nll, grad in (next(results), next(results)):
            loss += jnp.sum(nll) / (2 * kept)
            if with_grad:
                grad /= 2 * kept
                grads.append(_restore_self(grad, labels_R) if name in without_self else grad)
        found[name] = Rows(loss, *grads)
    return found


def _is_pair(x_RxB, labels_R):
    return lax.broadcasted_iota(jnp.int32, x_RxB.shape, 1) == labels_R[:, None]


def _cross_entropy(logits_RxB, labels_R, with_grad):
    """Summed cross-entropy of the rows against their own pairs, exact also when it is nearly zero."""
    is_pair = _is_pair(logits_RxB, labels_R)
    positive = jnp.sum(jnp.where(is_pair, logits_RxB, 0.0), axis=1)
    others = jnp.where(is_pair, -jnp.inf, logits_RxB)
    others_lse = jax.nn.logsumexp(others, axis=1)
    loss = jnp.sum(jax.nn.softplus(others_lse - positive))
    if not with_grad:
        return loss, None
    pair_grad = -jax.nn.sigmoid(others_lse - positive)[:, None]
    log_total = jnp.logaddexp(others_lse, positive)[:, None]
    return loss, jnp.where(is_pair, pair_grad, jnp.exp(others - log_total))


def _siglip(logits_RxB, bias, labels_R, with_grad):
    """-log sigmoid of +(score + bias) for the pair and of -(score + bias) for the others (Zhai et al., 2023, eq. 1)."""
    signed = jnp.where(_is_pair(logits_RxB, labels_R), -1.0, 1.0)
    wrong = signed * (logits_RxB + bias)
    loss = jnp.sum(jax.nn.softplus(wrong))
    if not with_grad:
        return Rows(loss)
    grad = signed * jax.nn.sigmoid(wrong)
    return Rows(loss, grad, None, jnp.sum(grad))


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
