"""Patches left out in training (FLIP): which, in what steps, and that nothing else changes."""

import functools
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import sgd

from rankclip_jax import config as configs
from rankclip_jax import models
from rankclip_jax.common.devices import Devices
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.metrics_file import read_metrics
from rankclip_jax.models import images
from rankclip_jax.parallel.mesh import batch_sharding, make_mesh, to_devices
from rankclip_jax.train import flops, loop, opening, optim, plan
from rankclip_jax.train import step as steps
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.train.hlo import collectives
from rankclip_jax.train.recorder import Recorder
from rankclip_jax.train.schedule import patch_dropout_steps
from rankclip_jax.train.session import Session, Vocabulary
from rankclip_jax.weights import export
from tests.commands.test_train import numbers
from tests.support.made_models import drawn, made_state
from tests.train.test_block_order import cut_off
from tests.train.test_step import TEXT, flat
from tests.train.test_workdir import quick

GRID = dict(image_size=16, vision=dict(patch_size=4, width=32, layers=1, heads=2))  # 16 patches


def config_of(dropout=0.5, **fields):
    model = {"name": "ViT-tiny", "vision": {"patch_dropout": dropout}}
    return configs.complete({"batch_size": 16, "model": model, "optim": {"lr": 1e-3, "warmup_steps": 0}} | fields)


@functools.cache
def network(**fields):
    return models.build("ViT-tiny", text=TEXT, **GRID, **fields)


def made_batch(views=None):
    rng = np.random.default_rng(0)
    shape = (16,) if views is None else (16, views)
    tokens = rng.integers(1, 63, (*shape, 8)).astype(np.int32)
    tokens[..., -1] = 63
    return {"image": rng.integers(0, 256, (*shape, 16, 16, 3), np.uint8), "tokens": tokens}


def gradient(config, devices=1, views=None, **fields):
    """(loss, gradient) of the first step, the latter as a flat array: by gradient descent with a rate of 1."""
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    model = network(**fields)
    state = made_state(model, sgd(1.0), mesh, config.sharding)
    if "scan_layers" in fields:  # the values of the others
        state = state.replace(params=models.stack_layers(made_state(network(), sgd(1.0), mesh).params))
    before = flat(models.unstack_layers(state.params)["visual"])
    step = steps.make_train_step(model, sgd(1.0), config, mesh, total_steps=9, steps_per_epoch=9)
    state, metrics = step(state, to_devices(made_batch(views), mesh))
    return float(metrics["loss"]), before - flat(models.unstack_layers(state.params)["visual"])


def near(one, other):
    (loss, grad), (other_loss, other_grad) = one, other
    return abs(loss - other_loss) < 1e-5 and np.linalg.norm(grad - other_grad) < 1e-4 * np.linalg.norm(grad)


def test_drawn_patches_are_all_different_and_each_is_as_likely():
    drawn = np.asarray(images.draw_patches(jax.random.key(0), 4000, 16, 4))
    assert drawn.shape == (4000, 4) and drawn.dtype == np.int32
    assert all(len(set(row)) == 4 for row in drawn)
    # Each of 16 is kept by a row with 1/4: the deviation of the count is sqrt(4000 * 3 / 16) = 27.
    assert abs(np.bincount(drawn.ravel(), minlength=16) - 1000).max() < 5 * 27
    assert len(set(map(tuple, drawn))) > 3000  # of 43,680: rows are drawn apart
    assert (np.sort(images.draw_patches(jax.random.key(1), 3, 16, 16), axis=1) == np.arange(16)).all()
    mesh = make_mesh({"data": -1}, jax.devices()[:8])
    sharded = jax.jit(lambda: images.draw_patches(jax.random.key(0), 4000, 16, 4), out_shardings=batch_sharding(mesh))
    np.testing.assert_array_equal(sharded(), drawn)


@pytest.mark.parametrize("side, dropout, kept", [
    (224, 0.5, 98), (224, 0.75, 49), (224, 0.0, None), (112, 0.5, 24), (224, 0.9, 20), (224, 0.999, 1), (16, 0.6, 1)
])  # fmt: skip
def test_kept_patches(side, dropout, kept):
    assert models.configure("ViT-B/16", image_size=side).kept_patches(dropout) == kept
    assert models.configure("RN50").kept_patches(dropout) is None


@pytest.mark.parametrize("pool", ["class", "map"])
def test_only_the_kept_patches_and_the_class_token_are_seen(pool):
    model = network()
    if pool == "map":
        model = models.build("ViT-tiny", text=TEXT, image_size=16, embed_dim=32, vision=GRID["vision"] | {"pool": pool})
    rng = np.random.default_rng(0)
    variables = jax.device_put(drawn(model))
    pixels = rng.normal(size=(3, 16, 16, 3)).astype(np.float32)
    encode = jax.jit(lambda x, some: model.apply(variables, x, patches_BxK=some, method="encode_image"))
    kept = np.asarray(images.draw_patches(jax.random.key(2), 3, 16, 6))

    def painted(where):
        """The pictures with noise in the patches `where`, (3, k) numbers."""
        out = pixels.copy()
        for row, some in enumerate(where):
            for patch in some:
                y, x = 4 * (patch // 4), 4 * (patch % 4)
                out[row, y : y + 4, x : x + 4] = rng.normal(size=(4, 4, 3))
        return out

    left_out = [sorted(set(range(16)) - set(row)) for row in kept.tolist()]
    z = encode(pixels, kept)
    np.testing.assert_array_equal(encode(painted(left_out), kept), z)
    for k in range(6):
        assert (np.abs(encode(painted(kept[:, [k]]), kept) - z).max(axis=1) > 1e-4).all()
    # All of them, in any order, are the whole picture: each has the position that belongs to it.
    mixed = images.draw_patches(jax.random.key(3), 3, 16, 16)
    np.testing.assert_allclose(encode(pixels, mixed), encode(pixels, None), atol=2e-6)


def forward(config, batch=None):
    """Jitted step number, key -> metrics of the training step, whose gradient is not computed."""
    model, tx = network(), optim.make_optimizer(config.optim, 9)
    update = steps.train_step_function(model, tx, config, None, total_steps=9, steps_per_epoch=9)
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    state, batch = made_state(model, tx, mesh), batch or made_batch()
    return jax.jit(lambda step, key: update(state.replace(step=step), batch, key)[1] | {"grad_norm": 0})


def test_the_step_draws_by_seed_and_step():
    metrics = forward(config_of())
    losses = [metrics(jnp.int32(step), jax.random.key(seed))["loss"] for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert losses[0] == losses[1] and len(set(map(float, losses))) == 3


@pytest.mark.slow
def test_steps_of_whole_images_are_those_without_dropout():
    def program(config, **whole):
        mesh, model = make_mesh({"data": -1}, jax.devices()[:1]), network()
        tx = optim.make_optimizer(config.optim, 9)
        step = steps.make_train_step(model, tx, config, mesh, total_steps=9, steps_per_epoch=9, **whole)
        return step.lower(jax.eval_shape(lambda: steps.fresh_state(model, tx, 0)), made_batch()).as_text()

    assert program(config_of(), whole=True) == program(config_of(0.0)) != program(config_of())


def fields(views):
    return {"data": {"two_views": views is not None, "flip": True}, "loss": {"objective": "clip"}}  # sooner compiled


@pytest.mark.slow
@pytest.mark.parametrize("views", [None, 2])
def test_the_same_patches_however_it_is_computed(views):
    """In everything at once: other patches in any of it would give another gradient."""
    plain = gradient(config_of(0.75, **fields(views)), views=views)
    form = dict(devices=4, scan_layers=True, remat=True)
    assert near(plain, gradient(config_of(0.75, accumulate=2, **fields(views)), views=views, **form))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_more_moves_between_devices(parts):
    mesh, model, moved = make_mesh({"data": -1}, jax.devices()[:8]), network(scan_layers=True), []
    where = batch_sharding(mesh)
    batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for key, x in made_batch().items()}
    for dropout in (0.0, 0.5):
        config = config_of(dropout, accumulate=parts, loss={"objective": "clip"})
        state = steps.Fresh(model, sgd(1.0), 0, mesh, None).abstract
        step = steps.make_train_step(model, sgd(1.0), config, mesh, total_steps=9, steps_per_epoch=9)
        moved.append(collectives(step.lower(state, batch).compile().as_text()))
    assert moved[0] == moved[1] and "all-reduce" in moved[0]


def test_views_of_a_picture_leave_out_different_patches(monkeypatch):
    """Two equal views: without dropout their embeddings are equal, and with it they are not."""
    monkeypatch.setattr(steps, "_objective", lambda z_img, *_: (jnp.sum(z_img), {"z": z_img}))
    batch = made_batch(2)
    batch["image"][:, 1] = batch["image"][:, 0]
    for dropout in (0.0, 0.5):
        z_BxVxD = forward(config_of(dropout), batch)(jnp.int32(0), jax.random.key(0))["z"]
        apart = np.abs(z_BxVxD[:, 0] - z_BxVxD[:, 1]).max(axis=1)
        assert (apart > 1e-4).all() if dropout else (apart < 1e-6).all()


def test_evaluation_sees_whole_pictures():
    mesh, model = make_mesh({"data": -1}, jax.devices()[:1]), network()
    state = jax.eval_shape(lambda: steps.fresh_state(model, sgd(1.0), 0))
    programs = [steps.make_val_step(model, config_of(share), mesh).lower(state, made_batch()) for share in (0.0, 0.9)]
    assert programs[0].as_text() == programs[1].as_text()


def test_a_resnet_refuses_and_a_share_is_below_1():
    words = Vocabulary(64, 63)
    fields = {"name": "RN-tiny", "vision": {"patch_dropout": 0.5}}
    with pytest.raises(InputError, match=r"config\.model\.vision\.patch_dropout=0\.5: a ResNet has no patches. Exp"):
        Session(configs.complete({"batch_size": 16, "model": fields}), words)
    for key, value in (("patch_dropout", 1.0), ("patch_dropout", -0.1), ("patch_dropout_until", 1.5)):
        with pytest.raises(InputError, match=rf"config\.model\.vision\.{key}={value}. Expected a number"):
            configs.complete({"model": {"vision": {key: value}}})
    with pytest.raises(InputError, match="unknown vision field 'patch_drop'"):
        Session(configs.complete({"batch_size": 16, "model": {"name": "ViT-tiny", "vision": {"patch_drop": 1}}}), words)


def test_it_belongs_to_training_and_not_to_the_network():
    config = configs.complete({"model": {"name": "ViT-tiny", "vision": {"patch_dropout": 0.5, "layers": 2}}})
    assert configs.network(config.model)["vision"] == {"layers": 2}
    stored = config.to_dict()
    for key in ("patch_dropout", "patch_dropout_until"):  # as before the keys
        del stored["model"]["vision"][key]
    assert configs.completed(stored).model.vision.to_dict() == {
        "patch_dropout": 0.0, "patch_dropout_until": 1.0, "layers": 2
    }  # fmt: skip


@pytest.mark.parametrize("pool", ["class", "map"])
def test_operations_are_those_that_xla_counts(pool):
    model = models.build("ViT-tiny", image_size=128, embed_dim=192, vision={"pool": pool})  # 256 patches
    pixels, tokens = model.example_inputs(2)
    variables = jax.eval_shape(model.init, jax.random.key(0), pixels, tokens)
    kept = model.config.kept_patches(0.5)
    some = images.draw_patches(jax.random.key(0), 2, 256, kept)

    def towers(variables):
        z_img, z_txt, _ = model.apply(variables, pixels, tokens, patches_BxK=some)
        return z_img.sum() + z_txt.sum()

    counted = jax.jit(jax.grad(towers)).lower(variables).cost_analysis()["flops"]
    ours = flops.step_flops(model.config, 2, patches=kept) - 24 * 4 * model.config.embed_dim
    assert kept == 128 and 0.97 < ours / counted <= 1
    whole = flops.step_flops(model.config, 2)
    assert flops.step_flops(model.config, 2, patches=256) == whole > 1.8 * ours


def test_a_session_counts_the_operations_of_both_kinds_of_steps():
    model = {"name": "ViT-B/16", "vision": {"patch_dropout": 0.75}}
    session = Session(config_of(model=model), Vocabulary(64, 63))
    config = session.model.config
    assert session.step_tflop(False) == flops.step_flops(config, 16, patches=49) / 1e12
    assert session.step_tflop(False, whole=True) == flops.step_flops(config, 16) / 1e12


def test_the_first_steps_leave_patches_out():
    def vision(dropout, until):
        fields = {"patch_dropout": dropout, "patch_dropout_until": until}
        return configs.complete({"model": {"vision": fields}}).model.vision

    assert [patch_dropout_steps(vision(0.5, until), 1000) for until in (1.0, 0.9, 0.0)] == [1000, 900, 0]
    assert patch_dropout_steps(vision(0.0, 1.0), 1000) == 0
    for until, free in ((1.0, float("inf")), (0.9, 900)):  # how many steps a longer run would have in common
        fields = {"model": {"vision": vision(0.5, until).to_dict()}, "optim": {"schedule": "constant"}, "steps": 1000}
        assert opening.run_length(configs.complete(fields), 10) == (1000, free)


def test_the_last_checkpoint_from_which_a_run_can_be_lengthened_stays():
    def kept(until=1.0, dropout=0.5, **optim):
        vision = {"patch_dropout": dropout} | ({"patch_dropout_until": until} if dropout else {})
        config = configs.complete({"model": {"vision": vision}, "optim": {"warmup_steps": 10} | optim, "steps": 1000})
        return workdirs.kept_for_longer(config, opening.run_length(config, 10)[1])

    wsd = dict(schedule="wsd", decay_steps=100)
    assert kept(0.9, schedule="constant") == 900  # the last steps see whole images
    assert kept(schedule="constant") is kept(dropout=0.0, schedule="constant") is None  # any will do
    assert (kept(**wsd), kept(0.8, **wsd), kept(0.95, **wsd)) == (901, 800, 901)
    assert kept(0.9) is kept() is None  # a cosine's would be of the warm-up


@pytest.mark.slow
def test_a_run_leaves_patches_out_until_it_does_not_and_is_lengthened_and_resumed(
    tmp_path, capsys, one_device, compiled_once
):
    changes = ["loss.objective='clip'", "optim.schedule='constant'", "model.vision.patch_dropout=0.5"]
    changes += ["model.vision.patch_dropout_until=0.74"]
    run, whole, cut = tmp_path / "run", tmp_path / "whole", tmp_path / "cut"
    often, once = ["checkpoint.every_steps=2", "checkpoint.keep=1"], ["checkpoint.every_steps=7", "checkpoint.keep=9"]
    loop.train(quick(*changes, *often, "epochs=2"), run)  # 6 steps, 4 of them with half of the patches
    there = run / "checkpoints"
    assert sorted(int(path.name) for path in there.iterdir() if path.name.isdigit()) == [4, 6]
    shutil.rmtree(there / "6")  # so that it resumes among the steps with half of the patches: 7 of its 9
    loop.train(quick(*changes, *often, "epochs=3"), run)
    capsys.readouterr()
    loop.train(quick(*changes, *once, "epochs=3"), whole)
    assert capsys.readouterr().out.count("compiling the step") == 2
    cut_off(whole, cut, 7)  # and here with the first whole images
    loop.train(quick(*changes, *once, "epochs=3"), cut)
    said = capsys.readouterr().out
    assert "resuming from step 7 of 9" in said and said.count("compiling the step") == 1
    rows = [[row for row in numbers(folder) if "loss" in row] for folder in (run, whole, cut)]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 9


def test_the_speed_is_of_the_operations_that_were_done(tmp_path):
    config = configs.complete({"log": (), "batch_size": 4, "log_every": 2})
    tflop = lambda packed, whole: 1.0 if whole else 0.5  # noqa: E731
    devices = Devices("cpu", "cpu", None, 1)
    session = types.SimpleNamespace(config=config, devices=devices, packs=False, step_tflop=tflop)
    length = dict(start=0, total_steps=9, parameters=7)
    with Recorder(session, tmp_path, lambda step: 0.5, lambda: (0.0, 4), **length) as recorder:
        for step in range(1, 7):
            recorder.take(step, {"loss": 2.0, "grad_norm": 1.0}, False, whole=step > 3)
        recorder.flush()
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    each = {row["step"]: 4 * row["tflops_per_device"] / row["images_per_second"] for row in rows}
    assert each == pytest.approx({1: 0.5, 2: 0.5, 4: 0.75, 6: 1.0}, rel=1e-2)


def test_the_model_card_says_it():
    told = [export._training(config_of(share), 3, averaged=False) for share in (0.0, 0.25)]
    assert "patch dropout" not in told[0] and told[1]["patch dropout"] == "0.25"


def test_a_plan_says_what_is_left_out():
    for until, said in ((1.0, "98 of 196 patches"), (0.9, "98 of 196 patches, all of them in the last 10% of the")):
        config = configs.complete({"model": {"vision": {"patch_dropout": 0.5, "patch_dropout_until": until}}})
        assert plan._image(config, [98, 196]).startswith(said)
    assert plan._image(config, None) is None
