import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rankclip_jax.losses import clip_loss, objective_loss, rank_consistency, rank_weight, reference
from tests.support import oracle

VALUE, GRADIENT = 1e-5, 1e-4
NAMES = ("clip", "in_modal", "cross_modal")
PLAIN = {"clip": "clip_loss", "in_modal": "in_modal", "cross_modal": "cross_modal"}  # their names in reference.py


def embeddings(batch, width=16, seed=0, share=0.5):
    rng = np.random.default_rng(seed)
    img = oracle.unit_rows(rng, batch, width)
    return img, oracle.unit_rows(rng, batch, width, towards=img, share=share)


def terms(*args, **options):
    return {"clip": clip_loss(*args)} | rank_consistency(*args, **options)._asdict()


def each_value_and_grad(terms):
    """One program: {term: (value, gradients by images, texts and scale)}."""

    def found(*args):
        values, pull = jax.vjp(terms, *args)
        return {name: (values[name], pull({n: jnp.float32(n == name) for n in NAMES})) for name in NAMES}

    return jax.jit(found)


@functools.cache
def values_and_grads(**options):
    return each_value_and_grad(functools.partial(terms, **options))


def check(img, txt, scale, **options):
    want = oracle.terms(img, txt, scale, **options)
    for name, (value, grads) in values_and_grads(**options)(img, txt, scale).items():
        # Where the truth is nearly nothing, float32 rounding of the scores is all there is: hence the floors.
        assert abs(value - want[name][0]) < VALUE * want[name][0] + 1e-9, name
        for got, expected, part in zip(grads, want[name][1:], ("images", "texts", "scale"), strict=True):
            floor = 1e-6 * scale * (1 if part != "scale" else 1e-2)
            assert np.linalg.norm(got - expected) < GRADIENT * np.linalg.norm(expected) + floor, (name, part)


@pytest.mark.parametrize("scale", [1.0, 14.3, 30.0, 100.0])
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_equals_float64(scale, share):
    check(*embeddings(40, share=share), scale)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_self": False, "top_k": 3, "decay": "log"},
        *(pytest.param(o, marks=pytest.mark.slow) for o in ({"decay": "log"}, {"top_k": 5}, {"keep_self": False})),
    ],
)
def test_options_equal_float64(options):
    check(*embeddings(40), 50.0, **options)


@pytest.mark.parametrize(
    ("batch", "keep_self"),
    [
        (1, False),
        (2, True),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, True), (2, False), (3, False))),
    ],
)
def test_tiny_batches(batch, keep_self):
    check(*embeddings(batch), 20.0, keep_self=keep_self)


def test_duplicated_captions():
    """Exact ties: on a grid of 1/64 the products have no rounding, so that equal captions score the same."""
    rng = np.random.default_rng(1)
    img, txt = (np.round(64 * oracle.unit_rows(rng, 40, 16)) / 64 for _ in range(2))
    txt[1::2] = txt[::2]
    check(img.astype(np.float32), txt.astype(np.float32), 64.0)


@pytest.mark.slow
def test_well_separated_at_scale_100_in_a_large_batch():
    check(*embeddings(320, width=64, share=0.8), 100.0)


@functools.cache
def in_chunks(chunk):
    found = jax.jit(jax.value_and_grad(lambda *a: objective_loss(*a, chunk=chunk)[0], (0, 1, 2)))
    return jax.tree.leaves(found(*embeddings(24), 30.0))


@pytest.mark.parametrize(
    "chunk", [7, pytest.param(1, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.slow)]
)
def test_chunks_do_not_matter(chunk):
    for whole, parts in zip(in_chunks(24), in_chunks(chunk), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_objective_is_the_weighted_sum():
    img, txt = embeddings(20)
    weighted = functools.partial(objective_loss, rank_weight=1.5, lambda_in=0.25, lambda_cross=0.5)
    (loss, parts), grads = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(img, txt, 30.0)
    want = oracle.terms(img, txt, 30.0)
    weights = {"clip": 1.0, "in_modal": 1.5 * 0.25, "cross_modal": 1.5 * 0.5}
    assert float(loss) == pytest.approx(sum(weights[n] * want[n][0] for n in NAMES), rel=VALUE)
    for i, got in enumerate(grads):
        assert oracle.relative(got, sum(weights[n] * want[n][i + 1] for n in NAMES)) < GRADIENT
    assert set(parts) == {"clip", "rank_in_modal", "rank_cross_modal"}
    for name, part in zip(NAMES, (parts["clip"], parts["rank_in_modal"], parts["rank_cross_modal"]), strict=True):
        assert float(part) == pytest.approx(want[name][0], rel=VALUE)


def test_terms_that_are_dropped_are_not_computed():
    img, txt = embeddings(8)
    clip, parts = jax.jit(lambda: objective_loss(img, txt, 20.0, objective="clip"))()
    assert set(parts) == {"clip"}
    np.testing.assert_allclose(clip, jax.jit(clip_loss)(img, txt, 20.0), rtol=1e-6)
    for zero, left in (("lambda_in", "rank_cross_modal"), ("lambda_cross", "rank_in_modal")):
        shapes = jax.eval_shape(functools.partial(objective_loss, **{zero: 0}), img, txt, 20.0)[1]
        assert set(shapes) == {"clip", left}
    # A weight of zero known only at run time keeps the terms for the metrics, and the loss is CLIP's.
    loss, parts = jax.jit(lambda w: objective_loss(img, txt, 20.0, rank_weight=w))(0.0)
    assert set(parts) == {"clip", "rank_in_modal", "rank_cross_modal"}
    np.testing.assert_allclose(loss, clip, rtol=1e-6)


def test_the_weight_has_a_gradient_and_the_parts_have_none():
    img, txt = embeddings(8)
    parts = jax.jit(objective_loss)(img, txt, 20.0)[1]
    got = jax.jit(jax.grad(lambda w: objective_loss(img, txt, 20.0, rank_weight=w, lambda_cross=0.5)[0]))(1.0)
    want = parts["rank_in_modal"] / 16 + 0.5 * parts["rank_cross_modal"]
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    none = jax.jit(jax.grad(lambda z: objective_loss(z, txt, 20.0)[1]["clip"]))(img)
    np.testing.assert_array_equal(none, np.zeros_like(img))


@pytest.mark.slow
def test_bfloat16_embeddings_are_multiplied_in_float32():
    img, txt = (jnp.asarray(z, jnp.bfloat16) for z in embeddings(32))
    want = oracle.terms(*(np.asarray(z, np.float32) for z in (img, txt)), 30.0)
    for name, (value, (grad, *_)) in values_and_grads()(img, txt, 30.0).items():
        assert oracle.relative(value, want[name][0]) < VALUE
        assert grad.dtype == jnp.bfloat16
        assert oracle.relative(grad.astype(np.float32), want[name][1]) < float(jnp.finfo(jnp.bfloat16).eps)


def sharded(mesh_shape, axes, batch=64):
    names = ("data", "fsdp")[: len(mesh_shape)]
    mesh = jax.make_mesh(mesh_shape, names, axis_types=(AxisType.Auto,) * len(names))
    where = NamedSharding(mesh, PartitionSpec(axes))
    return mesh, [jax.device_put(z, where) for z in embeddings(batch)]


def with_options(*args, **where):
    return objective_loss(*args, rank_weight=2.0, decay="log", keep_self=False, chunk=3, **where)


@functools.cache
def on_one_device():
    return jax.jit(jax.value_and_grad(with_options, (0, 1, 2), has_aux=True))(*embeddings(64), 40.0)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 4), ("data", "fsdp")),
        pytest.param((8,), ("data",), marks=pytest.mark.slow),
        pytest.param((2, 4), ("data",), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_what_one_gives(shape, axes):
    mesh, (img, txt) = sharded(shape, axes)
    f = functools.partial(with_options, mesh=mesh, axes=axes)
    want = on_one_device()
    got = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(img, txt, 40.0)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # The sums run in another order, and the gradients hold scale * rounding.
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    values = jax.jit(lambda *a: f(*a)[0])(img, txt, 40.0)
    np.testing.assert_allclose(values, want[0][0], rtol=1e-5)


def test_a_mesh_as_jax_makes_it_takes_arrays_from_anywhere():
    mesh, some = jax.make_mesh((8,), ("data",)), embeddings(64)  # its axes are Explicit
    assert mesh.axis_types == (AxisType.Explicit,)
    gradients = [
        jax.jit(jax.value_and_grad(lambda *z, mesh=mesh: objective_loss(*z, 40.0, mesh=mesh)[0], (0, 1)))(*z)
        for mesh, z in ((None, some), (mesh, some), (mesh, jax.device_put(some, NamedSharding(mesh, PartitionSpec()))))
    ]
    for got in gradients[1:]:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_float64_embeddings_have_gradients():
    with jax.enable_x64():
        img, txt = (jnp.asarray(z, jnp.float64) for z in embeddings(8))
        got = jax.jit(jax.grad(lambda z: objective_loss(z, txt, 40.0)[0]))(img)
    want = jax.jit(jax.grad(lambda z: objective_loss(z, embeddings(8)[1], 40.0)[0]))(embeddings(8)[0])
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def collectives(compiled):
    """(kind, shape) of every collective in a compiled program."""
    pattern = re.compile(
        r"= (?P<type>\(?[a-z0-9]+\[[^=]*?) "
        r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
        r"(-start)?\("
    )
    found = []
    for match in pattern.finditer(compiled.as_text()):
        shapes = re.findall(r"[a-z0-9]+\[([0-9,]*)\]", match["type"])
        found += [(match["kind"], tuple(int(d) for d in shape.split(",") if d)) for shape in shapes]
    return found


@pytest.mark.parametrize("top_k", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_but_embeddings_moves_between_devices(top_k):
    mesh, (img, txt) = sharded((8,), ("data",))
    batch, width = img.shape
    f = jax.jit(jax.value_and_grad(lambda *a: objective_loss(*a, mesh=mesh, top_k=top_k)[0], (0, 1, 2)))
    moved = sorted(collectives(f.lower(img, txt, 30.0).compile()))
    scalars = 5  # three terms, the gradients of the scale and of the bias
    assert moved == sorted(
        [("all-gather", (batch, width))] * 2
        + [("reduce-scatter", (batch // 8, width))] * 2
        + [("all-reduce", (scalars,))]
    )


def test_memory_grows_with_the_chunk_not_with_the_square():
    def temporary(batch):
        z = jax.ShapeDtypeStruct((batch, 32), jnp.float32)
        f = jax.jit(jax.grad(lambda a, b, s: objective_loss(a, b, s, chunk=8)[0], (0, 1)))
        return f.lower(z, z, 1.0).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    assert large < 6 * small  # 4 where it grows with B, 16 where it grows with B x B
    assert large < 4096 * 4096 * 4  # less than one matrix


def test_second_derivative_says_that_there_is_none():
    img, txt = embeddings(4)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        jax.grad(lambda z: jnp.sum(jax.grad(lambda y: clip_loss(y, txt, 10.0))(z) ** 2))(img)


def test_a_nan_reaches_the_loss():
    img, txt = embeddings(8)
    img[3, 0] = np.nan
    for name, value in jax.jit(terms)(img, txt, 10.0).items():
        assert np.isnan(value), name


def test_rank_weight():
    assert [float(rank_weight(e, 7)) for e in range(1, 8)] == pytest.approx([0, 0.5, 1, 1.5, 2, 2, 2])
    assert float(rank_weight(1, 1)) == 0
    assert float(rank_weight(1, 1, "constant")) == float(rank_weight(5, 9, "constant")) == 1
    assert float(jax.jit(lambda e: rank_weight(e, 31))(11)) == pytest.approx(1)
    for epochs in (1, 2, 7):  # more of them keep the last weight
        assert float(rank_weight(epochs + 5, epochs)) == float(rank_weight(epochs, epochs))
    with pytest.raises(ValueError, match="schedule='linear'. Expected"):
        rank_weight(1, 2, "linear")
    with pytest.raises(ValueError, match="epochs=0"):
        rank_weight(1, 0)


def test_errors():
    img, txt = embeddings(8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"one shape \(B, D\)"):
        clip_loss(img, txt[:4], 1.0)
    with pytest.raises(ValueError, match="batch of 6 does not divide over the 8 devices"):
        clip_loss(img[:6], txt[:6], 1.0, mesh=mesh)
    with pytest.raises(ValueError, match="no axis 'model'"):
        clip_loss(img, txt, 1.0, mesh=mesh, axes="model")
    with pytest.raises(ValueError, match="top_k=0"):
        rank_consistency(img, txt, 1.0, top_k=0)
    with pytest.raises(ValueError, match="chunk=0"):
        clip_loss(img, txt, 1.0, chunk=0)
    with pytest.raises(ValueError, match="objective='blip'"):
        objective_loss(img, txt, 1.0, objective="blip")
    with pytest.raises(ValueError, match="no term 'rank'"):
        objective_loss(img, txt, 1.0, terms={"rank": 1.0})
    with pytest.raises(ValueError, match="every weight is zero"):
        objective_loss(img, txt, 1.0, objective="siglip", terms={"siglip": 0})
    with pytest.raises(ValueError, match="form='fast'"):
        rank_consistency(img, txt, 1.0, form="fast")


PLAIN_VALUES_AND_GRADS = each_value_and_grad(
    lambda *args: {name: getattr(reference, plain)(*args) for name, plain in PLAIN.items()}
)
OBJECTIVE, PLAIN_OBJECTIVE = jax.jit(objective_loss), jax.jit(reference.rankclip_loss)


@pytest.mark.parametrize("scale", [1.0, 14.3, 60.0])
def test_the_fast_form_is_the_papers(scale):
    """losses/reference.py, which a reader opens first, and what trains: values and gradients."""
    img, txt = embeddings(40)
    fast, plain = (form(img, txt, scale) for form in (values_and_grads(), PLAIN_VALUES_AND_GRADS))
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
    got = OBJECTIVE(img, txt, scale, rank_weight=1.5)[0]
    assert float(got) == pytest.approx(float(PLAIN_OBJECTIVE(img, txt, scale, 1.5)), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 14.3, 60.0])
def test_the_papers_form_is_the_definition(scale):
    img, txt = embeddings(40)
    want = oracle.terms(img, txt, scale)
    for name, (found, _) in PLAIN_VALUES_AND_GRADS(img, txt, scale).items():
        assert float(found) == pytest.approx(want[name][0], rel=VALUE)
