"""A batch in parts has the gradient of the whole, for every objective, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config import complete
from rankclip_jax.losses import LossSpec, objective_loss
from rankclip_jax.parallel.mesh import batch_sharding, make_mesh
from rankclip_jax.train import step as steps
from rankclip_jax.train.accumulation import loss_and_grads
from rankclip_jax.train.session import Session
from tests.train.test_step import SMALL


def embed(params, batch):
    """Two small towers, so that a test compiles in a second."""
    z = [jnp.tanh(batch[name] @ params[name]) for name in ("image", "tokens")]
    return [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in z]


def problem(rows=32, width=8, seed=0):
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=(6, width)).astype(np.float32) for name in ("image", "tokens")}
    batch = {name: rng.normal(size=(rows, 6)).astype(np.float32) for name in ("image", "tokens")}
    return params | {"scale": np.float32(20.0)}, batch


OPTIONS = [
    dict(objective="rankclip"),
    dict(objective="rankclip", top_k=5, decay="log", rank_weight=0.5, keep_self=False),
    dict(objective="rankclip", form="released"),
    dict(objective="rankclip", list_size=4),
    dict(objective="rankclip", lambda_in=0.0, terms={"siglip": 0.5}),
    dict(objective="rank"),
    dict(objective="clip"),
    dict(objective="siglip"),
    dict(objective="cyclip"),
]


QUICK = (OPTIONS[0], dict(objective="rankclip", list_size=4), dict(objective="siglip"))
CASES = [(1, options) if options in QUICK else pytest.param(1, options, marks=pytest.mark.slow) for options in OPTIONS]
CASES += [pytest.param(4, options, marks=pytest.mark.slow) for options in OPTIONS if len(options) == 1]


@pytest.mark.parametrize(("devices", "options"), CASES, ids=str)
def test_parts_give_the_gradient_of_the_whole(devices, options):
    params, batch = problem()
    mesh = make_mesh({"data": devices}, jax.devices()[:devices])
    batch = jax.device_put(batch, batch_sharding(mesh))
    where = NamedSharding(mesh, PartitionSpec(None, "data"))

    def loss(params, z):
        return objective_loss(*z, params["scale"], -5.0, **options, mesh=mesh)

    def constrain(tree):
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, where), tree)

    # How many parts there are matters to no objective: the first goes in all of them, and in rows of each device.
    counts = ((2, 4, 8) if devices == 1 else (8,)) if options == OPTIONS[0] else (4,)
    assert_parts_are_the_whole(embed, loss, params, batch, constrain, counts)


def assert_parts_are_the_whole(embed, loss, params, batch, constrain=lambda tree: tree, counts=(4,)):
    """Loss, its terms and gradients in `counts` parts, to 1e-5 of each array's norm."""

    def grads(parts):
        return jax.jit(lambda p, b: loss_and_grads(embed, loss, p, b, parts, constrain))(params, batch)

    whole = grads(1)
    assert all(np.linalg.norm(g) > 0 for g in jax.tree.leaves(whole[1]))
    for parts in counts:
        for a, b in zip(jax.tree.leaves(grads(parts)), jax.tree.leaves(whole), strict=True):
            # Only the order of the sums over rows differs.
            assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b) + 1e-7


def test_two_views_go_in_parts_too():
    params, batch = problem()
    params["logit_scale"] = np.log(params.pop("scale"))
    other = problem(seed=1)[1]
    batch = {name: np.stack([batch[name], other[name]], axis=1) for name in batch}  # (B, V, ...)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])

    def embed_views(params, rows):
        z = embed(params, {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()})
        return [x.reshape(-1, 2, x.shape[-1]) for x in z]

    def loss(params, z):
        return steps._objective(*z, params, LossSpec(), 1.5, mesh)

    assert_parts_are_the_whole(embed_views, loss, params, batch)


def test_the_usual_accumulation_would_be_wrong():
    params, batch = problem()

    @jax.jit
    def grad(params, batch):
        return jax.grad(lambda p: objective_loss(*embed(p, batch), p["scale"], objective="clip")[0])(params)["image"]

    halves = [grad(params, jax.tree.map(lambda x: x[i::2], batch)) for i in (0, 1)]  # noqa: B023
    whole = grad(params, batch)
    assert np.linalg.norm((halves[0] + halves[1]) / 2 - whole) > 0.1 * np.linalg.norm(whole)


def test_parts_take_less_memory():
    def temporary(parts):
        def deep(params, batch):
            z = embed(params, batch)
            return [jnp.mean(jax.nn.gelu(x[:, :, None] * jnp.arange(1.0, 65.0)), axis=2) for x in z]

        f = jax.jit(lambda p, b: loss_and_grads(deep, lambda p, z: (jnp.vdot(*z), ()), p, b, parts))
        return f.lower(*problem(rows=4096)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 3


def test_what_cannot_go_in_parts_is_refused(tmp_path):
    tokenizer = Tokenizer.train(["a red circle", "a blue square"], 64)
    small = {"name": "ViT-tiny", "context_length": 8}
    with pytest.raises(InputError, match=r"batch_size=24 does not divide into config.accumulate=2 parts over 8"):
        Session(complete({"batch_size": 24, "accumulate": 2, "model": small}), tokenizer)
    with pytest.raises(InputError, match="batch norm needs the statistics of the whole batch"):
        fields = {"batch_size": 16, "accumulate": 2, "model": {"name": "RN-tiny", **SMALL["RN-tiny"]}}
        Session(complete(fields), tokenizer)
