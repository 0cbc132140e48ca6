import functools
import os
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.config import complete
from rankclip_jax.models import images
from rankclip_jax.parallel import sharding
from rankclip_jax.parallel.mesh import make_mesh, to_devices
from rankclip_jax.train import optim, session
from rankclip_jax.train import step as steps
from rankclip_jax.train.session import Session, Vocabulary
from tests.support.made_models import made_state

SMALL = {
    "ViT-tiny": dict(image_size=16, vision=dict(width=32, layers=1, heads=2)),
    "RN-tiny": dict(image_size=16, vision=dict(width=4, layers=(1, 1))),
    "SigLIP-B/16": dict(image_size=16, embed_dim=32, vision=dict(width=32, layers=1, heads=2, patch_size=8)),
}
TEXT = dict(width=32, heads=2, layers=1, vocab_size=64, eot_id=63, context_length=8)
CLIP = {"loss": {"objective": "clip"}}  # sooner compiled than what ranks


class Trained(NamedTuple):
    """What `run` leaves: the last state, every step's metrics, the mesh, Adam's first moment after the first step."""

    state: steps.TrainState
    metrics: list
    mesh: jax.sharding.Mesh
    first_moment: np.ndarray


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def run(name, devices, *, count, rules=((".*", ()),), mesh_axes=None, fields=None, flip=True, model_fields=None):
    """Trains `count` steps on made data."""
    config = complete(
        {"batch_size": 16, "data": {"flip": flip}, "optim": {"lr": 1e-3, "warmup_steps": 2}, "sharding": rules}
        | (fields or {})
    )
    model = models.build(name, text=TEXT, **SMALL[name], **(model_fields or {}))
    mesh = make_mesh(mesh_axes or {"data": -1}, jax.devices()[:devices])
    tx = optim.make_optimizer(config.optim, 100)
    state = made_state(model, tx, mesh, rules)
    train_step = steps.make_train_step(model, tx, config, mesh, total_steps=100, steps_per_epoch=2)
    rng = np.random.default_rng(0)
    metrics, first_moment = [], None
    for _ in range(count):
        tokens = rng.integers(1, 63, (16, 8)).astype(np.int32)
        tokens[:, -1] = 63
        batch = {"image": rng.integers(0, 256, (16, 16, 16, 3)).astype(np.uint8), "tokens": tokens}
        state, numbers = train_step(state, to_devices(batch, mesh))
        metrics.append({k: float(v) for k, v in numbers.items()})
        if first_moment is None:
            leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
            first_moment = flat(next(leaf for leaf in leaves if hasattr(leaf, "mu")).mu)
    return Trained(state, metrics, mesh, first_moment)


@functools.cache
def plain(name, devices):
    """Five steps with the defaults, which several tests look at and none changes; of SigLIP one, with its loss."""
    if name.startswith("SigLIP"):
        return run(name, devices, count=1, fields={"loss": {"objective": "siglip"}})
    return run(name, devices, count=5)


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny"])
@pytest.mark.slow
def test_eight_devices_equal_one(name):
    one, one_metrics, _, _ = plain(name, 1)
    eight, eight_metrics, mesh, _ = plain(name, 8)
    assert mesh.size == 8
    # Sums over the batch are taken in another order, so float32 results differ in their last bits; the loss and
    # the gradient norm, themselves such sums, agree to a few units of 1e-7 each. Five updates add them up, and may
    # turn a ReLU on or off, after which the gradient norm differs by a thousandth.
    for step, (a, b) in enumerate(zip(one_metrics, eight_metrics, strict=True)):
        assert a.keys() == b.keys() and {"clip", "rank_in_modal", "rank_cross_modal", "grad_norm"} <= a.keys()
        for key in a:
            rel = 1e-5 if step == 0 else 3e-3 if key == "grad_norm" else 1e-4
            assert a[key] == pytest.approx(b[key], rel=rel), (step, key)
    # Adam divides by the gradient's own size: where that is rounding noise, its sign may differ and the
    # parameter with it by the learning rate. So: all within the five rates' sum, and nearly all far closer.
    difference = np.abs(flat(one.params) - flat(eight.params))
    assert difference.max() < 5e-3 and np.quantile(difference, 0.99) < 2e-5
    for a, b in zip(jax.tree.leaves(one.batch_stats), jax.tree.leaves(eight.batch_stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # global statistics, not each device's own


@pytest.mark.parametrize(
    "name", ["ViT-tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SigLIP-B/16", "RN-tiny"))]
)
def test_gradients_of_eight_devices_equal_those_of_one(name):
    # Adam's first moment after one step is 0.1 times the gradient.
    moments = [plain(name, devices).first_moment for devices in (1, 8)]
    # Relative to the whole gradient: single entries may be rounding noise of sums that cancel.
    assert np.linalg.norm(moments[0] - moments[1]) < 1e-5 * np.linalg.norm(moments[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("fsdp", {"data": 1, "fsdp": 8}),
        ("tensor", {"data": 4, "model": 2}),
        ("fsdp+tensor", {"data": 2, "fsdp": 2, "model": 2}),
        ((("attn/.*kernel|mlp/.*kernel", (None, "fsdp")), (".*", ())), {"data": 4, "fsdp": 2}),
    ],
)
def test_sharded_parameters_train_the_same(kind, axes, monkeypatch):
    monkeypatch.setattr(sharding, "_SMALL", 0)
    metrics = plain("ViT-tiny", 8).metrics[:3]
    sharded, sharded_metrics, _, _ = run("ViT-tiny", 8, count=3, rules=kind, mesh_axes=axes)
    for a, b in zip(metrics, sharded_metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    kernel = sharded.params["visual"]["transformer"]["resblocks_0"]["mlp"]["c_fc"]["kernel"]
    parts = axes.get("model", 1) * axes.get("fsdp", 1)
    assert kernel.addressable_shards[0].data.size == kernel.size // parts


@pytest.mark.slow
def test_a_batch_in_parts_trains_as_the_whole():
    whole, parts = plain("ViT-tiny", 8), run("ViT-tiny", 8, count=5, fields={"accumulate": 2})
    assert [n["loss"] for n in parts.metrics] == pytest.approx([n["loss"] for n in whole.metrics], rel=1e-4)
    assert parts.metrics[0]["grad_norm"] == pytest.approx(whole.metrics[0]["grad_norm"], rel=1e-5)
    assert np.quantile(np.abs(flat(whole.state.params) - flat(parts.state.params)), 0.99) < 2e-5


def test_the_weight_ramps_over_epochs_and_the_loss_is_the_weighted_sum():
    metrics = plain("ViT-tiny", 1).metrics
    for step, numbers in enumerate(metrics):
        weight = np.clip(3 * (step // 2) / (50 - 1), 0, 2)  # 100 steps, 2 an epoch: 50 epochs
        assert numbers["rank_weight"] == pytest.approx(weight, rel=1e-6)
        expected = numbers["clip"] + weight * (numbers["rank_in_modal"] + numbers["rank_cross_modal"]) / 16
        assert numbers["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "loss, parts",
    [
        (dict(objective="clip"), {"clip"}),
        (dict(lambda_in=0.0), {"clip", "rank_cross_modal"}),
        (dict(lambda_cross=0.0), {"clip", "rank_in_modal"}),
    ],
)
def test_objectives_compute_only_their_terms(loss, parts):
    config = complete({"batch_size": 16, "loss": loss, "optim": {"warmup_steps": 2}})
    model, mesh = models.build("ViT-tiny", text=TEXT, **SMALL["ViT-tiny"]), make_mesh({"data": 1}, jax.devices()[:1])
    tx = optim.make_optimizer(config.optim, 100)
    step = steps.make_train_step(model, tx, config, mesh, total_steps=100, steps_per_epoch=2)
    batch = {"image": jax.ShapeDtypeStruct((16, 16, 16, 3), "uint8"), "tokens": jax.ShapeDtypeStruct((16, 8), "int32")}
    _, metrics = jax.eval_shape(step, steps.Fresh(model, tx, 0, mesh, None).abstract, batch)
    assert {key for key in metrics if key.startswith(("clip", "rank_")) and key != "rank_weight"} == parts


@pytest.mark.slow
def test_a_fresh_state_compiled_quickly_has_the_usual_bits():
    script = (
        "import jax, numpy as np\n"
        "from tests.train.test_step import SMALL, TEXT\n"
        "from rankclip_jax import config, models\n"
        "from rankclip_jax.common import drawing\n"
        "from rankclip_jax.parallel.mesh import make_mesh\n"
        "from rankclip_jax.train import optim, step\n"
        "tx = optim.make_optimizer(config.complete({'optim': {'warmup_steps': 2}}).optim, 100)\n"
        "resnet = dict(image_size=16, vision=dict(width=4, layers=(1,)))\n"
        "models_of = [models.build('RN-tiny', text=TEXT, **resnet)]\n"
        "models_of.append(models.build('SigLIP-B/16', text=TEXT, **SMALL['SigLIP-B/16']))\n"
        "deep = dict(width=16, heads=1, layers=4)\n"  # a ViT of which enough draws are alike to share programs
        "models_of.append(models.build('ViT-tiny', image_size=16, vision=deep, text=TEXT | deep))\n"
        "computed, shared = drawing._computed, []\n"
        "drawing._computed = lambda *given: shared.append(model) or computed(*given)\n"
        "for model in models_of:\n"
        "    quick = step.Fresh(model, tx, 3, make_mesh({'data': -1}, jax.devices()[:1]), None).state()\n"
        "    usual = jax.jit(lambda: step.fresh_state(model, tx, 3))()\n"
        "    jax.tree.map(np.testing.assert_array_equal, quick, usual)\n"
        "assert shared == models_of[-1:]\n"
        "print('equal')"
    )
    environment = os.environ | {"XLA_FLAGS": ""}  # and not the tests' own level
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("equal\n"), done.stderr


@pytest.mark.slow
def test_on_a_cpu_no_weight_is_copied_in_a_step(monkeypatch):
    model = models.build("ViT-tiny", text=TEXT, **SMALL["ViT-tiny"])
    config = complete({"batch_size": 4, "optim": {"warmup_steps": 2}} | CLIP)
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    tx = optim.make_optimizer(config.optim, 100)
    pictures, tokens = jax.ShapeDtypeStruct((4, 16, 16, 3), np.uint8), jax.ShapeDtypeStruct((4, 8), np.int32)

    def copied():
        step = steps.make_train_step(model, tx, config, mesh, total_steps=100, steps_per_epoch=2)
        state = steps.Fresh(model, tx, 0, mesh, None).abstract
        program = step.lower(state, {"image": pictures, "tokens": tokens}).compile().as_text()
        return re.findall(r" copy\(%\S*kernel", program)

    assert not copied()
    monkeypatch.setattr(steps, "_counters_after", lambda norm, opt_state: opt_state)
    assert copied()


@pytest.mark.slow
def test_siglip_learns_its_bias():
    start = dict(logit_scale=np.log(10), logit_bias=-10.0)
    fields = {"loss": {"objective": "siglip", "terms": {"in_modal": 0.1}}, "optim": {"lr": 0.1, "warmup_steps": 0}}
    state, metrics, *_ = run("ViT-tiny", 1, count=3, fields=fields, model_fields=start)
    assert {"siglip", "rank_in_modal", "logit_bias"} <= metrics[0].keys() and "clip" not in metrics[0]
    assert metrics[0]["logit_scale"] == pytest.approx(10) and metrics[0]["logit_bias"] == -10
    expected = metrics[0]["siglip"] + 0.1 * metrics[0]["rank_in_modal"]
    assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)
    # Of 16 texts 15 do not fit, but at -10 the pair that does costs 10 nats: the bias must rise.
    assert -10 < metrics[1]["logit_bias"] < float(state.params["logit_bias"])


def test_the_logit_scale_stays_clamped():
    for raw, clamped in ((9.0, np.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        assert float(steps.clamp_logit_scale({"logit_scale": jnp.float32(raw)})["logit_scale"]) == np.float32(clamped)
    # In the step: a rate of 10 would throw the scale far beyond its bounds, were it not clamped.
    state, metrics, *_ = run("ViT-tiny", 1, count=2, fields={"optim": {"lr": 10.0, "warmup_steps": 0}} | CLIP)
    assert 0 <= float(state.params["logit_scale"]) <= np.float32(np.log(100))
    assert metrics[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-6)


def test_a_frozen_logit_scale_stays_as_it_began_and_one_that_would_be_clamped_is_refused():
    frozen = {"optim": {"lr": 10.0, "warmup_steps": 0, "rules": [("^logit_scale", {"freeze": True})]}} | CLIP
    state, metrics, *_ = run("ViT-tiny", 1, count=2, fields=frozen, model_fields=dict(logit_scale=4.7))
    assert float(state.params["logit_scale"]) == np.float32(4.7)
    assert metrics[1]["logit_scale"] == metrics[0]["logit_scale"] == pytest.approx(np.exp(4.7), rel=1e-6)
    for start in (4.7, -0.1):
        config = complete({"model": {"name": "ViT-tiny", "logit_scale": start}})
        with pytest.raises(InputError, match=rf"^config.model.logit_scale={start}. Expected 0 to ln 100 = 4.605"):
            session.build_model(config, Vocabulary(64, 63))


@pytest.mark.parametrize("epochs, expected", [(2, [0, 0, 2, 2, 2, 2]), (1, [0] * 6), (None, [0, 0, 1.5, 1.5, 2, 2])])
def test_the_ramp_may_have_epochs_of_its_own_and_keeps_its_last_weight(epochs, expected):
    config = complete({"batch_size": 4, "loss": {"ramp_epochs": epochs}, "optim": {"warmup_steps": 0}})
    model, tx = models.build("ViT-tiny", text=TEXT, **SMALL["ViT-tiny"]), optim.make_optimizer(config.optim, 6)
    update = steps.train_step_function(model, tx, config, None, total_steps=6, steps_per_epoch=2)
    batch = {"image": np.zeros((4, 16, 16, 3), np.uint8), "tokens": np.full((4, 8), 63, np.int32)}
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: steps.fresh_state(model, tx, 0)))

    @jax.jit
    def ramp(step):  # the rest of the step is not compiled
        return update(state.replace(step=step), batch, jax.random.key(0))[1]["rank_weight"]

    assert [float(ramp(step)) for step in range(6)] == expected


def test_flips_are_random_by_step_and_only_mirror():
    pixels = jnp.arange(64 * 4 * 4 * 3, dtype=jnp.uint8).reshape(64, 4, 4, 3)
    first, again, other = (images.random_flip(jax.random.key(k), pixels) for k in (0, 0, 1))
    assert jnp.array_equal(first, again) and not jnp.array_equal(first, other)
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(first, pixels, strict=True)])
    assert 16 < mirrored.sum() < 48
    np.testing.assert_array_equal(first[mirrored], np.asarray(pixels)[mirrored][:, :, ::-1])


def test_normalization_is_openais():
    pixels = np.array([[[[0, 128, 255]]]], np.uint8)
    expected = (pixels / 255 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array(
        [0.26862954, 0.26130258, 0.27577711]
    )
    np.testing.assert_allclose(images.normalize(pixels), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [dict(objective="rank", lambda_in=0.0, lambda_cross=0.0), dict(objective="clip", terms={"clip": 0.0})],
)
def test_an_objective_whose_weights_are_all_zero_is_refused(loss):
    with pytest.raises(InputError, match=r"config.loss: objective='(rank|clip)': every weight is zero"):
        steps.loss_spec(complete({"loss": loss}))


@pytest.mark.parametrize("trains", [True, False])
def test_each_process_needs_rows_of_its_own_in_an_evaluation_too(trains, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = complete({"batch_size": 8, "model": {"name": "ViT-tiny"}, "mesh": {"data": 1, "model": -1}})
    with pytest.raises(InputError, match="splits a batch in 1, over 2 processes"):
        Session(config, Vocabulary(None, None), trains=trains)


def test_a_start_traces_its_initialisation_once(monkeypatch):
    """A second or two of a large model's."""
    traced, fresh_state = [], steps.fresh_state
    monkeypatch.setattr(steps, "fresh_state", lambda *given: traced.append(1) or fresh_state(*given))
    monkeypatch.setattr(steps, "draw", lambda init, device: init.trace() and 1 / 0)
    tx = optim.make_optimizer(complete({"optim": {"warmup_steps": 2}}).optim, 100)
    model = models.build("ViT-tiny", text=TEXT)
    with pytest.raises(ZeroDivisionError):
        steps.Fresh(model, tx, 0, make_mesh({"data": -1}, jax.devices()[:1]), None).state()
    assert traced == [1]
