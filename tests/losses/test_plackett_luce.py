import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rankclip_jax.losses import plackett_luce_nll
from rankclip_jax.losses.sorting import descending_order, one_zero, ordered_key
from tests.support import oracle

VALUE, GRADIENT = 1e-5, 1e-4  # what the loss promises, relative


@functools.partial(jax.jit, static_argnames=("decay", "top_k"))
def value_and_grad(scores, reference, **options):
    nll, vjp = jax.vjp(lambda s: plackett_luce_nll(s, reference, **options), scores)
    return nll, vjp(jnp.ones_like(nll))[0]


def check(scores, reference, **options):
    nll, grad = value_and_grad(scores, reference, **options)
    assert nll.dtype == jnp.float32
    for row in range(len(scores)):
        want, want_grad = oracle.nll(scores[row], reference[row], **options)
        assert oracle.relative(nll[row], want) < VALUE
        assert oracle.relative(grad[row], want_grad) < GRADIENT


@pytest.mark.parametrize(("n", "spread"), [(1, 1), (2, 1), (2, 30), (7, 100), (300, 1), (300, 100), (300, 1000)])
def test_equals_float64(n, spread):
    rng = np.random.default_rng(n)
    scores = rng.uniform(-spread, spread, (5, n)).astype(np.float32)
    _, same, opposed, _, _ = scores
    reference = [rng.normal(size=n), same, -opposed, np.round(rng.normal(size=n)), np.zeros(n)]
    check(scores, np.stack(reference).astype(np.float32))


@pytest.mark.parametrize("spread", [10, 1000])
def test_long_lists(spread):
    rng = np.random.default_rng(0)
    scores = rng.uniform(-spread, spread, (2, 4096)).astype(np.float32)
    check(scores, np.stack([scores[0], rng.normal(size=4096)]).astype(np.float32))


@pytest.mark.parametrize("options", [{"decay": "log"}, {"top_k": 1}, {"top_k": 9}, {"top_k": 9, "decay": "log"}])
@pytest.mark.parametrize("spread", [1, 100, 1000])
def test_decay_and_top_k(options, spread):
    rng = np.random.default_rng(1)
    scores = rng.uniform(-spread, spread, (3, 200)).astype(np.float32)
    check(scores, np.round(4 * rng.normal(size=(3, 200))).astype(np.float32), **options)


def test_top_k_of_the_whole_list_is_the_whole_list():
    rng = np.random.default_rng(2)
    scores, reference = rng.normal(size=(2, 4, 30)).astype(np.float32)
    np.testing.assert_array_equal(plackett_luce_nll(scores, reference, top_k=30), plackett_luce_nll(scores, reference))


def test_spelled_out():
    """Three items placed 2, 0, 1: two choices, then none."""
    s = np.array([0.5, -1.0, 2.0])
    want = np.log(np.exp(s).sum()) - s[2] + np.log(np.exp(s[0]) + np.exp(s[1])) - s[0]
    got = plackett_luce_nll(s.astype(np.float32), np.array([0.2, 0.1, 0.3], np.float32))
    assert got == pytest.approx(want, rel=1e-6)


def test_a_constant_row_is_log_factorial():
    n = 100
    nll, grad = value_and_grad(jnp.full((n,), 7.0), jnp.zeros(n))
    assert nll == pytest.approx(sum(np.log(k) for k in range(1, n + 1)), rel=1e-6)
    # Ties keep index order: item k competes in positions 0..k, each time with n - position others.
    want = [sum(1 / (n - p) for p in range(k + 1)) - 1 for k in range(n)]
    np.testing.assert_allclose(grad, want, atol=1e-6)


def test_nearly_certain_ranking_keeps_its_digits():
    """1e-13 is far below float32's 1 - eps, and still has to be right."""
    nll, grad = value_and_grad(jnp.array([30.0, 0.0]), jnp.array([1.0, 0.0]))
    assert nll == pytest.approx(np.log1p(np.exp(-30.0)), rel=1e-5)
    np.testing.assert_allclose(grad, [-np.exp(-30.0), np.exp(-30.0)], rtol=1e-5)


def test_equals_rax():
    rax = pytest.importorskip("rax")
    rng = np.random.default_rng(3)
    scores, reference = rng.normal(size=(2, 3, 20)).astype(np.float32) * 5

    def theirs(s):
        return rax.listmle_loss(s, reference, reduce_fn=jnp.sum)

    nll, grad = value_and_grad(scores, reference)
    assert float(theirs(scores)) == pytest.approx(float(nll.sum()), rel=1e-5)
    np.testing.assert_allclose(grad, jax.jit(jax.grad(theirs))(scores), rtol=1e-5, atol=1e-5)


def test_minus_one_is_a_score_like_any_other():
    """The reference code takes it for padding."""
    scores = np.array([[-1.0, -1.0, 0.5, -1.0]], np.float32)
    check(scores, scores[:, ::-1].copy())


def test_no_gradient_to_the_reference():
    rng = np.random.default_rng(4)
    scores, reference = rng.normal(size=(2, 3, 10)).astype(np.float32)
    grad = jax.grad(lambda r: plackett_luce_nll(scores, r).sum())(reference)
    np.testing.assert_array_equal(grad, np.zeros_like(reference))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_input_is_computed_in_float32(dtype):
    rng = np.random.default_rng(5)
    scores = jnp.asarray(rng.uniform(-100, 100, (2, 50)), dtype)
    reference = jnp.asarray(rng.normal(size=(2, 50)), dtype)
    nll, grad = value_and_grad(scores, reference)
    assert nll.dtype == jnp.float32
    assert grad.dtype == dtype
    for row in range(2):
        want, want_grad = oracle.nll(*(np.asarray(x[row], np.float32) for x in (scores, reference)))
        assert oracle.relative(nll[row], want) < VALUE
        assert oracle.relative(grad[row].astype(np.float32), want_grad) < float(jnp.finfo(dtype).eps)


def test_any_leading_axes_and_vmap_and_jit():
    rng = np.random.default_rng(6)
    scores, reference = rng.normal(size=(2, 2, 3, 8)).astype(np.float32)
    nll = jax.jit(plackett_luce_nll)(scores, reference)
    assert nll.shape == (2, 3)
    np.testing.assert_allclose(jax.jit(jax.vmap(plackett_luce_nll))(scores, reference), nll, rtol=1e-6)
    np.testing.assert_allclose(plackett_luce_nll(scores[1, 2], reference[1, 2]), nll[1, 2], rtol=1e-6)


def test_the_cotangent_scales_each_list():
    rng = np.random.default_rng(7)
    scores, reference = rng.normal(size=(2, 3, 8)).astype(np.float32)
    weights = jnp.array([2.0, 0.0, -1.0])
    plain = value_and_grad(scores, reference)[1]
    weighted = jax.jit(jax.grad(lambda s: (weights * plackett_luce_nll(s, reference)).sum()))(scores)
    np.testing.assert_allclose(weighted, weights[:, None] * plain, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    scores = np.array([[0.0, bad, 1.0], [0.0, 1.0, 2.0]], np.float32)
    nll = plackett_luce_nll(scores, np.array([[3.0, 2.0, 1.0]] * 2, np.float32))
    assert np.isnan(nll[0])
    assert np.isfinite(nll[1])


def test_second_derivative_says_that_there_is_none():
    scores, reference = jnp.arange(4.0), jnp.arange(4.0)

    def penalty(s):
        return jnp.sum(jax.grad(lambda t: plackett_luce_nll(t, reference))(s) ** 2)

    with pytest.raises(NotImplementedError, match="no second derivative"):
        jax.grad(penalty)(scores)


def test_errors():
    with pytest.raises(ValueError, match="one shape"):
        plackett_luce_nll(jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(ValueError, match="top_k=0"):
        plackett_luce_nll(jnp.zeros(3), jnp.zeros(3), top_k=0)
    with pytest.raises(ValueError, match="decay='linear'"):
        plackett_luce_nll(jnp.zeros(3), jnp.zeros(3), decay="linear")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_sort_gives_the_same_exact_order(platform):
    """The sorts chosen for the other backends run here too; only their speed differs."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(20, 257)).astype(np.float32) * np.float32(10.0) ** rng.integers(-38, 38, (20, 257))
    x[:4] = np.round(rng.normal(size=(4, 257)))
    x[4, ::3], x[4, 1::3] = 0.0, -0.0
    x[5, :7] = [np.inf, -np.inf, 0.0, -0.0, 3.4e38, -3.4e38, 1.0]
    x[np.abs(x) < np.finfo(np.float32).tiny] = 0  # XLA takes denormals for zeros
    want = np.argsort(-x.astype(np.float64), axis=1, kind="stable")
    np.testing.assert_array_equal(descending_order(x, platform), want)


def test_key_order_is_float_order():
    x = np.array([-np.inf, -3.4e38, -1.0, -1e-38, 0.0, 1e-38, 1.0, 3.4e38, np.inf], np.float32)
    assert np.all(np.diff(np.asarray(ordered_key(x)).astype(np.int64)) > 0)
    assert int(jax.jit(ordered_key)(jnp.float32(-0.0))) == int(ordered_key(jnp.float32(0.0)))
    assert not np.signbit(jax.jit(one_zero)(jnp.float32(-0.0)))


def test_host_sort_survives_many_devices_and_queued_steps():
    """jax.pure_callback hangs here: the callback's own arrays wait for threads that are busy in callbacks."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def body(x):
        def step(carry, shift):
            return carry + sum(descending_order(x * k, "cpu")[:, 0].sum() for k in (1, -1)), None

        total = lax.scan(step, 0, jnp.arange(3))[0]
        return lax.psum(total, "data")

    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=jax.sharding.PartitionSpec(), check_vma=False))
    x = np.random.default_rng(9).normal(size=(256, 2048)).astype(np.float32)
    totals = [f(x) for _ in range(4)]
    want = 3 * (x.argmax(1) + x.argmin(1)).sum()
    assert [int(t) for t in totals] == [want] * 4
