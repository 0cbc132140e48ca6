"""Lists of G items: the ranking terms within groups of G consecutive rows, the contrastive term over the batch."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rankclip_jax.config import complete
from rankclip_jax.losses import LossSpec, clip_loss, objective_loss, rank_consistency
from rankclip_jax.train import step as steps
from tests.losses.test_chunked import collectives, embeddings


def both(terms):
    return terms.in_modal + 2 * terms.cross_modal


@functools.partial(jax.jit, static_argnames=("size", "options"))
def by_the_group(img, txt, scale, size, options):
    """Mean over the groups of in-modal + 2 cross-modal of each alone: value and gradients."""

    def alone(img, txt, scale):
        groups = [z.reshape(-1, size, z.shape[1]) for z in (img, txt)]
        return jax.lax.map(lambda group: both(rank_consistency(*group, scale, **dict(options))), groups).mean()

    return jax.value_and_grad(alone, (0, 1, 2))(img, txt, scale)


@functools.cache
def contrastive():
    return jax.jit(jax.value_and_grad(clip_loss, (0, 1, 2)))(*embeddings(64), 20.0)


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def on_mesh(shape, batch):
    names = ("data", "fsdp")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)
    return mesh, [jax.device_put(z, NamedSharding(mesh, PartitionSpec(names))) for z in embeddings(batch)]


# Devices' rows hold several groups, one, a part of one, or (24 rows, 4 devices) parts of two.
@pytest.mark.parametrize(
    ("batch", "size", "shape", "chunk"),
    [
        (24, 4, None, None),
        pytest.param(24, 4, None, 3, marks=pytest.mark.slow),
        (24, 4, (2, 3), None),
        pytest.param(64, 4, (2, 4), None, marks=pytest.mark.slow),
        pytest.param(64, 16, (8,), 3, marks=pytest.mark.slow),
        (24, 4, (4,), None),
    ],
)
def test_equals_the_loss_of_each_group(batch, size, shape, chunk):
    img, txt = embeddings(batch)
    options = (("keep_self", False), ("decay", "log"))
    want = by_the_group(img, txt, 30.0, size, options)
    mesh = None
    if shape:
        mesh, (img, txt) = on_mesh(shape, batch)

    def found(*z):
        return both(rank_consistency(*z, list_size=size, mesh=mesh, chunk=chunk, **dict(options)))

    close(jax.jit(jax.value_and_grad(found, (0, 1, 2)))(img, txt, 30.0), want)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "shape"), [((("top_k", 3),), None), ((("form", "released"),), (8,))])
def test_every_form(options, shape):
    img, txt = embeddings(32)
    want = by_the_group(img, txt, 14.0, 8, options)
    mesh = None
    if shape:
        mesh, (img, txt) = on_mesh(shape, 32)
    got = jax.jit(lambda *z: rank_consistency(*z, list_size=8, mesh=mesh, **dict(options)))(img, txt, 14.0)
    np.testing.assert_allclose(both(got), want[0], rtol=2e-5)


@pytest.mark.parametrize(
    ("size", "shape"), [(16, (8,)), *(pytest.param(4, shape, marks=pytest.mark.slow) for shape in (None, (8,)))]
)
def test_the_contrastive_term_sees_the_whole_batch(size, shape):
    img, txt = embeddings(64)
    clip = contrastive()
    want = jax.tree.map(lambda c, r: c + 1.5 * 0.25 * r, clip, by_the_group(img, txt, 20.0, size, ()))
    mesh = None
    if shape:
        mesh, (img, txt) = on_mesh(shape, 64)

    def loss(*z):
        options = dict(rank_weight=1.5, lambda_in=0.25, lambda_cross=0.5, list_size=size, mesh=mesh)
        return objective_loss(*z, **options)

    (value, parts), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(img, txt, 20.0)
    close((value, grads), want)
    assert float(parts["clip"]) == pytest.approx(float(clip[0]), rel=1e-5)


def test_one_list_is_the_whole_batch():
    img, txt = embeddings(40)
    one, whole = (jax.jit(functools.partial(rank_consistency, list_size=size))(img, txt, 30.0) for size in (40, None))
    np.testing.assert_array_equal(one, whole)


@pytest.mark.parametrize(("size", "gathers"), [(8, 0), (4, 0), (16, 2)])
def test_nothing_is_gathered_where_devices_hold_whole_groups(size, gathers):
    mesh, (img, txt) = on_mesh((8,), 64)
    f = jax.jit(
        jax.value_and_grad(lambda *a: objective_loss(*a, objective="rank", list_size=size, mesh=mesh)[0], (0, 1))
    )
    moved = [kind for kind, _ in collectives(f.lower(img, txt, 30.0).compile())]
    assert sorted(moved) == ["all-gather"] * gathers + ["all-reduce"] + ["reduce-scatter"] * gathers


def test_memory_is_that_of_the_groups():
    def temporary(batch, list_size):
        z = jax.ShapeDtypeStruct((batch, 32), np.float32)
        f = jax.grad(lambda a, b: objective_loss(a, b, 1.0, objective="rank", list_size=list_size)[0], (0, 1))
        return jax.jit(f).lower(z, z).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16_384, 64) < 16_384**2 * 4 / 8


def test_a_nan_spoils_the_loss():
    img, txt = embeddings(16)
    img[3, 0] = np.nan
    assert np.isnan(jax.jit(functools.partial(rank_consistency, list_size=4))(img, txt, 10.0)).all()


def test_errors():
    img, txt = embeddings(12)
    with pytest.raises(ValueError, match="list_size=5 does not divide the batch of 12"):
        rank_consistency(img, txt, 1.0, list_size=5)
    with pytest.raises(ValueError, match="list_size=24 does not divide the batch of 12"):
        objective_loss(img, txt, 1.0, list_size=24)
    with pytest.raises(ValueError, match="list_size=1. Expected at least 2"):
        LossSpec(list_size=1)


@pytest.mark.slow
def test_a_validation_batch_that_lost_samples():
    img, txt = embeddings(10)
    parts = steps.objective_of(complete({"loss": {"list_size": 4}}))
    params = {"logit_scale": np.float32(2.0)}
    for rows, counted, size in ((10, 8, 4), (3, 3, None)):
        loss = jax.jit(functools.partial(objective_loss, list_size=size))
        want = loss(img[:counted], txt[:counted], np.exp(np.float32(2.0)))[1]
        got = jax.jit(parts)(params, img[:rows], txt[:rows])
        assert {key: float(x) for key, x in got.items()} == pytest.approx(
            {key: float(x) for key, x in want.items()}, rel=1e-5
        )
