"""A list that is not finite has a loss of NaN, in one pass, and leaves the other lists alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankclip_jax.losses import OBJECTIVES, objective_loss, plackett_luce_nll, rank_consistency
from rankclip_jax.losses.plackett_luce import lists_nll
from rankclip_jax.parallel.mesh import make_mesh
from tests.support import oracle

BAD = [np.nan, np.inf, -np.inf]


@functools.partial(jax.jit, static_argnames=("decay", "top_k"))
def value_and_grad(scores, reference, **options):
    nll, vjp = jax.vjp(lambda s: plackett_luce_nll(s, reference, **options), scores)
    return nll, vjp(jnp.ones_like(nll))[0]


@pytest.mark.parametrize("options", [{}, {"decay": "log"}, {"top_k": 1}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("n", [2, 3, 33, 1000])
def test_a_bad_score_anywhere_spoils_its_own_list_alone(n, options):
    rng = np.random.default_rng(n)
    reference = rng.normal(size=(1, n)).astype(np.float32)
    order = np.argsort(-reference[0], kind="stable")
    # In the array and in the list: first, second, middle, last; with top_k both above and below the cut.
    places = sorted({0, 1, n // 2, n - 1, *order[[0, 1, n // 2, n - 1]]})
    scores = rng.normal(size=(3 * len(places) + 1, n)).astype(np.float32)
    scores[0] *= 30
    for row, (place, bad) in enumerate(((place, bad) for place in places for bad in BAD), 1):
        scores[row, place] = bad
    nll, grad = value_and_grad(scores, np.broadcast_to(reference, scores.shape), **options)
    assert np.isnan(nll[1:]).all() and np.isnan(grad[1:]).all()
    want, want_grad = oracle.nll(scores[0], reference[0], **options)
    assert oracle.relative(nll[0], want) < 1e-5 and oracle.relative(grad[0], want_grad) < 1e-4


@pytest.mark.parametrize("bad", BAD)
def test_a_list_of_nothing_else(bad):
    scores = np.full((2, 5), bad, np.float32)
    scores[1] = 1.0
    nll, grad = value_and_grad(scores, np.zeros((2, 5), np.float32))
    assert np.isnan(nll[0]) and np.isnan(grad[0]).all()
    assert nll[1] == pytest.approx(np.log(120), rel=1e-6) and np.isfinite(grad[1]).all()


def test_a_reference_of_nan_ranks_nothing_and_an_infinite_one_ranks_first_or_last():
    scores = np.stack([np.arange(4, dtype=np.float32)] * 3)
    nll, grad = value_and_grad(scores, np.float32([[0, np.nan, 1, 2], [0, np.inf, -np.inf, 1], [4, 9, 0, 5]]))
    assert np.isnan(nll[0]) and np.isnan(grad[0]).all()
    assert nll[1] == nll[2] and np.isfinite(nll[1])


def test_the_longest_list():
    scores = np.zeros((3, 32_768), np.float32)
    scores[0, 20_000], scores[1, -1] = np.nan, -np.inf
    nll, _ = value_and_grad(scores, np.zeros_like(scores))
    assert np.isnan(nll[:2]).all() and nll[2] == pytest.approx(np.sum(np.log(np.arange(1, 32_769.0))), rel=1e-6)


def test_scores_as_far_apart_as_float32_has_them():
    """Every pass places an item, however far apart they are: 40 items, 40 passes."""
    scores = np.linspace(-1.6e38, 1.6e38, 40, dtype=np.float32)
    nll, grad = value_and_grad(scores, scores)  # in their own order
    assert nll == 0 and (grad == 0).all()
    nll, grad = value_and_grad(scores, -scores)
    want, want_grad = oracle.nll(scores.astype(np.float64), -scores)
    assert np.isinf(np.float32(want)) == np.isinf(nll) and oracle.relative(grad, want_grad) < 1e-6


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.slow
def test_every_platforms_form(platform, released):
    scores = np.random.default_rng(0).normal(size=(4, 100)).astype(np.float32)
    scores[[0, 1, 2], [5, 50, 99]] = BAD
    nll, grad = lists_nll([(scores, jnp.zeros_like(scores))], None, None, platform, True, released)[0]
    assert np.isnan(nll[:3]).all() and np.isnan(grad[:3]).all()
    assert np.isfinite(nll[3]) and np.isfinite(grad[3]).all()


def test_under_vmap():
    scores = np.random.default_rng(1).normal(size=(3, 4, 50)).astype(np.float32)
    scores[1, 2, 7] = np.nan
    bad = np.isnan(jax.jit(jax.vmap(plackett_luce_nll))(scores, np.zeros_like(scores)))
    assert bad[1, 2] and bad.sum() == 1


def embeddings(batch=256, dim=16):
    rng = np.random.default_rng(2)
    z = rng.normal(size=(2, batch, dim)).astype(np.float32)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_nan_embedding_makes_the_loss_and_the_gradient_nan(objective, devices):
    z_img, z_txt = embeddings()
    z_img[17, 3] = np.nan
    mesh = make_mesh({"data": devices}, jax.devices()[:devices])

    def loss(z_img, z_txt):
        return objective_loss(z_img, z_txt, 30.0, objective=objective, mesh=mesh)[0]

    value, (d_img, _) = jax.jit(jax.value_and_grad(loss, (0, 1)))(z_img, z_txt)
    assert np.isnan(value) and np.isnan(d_img).any()


@pytest.mark.parametrize("bad", BAD)
def test_rank_consistency(bad):
    z_img, z_txt = embeddings(64)
    z_txt[-1, 0] = bad
    assert all(np.isnan(term) for term in jax.jit(rank_consistency)(z_img, z_txt, 14.0))
