"""Fresh parameters by small programs, one for each kind of array, in place of one program that draws them all.

XLA compiles each of a model's hundreds of draws anew, and the key of each, though twelve equal layers draw alike.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# These have alone the bits that they have in a larger program. A draw is a jitted initializer (models/layers.py).
_ALONE = {"random_seed", "random_fold_in", "random_wrap", "random_unwrap", "broadcast_in_dim", "copy", "jit"}
_ALIKE = 3  # draws of a kind, on average, from which on this is quicker: ViT-B/32 has 12, ViT-tiny 4.4, RN50 2.2


def draw(init: jax.stages.Wrapped, device: jax.Device) -> Any:
    """init() on a device, to the bit; by init itself where it does more than fill and draw, or few draws are alike."""
    traced = init.trace()
    whole = traced.jaxpr.jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))  # without the towers
    kinds = [str(eqn.params["jaxpr"]) if eqn.primitive.name == "jit" else None for eqn in jaxpr.eqns]
    draws = [kind for kind in kinds if kind]
    if not {eqn.primitive.name for eqn in jaxpr.eqns} <= _ALONE or len(draws) < _ALIKE * len(set(draws)):
        return init()
    with jax.default_device(device):
        leaves = _computed(jaxpr, traced.jaxpr.consts, kinds, device.platform)
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), leaves)


def only(init: Callable[[], Any], wanted: Sequence[bool]) -> Callable[[], list]:
    """A function that returns the wanted leaves of init() alone. What jax.eval_shape has traced is not traced again."""
    closed = jax.jit(init).trace().jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, list(wanted))
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))


def compiler_options(platform: str) -> dict | None:
    """For a program that runs once: on a CPU XLA's level 1 gives the usual level's bits in half the time."""
    if platform == "cpu" and "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        return {"xla_backend_optimization_level": "1"}
    return None


def _computed(jaxpr, consts, kinds, platform):
    """The outputs, equation by equation; draws of a kind share a program."""
    known, programs, given = dict(zip(jaxpr.constvars, consts, strict=True)), {}, set()

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for eqn, kind in zip(jaxpr.eqns, kinds, strict=True):
        inputs = [value(atom) for atom in eqn.invars]
        if kind:
            if kind not in programs:
                function = core.jaxpr_as_fun(eqn.params["jaxpr"])
                programs[kind] = jax.jit(function, compiler_options=compiler_options(platform))
            outputs = programs[kind](*inputs)
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        known |= zip(eqn.outvars, outputs, strict=True)

    def output(atom):
        if isinstance(atom, core.Literal) or atom in given:  # no two leaves may be one buffer: a step donates them
            return jax.numpy.array(value(atom))
        given.add(atom)
        return known[atom]

    return [output(atom) for atom in jaxpr.outvars]
