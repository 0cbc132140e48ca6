"""The optimisers against float64 oracles, spelled as the formulas; what rules do to a step; averages of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import by_name, nested
from rankclip_jax.config import complete
from rankclip_jax.parallel import sharding
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.train import average, optim, rules

LR, DECAY, B1, B2, EPS = 0.01, 0.3, 0.9, 0.98, 1e-8
KERNEL, BIAS = "visual/transformer/resblocks_0/mlp/c_fc/kernel", "visual/transformer/resblocks_0/mlp/c_fc/bias"
STACK = "text/transformer/resblocks/attn/q_proj/kernel"
SHAPES = {KERNEL: (160, 130), BIAS: (130,), STACK: (3, 6, 4), "text/text_projection": (6, 5), "logit_scale": ()}
DECAYED = (KERNEL, STACK, "text/text_projection")
NAMES = ("adamw", "lion", "adafactor", "muon")


def config(**fields):
    usual = dict(lr=LR, schedule="constant", warmup_steps=0, weight_decay=DECAY, b1=B1, b2=B2, eps=EPS)
    return complete({"optim": usual | fields}).optim


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def steps_of(settings, params, grads):
    """The parameters after each gradient, float32, by name."""
    tx = optim.make_optimizer(settings, 10)
    tree = nested({name: jnp.float32(x) for name, x in params.items()})
    state, after = tx.init(tree), []
    for each in grads:
        updates, state = tx.update(nested({name: jnp.float32(x) for name, x in each.items()}), state, tree)
        tree = optax.apply_updates(tree, updates)
        after.append(by_name(tree))
    return after


def adam(grads):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        yield (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)


def lion(grads):
    m = 0.0
    for g in grads:
        yield np.sign(B1 * m + (1 - B1) * g)
        m = B2 * m + (1 - B2) * g


def adafactor(grads):
    """Factored where two sides have at least 128; the root mean square of each matrix is clipped to 1."""
    m, rows, columns, v = 0.0, 0.0, 0.0, 0.0
    for t, g in enumerate(grads, 1):
        keep = min(1 - t**-0.8, B2)
        if g.ndim == 2 and min(g.shape) >= 128:
            rows = keep * rows + (1 - keep) * (g**2).mean(1)
            columns = keep * columns + (1 - keep) * (g**2).mean(0)
            u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        else:
            v = keep * v + (1 - keep) * g**2
            u = g / np.sqrt(v)
        axes = (1, 2) if g.ndim == 3 else None
        u = u / np.maximum(1, np.sqrt((u**2).mean(axes, keepdims=True)))
        m = B1 * m + (1 - B1) * u
        yield m


def newton_schulz(x):
    x = x / (np.linalg.norm(x) + 1e-8)
    x, turned = (x.T, True) if x.shape[0] > x.shape[1] else (x, False)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if turned else x


def muon(grads):
    m = 0.0
    for t, g in enumerate(grads, 1):
        m = 0.95 * m + 0.05 * g
        look = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        each = np.stack([newton_schulz(x) for x in look]) if g.ndim == 3 else newton_schulz(look)
        yield 0.2 * np.sqrt(max(g.shape[-2:])) * each


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_is_its_formula_and_multiplies_decay_by_the_rate(name):
    params, grads = drawn(0), [drawn(seed) for seed in (1, 2, 3)]
    after = steps_of(config(name=name), params, grads)
    oracle = {"adamw": adam, "lion": lion, "adafactor": adafactor, "muon": muon}[name]
    for key, weight in params.items():
        of = adam if name == "muon" and key not in (KERNEL, STACK) else oracle
        for found, direction in zip(after, of([each[key] for each in grads]), strict=True):
            weight = weight - LR * (direction + DECAY * weight * (key in DECAYED))
            np.testing.assert_allclose(found[key], weight, rtol=1e-4, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_zero_only_decays(name):
    params = drawn(0)
    (after,) = steps_of(config(name=name), params, [{key: np.zeros(shape) for key, shape in SHAPES.items()}])
    for key, weight in params.items():
        np.testing.assert_allclose(after[key], weight * (1 - LR * DECAY * (key in DECAYED)), rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_scanned_blocks_are_treated_one_by_one(name):
    """Blocks of which one has large gradients: as if each was a matrix of its own."""
    rng, path = np.random.default_rng(0), "text/transformer/resblocks{}/mlp/c_fc/kernel"
    weights, grads = rng.normal(size=(2, 3, 7, 5)) * [[[[1.0]], [[1e3]], [[1e-3]]]]
    scanned = steps_of(config(name=name), {path.format(""): weights}, [{path.format(""): grads}] * 2)
    apart = [{path.format(f"_{i}"): x[i] for i in range(3)} for x in (weights, grads)]
    unrolled = steps_of(config(name=name), apart[0], [apart[1]] * 2)
    for found, expected in zip(scanned, unrolled, strict=True):
        stacked = np.stack([expected[path.format(f"_{i}")] for i in range(3)])
        np.testing.assert_allclose(found[path.format("")], stacked, rtol=1e-4, atol=1e-6)


def test_rules_the_first_counts():
    settings = config(
        layer_lr_decay=0.5,
        rules=[
            ("mlp/.*bias$", {"lr": 0.25, "weight_decay": 0.1}),
            ("^visual/", {"lr": 0.5}),
            ("resblocks_1/", {"weight_decay": 0.0}),
            ("projection$", {"freeze": True}),
        ],
    )
    treated = rules.treatments(settings, nested(drawn(0)))
    assert treated[BIAS] == (0.25, 0.1, False) and treated[KERNEL] == (0.5, DECAY, False)
    assert treated["text/text_projection"].frozen and treated["logit_scale"] == (1.0, 0.0, False)
    stack = treated[STACK]  # three blocks, of which the rule is the second's; the others follow layer_lr_decay
    np.testing.assert_array_equal(stack.lr, np.float32([0.125, 1, 0.5]).reshape(3, 1, 1))
    np.testing.assert_array_equal(stack.weight_decay, np.float32([DECAY, 0, DECAY]).reshape(3, 1, 1))
    params, grads = drawn(0), [drawn(1), drawn(2)]
    found, plain = steps_of(settings, params, grads)[-1], steps_of(config(weight_decay=0.0), params, grads[:1])[-1]
    np.testing.assert_array_equal(found["text/text_projection"], np.float32(params["text/text_projection"]))
    once = steps_of(settings, params, grads[:1])[-1][BIAS]
    expected = params[BIAS] + 0.25 * (plain[BIAS] - params[BIAS]) - 0.25 * LR * 0.1 * params[BIAS]
    np.testing.assert_allclose(once, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_beside_what_is_frozen_the_rest_moves_as_alone(name):
    params, grads = drawn(0), [drawn(1), drawn(2)]
    given = ({"rules": [("^text/", {"freeze": True})]}, {})
    found, alone = (steps_of(config(name=name, layer_lr_decay=0.5, **rule), params, grads)[-1] for rule in given)
    for key in params:
        if key.startswith("text/"):
            np.testing.assert_array_equal(found[key], np.float32(params[key]), err_msg=key)
        else:
            np.testing.assert_allclose(found[key], alone[key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("flags", ["101", *(pytest.param(f, marks=pytest.mark.slow) for f in ("100", "010", "011"))])
@pytest.mark.parametrize("name", NAMES)
def test_of_a_stack_the_trained_blocks_alone_have_moments(name, flags):
    """Three scanned blocks, of which those with a 1 are frozen."""
    frozen = tuple(flag == "1" for flag in flags)
    given = [(f"resblocks_{i}/", {"freeze": True}) for i in range(3) if frozen[i]] + [(".", {"lr": 0.5})]
    params, grads = {STACK: drawn(0)[STACK]}, [{STACK: drawn(seed)[STACK]} for seed in (1, 2)]
    own = {STACK.replace("resblocks", f"resblocks_{i}"): i for i in range(3)}
    apart = [{key: tree[STACK][i] for key, i in own.items()} for tree in (params, *grads)]
    found = steps_of(config(name=name, rules=given), params, grads)[-1][STACK]
    expected = steps_of(config(name=name, rules=given), apart[0], apart[1:])[-1]
    for key, i in own.items():
        np.testing.assert_allclose(found[i], expected[key], rtol=1e-4, atol=1e-6)
        assert (found[i] == np.float32(params[STACK][i])).all() == frozen[i]
    sizes = [sum(x.size for x in jax.tree.leaves(optim.make_optimizer(config(name=name, rules=rule), 10).init(
        nested({STACK: jnp.float32(params[STACK])})))) for rule in (given, [])]  # fmt: skip
    assert sizes[0] <= sizes[1] * 0.7  # two thirds or one third, and counts


def test_what_is_written_with_rules():
    params = nested(drawn(0))
    assert rules.treatments(config(freeze="text"), params) == rules.treatments(
        config(rules=[("^text/", {"freeze": True})]), params
    )
    tenth = rules.treatments(config(rules=[("^visual/", {"lr": 0.1})]), params)
    assert {name: treatment.lr for name, treatment in tenth.items() if treatment.lr != 1} == {KERNEL: 0.1, BIAS: 0.1}
    # An exception to a key: the rule comes first.
    thawed = rules.treatments(config(freeze="text", rules=[("projection$", {"freeze": False})]), params)
    assert [name for name, treatment in thawed.items() if treatment.frozen] == [STACK]


@pytest.mark.parametrize(
    "given, message",
    [
        ([("vishual/", {"lr": 0.1})], r"'vishual/' is found in no parameter's name.* such as logit_scale and text/"),
        ([("visual/", {"lr": 0.1}), ("c_fc", {"lr": 0.2})], r"'c_fc' is found in no .*, or a rule before it counts"),
        ([(".", {"freeze": True})], r"^config.optim freezes all parameters, so nothing would be trained"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        optim.make_optimizer(config(rules=given), 10).init(nested(drawn(0)))


@pytest.mark.parametrize(
    "given, message",
    [
        ([("(", {"lr": 0.1})], r"config.optim.rules=.*Expected a list of \(regex, \{"),
        ("visual", r"config.optim.rules='visual'. Expected a list of"),
        ([("visual", {})], r"Expected a list of"),
        ([("visual", {1: 0.5})], r"Expected a list of"),
        ([("visual", {"rate": 0.1})], r"config.optim.rules\[0\].rate does not exist; the nearest key is"),
        ([("a", {"lr": 1.0}), ("b", {"lr": -1.0})], r"config.optim.rules\[1\].lr=-1.0. Expected a number above 0"),
        ([("a", {"freeze": 1})], r"config.optim.rules\[0\].freeze=1. Expected True or False"),
        ([("a", {"freeze": True, "lr": 0.5})], r"config.optim.rules\[0\] of 'a' freezes and gives lr"),
    ],
)
def test_rules_that_are_none_are_refused(given, message):
    with pytest.raises(InputError, match=message) as error:
        config(rules=given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, axes", [("fsdp", {"data": 2, "fsdp": 4}), ("tensor", {"data": 4, "model": 2})])
@pytest.mark.parametrize("name", NAMES)
def test_states_lie_where_their_parameters_do(name, kind, axes):
    mesh = make_mesh(axes)
    model = models.build("ViT-B/32", scan_layers=name == "muon", vision={"layers": 2}, text={"layers": 2})
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    state = {"params": params, "opt_state": jax.eval_shape(optim.make_optimizer(config(name=name), 10).init, params)}
    placed = by_name(sharding.state_shardings(state, mesh, kind))
    shapes, found = by_name(state), 0
    for path in shapes:
        owner = next((key for key in by_name(params) if path.endswith(f"/{key}") and "opt_state" in path), None)
        if owner and shapes[path].shape == shapes[f"params/{owner}"].shape:
            assert placed[path] == placed[f"params/{owner}"], path
            found += not placed[path].is_fully_replicated
    split = sum(not placed[f"params/{key}"].is_fully_replicated for key in by_name(params))
    assert split and found >= split  # at least one moment of each


def test_an_average_is_the_formula():
    rng, settings = np.random.default_rng(0), config(ema=0.6, rules=[("^text/", {"freeze": True})])
    kept = expected = {"visual": {"proj": rng.normal(size=3)}, "text": {"text_projection": rng.normal(size=2)}}
    stats = {"visual": {"mean": rng.normal(size=2)}}
    found = average.begin(jax.tree.map(jnp.float32, kept), jax.tree.map(jnp.float32, stats), settings)
    assert by_name(found).keys() == {"params/visual/proj", "batch_stats/visual/mean"}  # not of what is frozen
    expected = {"params/visual/proj": kept["visual"]["proj"], "batch_stats/visual/mean": stats["visual"]["mean"]}
    for step in range(12):
        new = {name: rng.normal(size=x.shape) for name, x in expected.items()}
        d = min(0.6, (1 + step) / (10 + step))  # 0.1, 2/11 ... and 0.6 from step 12.5 on
        expected = {name: d * expected[name] + (1 - d) * new[name] for name in new}
        tree = nested({name: jnp.float32(x) for name, x in new.items()})
        params = tree["params"] | {"text": kept["text"]}
        found = average.update(found, params, tree["batch_stats"], jnp.int32(step), 0.6)
    for name, x in by_name(found).items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5)
