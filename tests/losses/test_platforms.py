"""What the loss is made of on a GPU and a TPU, read from its programs, and that it is the same loss there."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rankclip_jax.losses import objective_loss, plackett_luce_nll
from rankclip_jax.losses.plackett_luce import lists_nll
from rankclip_jax.train import targets
from tests.support import oracle

FORMS = {
    "whole lists": {},
    "decay": {"decay": "log"},
    "top_k": {"top_k": 5},
    "released": {"form": "released"},
    "without the item itself": {"keep_self": False, "top_k": 7},
    "ranking alone": {"objective": "rank"},
    "lists of 16 items": {"list_size": 16},
}


@functools.cache
def nll_of(platform, decay, top_k):
    return jax.jit(lambda lists: lists_nll(lists, decay, top_k, platform, True))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("options", [{}, {"top_k": 9, "decay": "log"}], ids=str)
@pytest.mark.parametrize("spread", [1, pytest.param(100, marks=pytest.mark.slow), 1000])
def test_their_forms_equal_float64(platform, options, spread):
    rng = np.random.default_rng(spread)
    scores = rng.uniform(-spread, spread, (4, 300)).astype(np.float32)
    scores[3] = np.round(scores[3])
    reference = np.round(4 * rng.normal(size=(4, 300))).astype(np.float32)
    reference[1], reference[2] = scores[1], np.where(reference[2] > 0, 0.0, -0.0)
    top_k = options.get("top_k")
    both = [(scores, reference), (scores[:, :150], reference[:, :150])]  # lists of two lengths share the GPU's loop
    found = nll_of(platform, options.get("decay"), top_k)(both)
    for (nll, grad), (some_scores, some_reference) in zip(found, both, strict=True):
        for row in range(4):
            want, want_grad = oracle.nll(some_scores[row], some_reference[row], **options)
            # With top_k the logsumexp of the rest, as large as the scores, is rounded to float32.
            assert abs(nll[row] - want) < 1e-5 * want + (spread * 2.0**-24 if top_k else 0)
            assert oracle.relative(grad[row], want_grad) < 1e-4


def lowered(platform, mesh=None, **options) -> str:
    z_BxD = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    loss = jax.jit(jax.value_and_grad(lambda *z: objective_loss(*z, mesh=mesh, **options)[0], (0, 1, 2)))
    return loss.trace(z_BxD, z_BxD, 14.0).lower(lowering_platforms=(platform,)).as_text()


def by_element(text: str) -> list[str]:
    """Gathers and scatters that take elements one by one, and not slices of embeddings."""
    return re.findall(r'"?stablehlo\.(?:dynamic_)?(?:gather|scatter)"?\(', text)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("form", FORMS)
def test_a_tpu_neither_gathers_nor_scatters(form, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    text = lowered("tpu", mesh=mesh, **FORMS[form])
    assert "stablehlo.sort" in text and not by_element(text)


def test_nor_do_single_lists():
    lists = jax.ShapeDtypeStruct((8, 100), jnp.float32)
    for options in ({}, {"top_k": 3}):
        loss = jax.jit(jax.value_and_grad(lambda s, r, o=options: plackett_luce_nll(s, r, **o).sum()))
        assert not by_element(loss.trace(lists, lists).lower(lowering_platforms=("tpu",)).as_text())


def test_gathers_would_be_seen():
    assert by_element(lowered("cuda"))


@pytest.mark.parametrize(("length", "stable"), [(8192, False), (8193, True)])
def test_a_gpu_sorts_two_arrays_and_leaves_long_lists_to_cub(length, stable):
    lists = jax.ShapeDtypeStruct((64, length), jnp.float32)
    loss = jax.jit(jax.value_and_grad(lambda s, r: plackett_luce_nll(s, r).sum()))
    text = loss.trace(lists, lists).lower(lowering_platforms=("cuda",)).as_text()
    (sort,) = re.findall(r'"stablehlo\.sort"\((.*?)\) <\{(.*?)\}>', text)
    assert sort[0].count("%") == 2 and ("is_stable = true" in sort[1]) == stable


@pytest.mark.parametrize("form", ["whole lists", "without the item itself"])
def test_a_gpu_has_one_loop_a_chunk_that_a_value_ends(form):
    text = lowered("cuda", chunk=64, **FORMS[form])
    loops = len(re.findall(r"stablehlo\.while", text))
    assert loops == 2  # this one, and that over the chunks


SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from rankclip_jax.losses import objective_loss
from rankclip_jax.train import targets
where = jax.sharding.SingleDeviceSharding(targets.devices(targets.parse_target(sys.argv[1]))[0])
for rows, options in json.loads(sys.argv[2]):
    z = jax.ShapeDtypeStruct((rows, 64), jnp.float32, sharding=where)
    loss = jax.jit(jax.value_and_grad(lambda a, b: objective_loss(a, b, 30.0, **options)[0], (0, 1)))
    print(json.dumps(loss.lower(z, z).compile().as_text()))
"""
# "ranking alone" is a part of "whole lists". The other ways to end a list, and to weigh it, meet in one program.
COMPILED = {form: FORMS[form] for form in ("whole lists", "released", "without the item itself", "lists of 16 items")}
COMPILED["decay, top_k"] = FORMS["decay"] | FORMS["top_k"]
# (rows, options): with so many rows there is a loop over chunks, or one is asked for, since fewer rows compile sooner.
COMPILED = {form: (256, {"chunk": 64, **options}) for form, options in COMPILED.items()}
MANY = {"whole lists of many rows": (4096, {})}


@functools.cache
def compiled(target: str, *forms: str) -> dict[str, str]:
    """{form: program}, of one process, which imports once."""
    platform = targets.parse_target(target).platform
    if not targets.has_compiler(platform):
        pytest.skip(f"needs the compiler: {targets.HOW_TO_INSTALL[platform]}")
    environment = targets.environment(platform) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, target, json.dumps([(COMPILED | MANY)[form] for form in forms])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(forms, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", COMPILED)
def test_compiled_for_a_tpu(form):
    text = compiled("v5e:2x2", *COMPILED)[form]
    assert " sort(" in text and not re.findall(r" (?:gather|scatter)\(", text)


@pytest.mark.slow
def test_compiled_for_a_gpu():
    (text,) = compiled("1xH100", *MANY).values()
    sorts = re.findall(r"= \((.*?)\) sort\(", text)
    assert len(sorts) == 4 and all(types.count("[") == 2 for types in sorts)
    chunk = re.search(r"\[(\d+),4096\]", sorts[0])[1]
    assert not re.findall(rf"\[{chunk},4096\]\S* copy\(", text)
    assert text.count(" while(") - text.count("known_trip_count") == 1
