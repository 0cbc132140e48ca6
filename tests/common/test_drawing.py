"""Fresh parameters have the bits of one program, from as few programs as there are kinds of them."""

import jax
import jax.numpy as jnp
import numpy as np

from rankclip_jax.common import drawing
from rankclip_jax.models.layers import normal, symmetric_uniform

CPU = jax.devices("cpu")[0]


def layers():
    """24 draws of three kinds, two fillings, and a number."""
    keys = [jax.random.fold_in(jax.random.key(3), i) for i in range(24)]
    inits = normal(0.02), symmetric_uniform(0.5), symmetric_uniform(0.25)
    drawn = [inits[i % 3](key, (5, 7)) for i, key in enumerate(keys)]
    return {"drawn": drawn, "ones": jnp.ones(7), "zeros": jnp.zeros((5, 7)), "step": jnp.int32(0)}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.devices() == {CPU}
        np.testing.assert_array_equal(a, b)


def test_equal_draws_share_a_program(monkeypatch):
    programs, real = [], drawing.core.jaxpr_as_fun
    monkeypatch.setattr(drawing.core, "jaxpr_as_fun", lambda jaxpr: programs.append(jaxpr) or real(jaxpr))
    assert_same(drawing.draw(jax.jit(layers), CPU), jax.jit(layers)())
    assert len(programs) == 3


def test_a_function_that_computes_is_one_program():
    def init():
        key = jax.random.key(0)
        scanned = jax.lax.scan(lambda c, _: (c + 1, normal(1.0)(jax.random.fold_in(key, c), (3,))), 0, None, 4)[1]
        return {"scanned": scanned, "sum": jnp.sin(scanned).sum()}

    assert_same(drawing.draw(jax.jit(init), CPU), jax.jit(init)())


def test_few_draws_of_a_kind_are_one_program(monkeypatch):
    monkeypatch.setattr(drawing, "_computed", None)
    assert_same(drawing.draw(jax.jit(lambda: layers()["drawn"][:7]), CPU), jax.jit(layers)()["drawn"][:7])


def test_no_two_leaves_are_one_buffer(monkeypatch):
    monkeypatch.setattr(drawing, "_ALIKE", 1)

    def init():
        drawn = normal(1.0)(jax.random.key(0), (3,))
        return {"params": drawn, "average": drawn}

    found = drawing.draw(jax.jit(init), CPU)
    assert_same(found, jax.jit(init)())
    assert found["params"].unsafe_buffer_pointer() != found["average"].unsafe_buffer_pointer()
