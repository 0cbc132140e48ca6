"""Optimisers, rules, averages and adapters in the step: devices, resuming, cost; what is read from their workdirs."""

import functools
import json
import re
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rankclip_jax import convert, inference, models
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.common.trees import by_name, nested
from rankclip_jax.config import complete, to_json
from rankclip_jax.inference.model import load
from rankclip_jax.parallel import sharding
from rankclip_jax.parallel.mesh import make_mesh, to_devices
from rankclip_jax.train import average, evaluate, loop, optim, rules
from rankclip_jax.train import step as steps
from rankclip_jax.train.session import build_model
from rankclip_jax.weights import checkpoint, lora, pretrained
from rankclip_jax.weights.saving import Checkpoints
from tests.support.made_models import CAPTIONS, VIT, drawn, drawn_like, make_variables, make_workdir

MODEL = dict(image_size=16, vision=dict(width=32, layers=2, heads=2))
TEXT = dict(width=32, heads=2, layers=2, vocab_size=64, eot_id=63, context_length=8)
LAST = [(r"resblocks_0/|conv1|embedding|ln_pre", {"freeze": True}), ("^visual/", {"lr": 0.1})]
SHALLOW = VIT | {tower: VIT[tower] | {"layers": 1} for tower in ("vision", "text")}
CASES = {
    "adafactor": dict(name="adafactor"),
    "muon, scanned": dict(name="muon"),
    "Lion, last blocks, averaged, scanned": dict(name="lion", lr=1e-4, rules=LAST, ema=0.9),
    "adapters, averaged": dict(lora=4, ema=0.9),
    "adapters of the last blocks, scanned": dict(lora=4, rules=[("resblocks_0/", {"freeze": True})]),
    "SigLIP, last blocks, averaged": dict(
        rules=[("attnpool|head|logit", {"lr": 2.0}), ("resblocks_0/|conv1|embedding", {"freeze": True})], ema=0.9
    ),
}
SIGLIP = dict(image_size=16, embed_dim=32, vision=dict(width=32, layers=2, heads=2, patch_size=8))
ONE_LAYER = ("adafactor", "adapters, averaged")  # of these cases all layers are treated alike


def prepared(optimiser, devices=8, scan=False, siglip=False, layers=2, start=None, **more):
    """(config, state, step, mesh of devices); of several, everything is split. `start`: the state, or one before its
    first step, drawn by NumPy: a fresh one's program takes as long to compile as a step's."""
    axes, kind = ({"data": 2, "fsdp": 4}, "fsdp") if devices == 8 else ({"data": 1}, None)
    config = dict(batch_size=16, optim={"lr": 1e-3, "warmup_steps": 1} | optimiser, mesh=axes, sharding=kind)
    config = complete(config | (dict(init_from="a model") if "lora" in optimiser else {}) | more)
    name, fields = ("SigLIP-B/16", SIGLIP) if siglip else ("ViT-tiny", MODEL)
    fields = fields | dict(text=TEXT | dict(layers=layers), vision=fields["vision"] | dict(layers=layers))
    model = models.build(name, scan_layers=scan, **fields)
    model = lora.Adapted(model, config.optim.lora) if config.optim.lora else model
    mesh, tx = make_mesh(axes, jax.devices()[:devices]), optim.make_optimizer(config.optim, 100)
    abstract = steps.Fresh(model, tx, 0, mesh, kind, config.optim).abstract
    if start is None:
        params = drawn_like(abstract.params)
        start = np.int32(0), params, {}, jax.device_get(tx.init(params))
        ema = average.begin(params, {}, config.optim) if config.optim.ema else None
        start = steps.AveragedState(*start, jax.device_get(ema)) if ema else steps.TrainState(*start)
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start, abstract)
    return config, state, steps.make_train_step(model, tx, config, mesh, total_steps=100, steps_per_epoch=2), mesh


def batch(number, mesh):
    rng = np.random.default_rng(number)
    tokens = rng.integers(1, 63, (16, 8)).astype(np.int32)
    tokens[:, -1] = 63
    return to_devices({"image": rng.integers(0, 256, (16, 16, 16, 3)).astype(np.uint8), "tokens": tokens}, mesh)


def assert_same(a, b):
    a, b = by_name(a), by_name(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_equal_one_and_a_resumed_run_an_uninterrupted_one(case, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "_SMALL", 0)
    siglip, losses, before = "SigLIP" in case, {}, None
    for devices in (1, 8):
        settings = dict(loss={"objective": "siglip" if siglip else "clip"}, layers=1 if case in ONE_LAYER else 2)
        settings |= dict(scan="scanned" in case, siglip=siglip, start=before)
        config, state, step, mesh = prepared(CASES[case], devices, **settings)
        before, losses[devices] = jax.device_get(state), []
        for number in range(4):
            state, metrics = step(state, batch(number, mesh))
            losses[devices].append(float(metrics["loss"]))
            if number == 1 and devices == 8:
                with Checkpoints(tmp_path, config.checkpoint) as checkpoints:
                    checkpoints.save(2, state, 2)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    resumed = checkpoint.restore(tmp_path, config.checkpoint, abstract).state
    for number in (2, 3):
        resumed, _ = step(resumed, batch(number, mesh))
    assert_same(resumed, state)
    assert losses[8] == pytest.approx(losses[1], rel=2e-4)
    treated, after, start = rules.treatments(config.optim, state.params), by_name(state.params), by_name(before.params)
    moved = {name for name in after if (np.asarray(after[name]) != start[name]).any()}
    assert moved == {name for name, treatment in treated.items() if treatment.frozen is not True}
    if config.optim.ema:  # of what is trained, between the start and the end
        mean = by_name(state.ema["params"])
        assert mean.keys() == moved
        assert all((np.asarray(mean[name]) != np.asarray(after[name])).any() for name in moved)


# Of pictures, some in the middle; of texts, all before the last block.
MIXED = [(r"visual/.*(_1/mlp|_0/attn/q)|text/.*(_0/|embedding)", {"freeze": True}), ("blocks_2/", {"lr": 0.3}), LAST[1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])  # quick: Muon's stacks, in test_optimisers.py
def test_scanned_layers_train_as_unrolled_ones_do(name):
    """With some of the blocks frozen, also of one kind of matrix, and in the middle: the stack is cut.

    eps above the gradients that are 0 but for rounding, as those of the keys' biases.
    """
    found, deep = {}, dict(vision=MODEL["vision"] | {"layers": 3}, text=TEXT)
    optim_of = dict(name=name, lr=1e-3, warmup_steps=1, eps=1e-4, schedule="constant", layer_lr_decay=0.9, rules=MIXED)
    config = complete(dict(batch_size=16, optim=optim_of, loss=dict(objective="clip")))
    plain = models.build("ViT-tiny", **MODEL | deep)
    fresh = drawn(plain)["params"]
    for scan in (False, True):
        network = models.build("ViT-tiny", scan_layers=scan, **MODEL | deep)
        mesh, tx = make_mesh({"data": 1}, jax.devices()[:1]), optim.make_optimizer(config.optim, 100)
        params = models.stack_layers(fresh) if scan else fresh
        before = jax.device_get(params)
        state = steps.TrainState(np.int32(0), params, {}, tx.init(params))
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))  # as a step leaves it: one program
        step = steps.make_train_step(network, tx, config, mesh, total_steps=100, steps_per_epoch=2)
        for number in range(2):
            state, _ = step(state, batch(number, mesh))
        size = sum(x.size for x in jax.tree.leaves(state.opt_state))
        after, names = models.unstack_layers(jax.device_get(state.params)), by_name(before).keys()
        assert by_name(state.params).keys() == names
        found[scan] = by_name(after), by_name(models.unstack_layers(before)), size, rules.count(config.optim, params)
    (a, start, *sizes), (b, *_) = found[False], found[True]
    assert sizes == list(found[True][2:])  # as many moments, and as many parameters said to be trained
    single = re.compile(MIXED[0][0])
    for key in a:
        np.testing.assert_allclose(a[key], b[key], atol=1e-6, err_msg=key)
        moved = (b[key] != start[key]).any()
        assert not moved if single.search(key) else moved or "k_proj/bias" in key, key


@functools.cache
def flops(case):
    """-> (operations of the step as XLA counts them before it compiles, size of the moments, parameters)."""
    optimiser = {
        "all": {},
        "last block": dict(rules=[(r"resblocks_0/|conv1|embedding|ln_pre", {"freeze": True})]),
        "heads": dict(rules=[("ln_post|/proj$|text_proj|ln_final|logit", {"freeze": False}), (".", {"freeze": True})]),
    }[case.removesuffix(", scanned")]
    config = complete(dict(batch_size=16, optim={"warmup_steps": 1} | optimiser, loss=dict(objective="clip")))
    model = models.build("ViT-tiny", text=TEXT, scan_layers="scanned" in case, **MODEL)
    mesh, tx = make_mesh({"data": 1}, jax.devices()[:1]), optim.make_optimizer(config.optim, 100)
    state = steps.Fresh(model, tx, 0, mesh, None, config.optim).abstract
    step = steps.make_train_step(model, tx, config, mesh, total_steps=100, steps_per_epoch=2)
    moments = sum(x.size for name, x in by_name(state.opt_state).items() if "/mu/" in name or "/nu/" in name)
    return step.lower(state, batch(0, mesh)).cost_analysis()["flops"], moments, state.params


@pytest.mark.slow
def test_what_is_frozen_costs_nothing():
    (every, moments, params), (last, fewer, _) = flops("all"), flops("last block")
    own = {name: leaf.size for name, leaf in by_name(params).items()}
    beginning = "blocks_0/", "conv1", "embedding", "ln_pre"
    assert moments == 2 * sum(own.values())
    frozen = sum(size for name, size in own.items() if any(part in name for part in beginning))
    assert fewer == 2 * (sum(own.values()) - frozen)
    # Forward and backward are 3 parts of each of two blocks; of the first only the forward part is left: 4 of 6.
    assert 0.6 < last / every < 0.75
    # Scanned, each part of the stack is one block, so that XLA's count, of one round of a loop, is of all blocks.
    scanned, same, _ = flops("last block, scanned")
    assert same == fewer and 0.97 < scanned / last < 1.03


def test_with_heads_alone_only_the_forward_pass_is_left():
    assert 0.3 < flops("heads")[0] / flops("all")[0] < 0.45


def test_the_state_of_a_run_without_new_keys_is_that_of_older_checkpoints():
    params = {"visual": {"proj": np.ones((2, 2), np.float32)}, "text": {"proj": np.ones((2, 2), np.float32)}}

    def names(**fields):
        tx = optim.make_optimizer(complete({"optim": fields | {"warmup_steps": 1}}).optim, 10)
        return list(by_name(tx.init(params)))

    own = [f"{moment}/{tower}/proj" for moment in ("mu", "nu") for tower in ("text", "visual")]
    assert names() == ["0/0/count", *(f"0/0/{name}" for name in own), "0/2/count"]
    assert names(grad_clip_norm=1.0)[0] == "1/0/count"
    assert names(layer_lr_decay=0.5)[0] == "0/0/0/count"
    inner = "inner_states/train/inner_state"
    assert names(freeze="text") == [f"{inner}/0/0/{x}" for x in ("count", "mu/visual/proj", "nu/visual/proj")] + [
        f"{inner}/0/2/count"
    ]


@pytest.mark.parametrize("scan", [False, True])
def test_merged_adapters_are_the_adapted_model(scan):
    words = Tokenizer.train(CAPTIONS, 400)
    config = complete(dict(model=VIT | {"scan_layers": scan}, optim=dict(lora=3), init_from="a model"))
    network, variables = make_variables(config, words)
    assert isinstance(network, lora.Adapted)
    kernel = "text/transformer/resblocks" + ("" if scan else "_0") + "/mlp/c_fc"
    adapted = {name.rpartition("/")[0] for name in by_name(variables["params"]["lora"])}
    assert kernel in adapted and len(adapted) == (2 if scan else 4) * 6  # q, k, v, out, c_fc, c_proj
    inputs = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32), words(CAPTIONS[:3], 16)
    apply = jax.jit(network.model.apply)
    with_adapters = jax.jit(network.apply)(variables, *inputs)
    plain = apply({"params": lora.merged(variables["params"])}, *inputs)  # by NumPy
    for a, b in zip(with_adapters, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    a, b = (by_name(variables["params"])[f"lora/{kernel}/{x}"].astype(np.float64) for x in "ab")
    expected = by_name(variables["params"])[f"{kernel}/kernel"] + 16 / 3 * np.matmul(a, b)
    np.testing.assert_allclose(by_name(lora.merged(variables["params"]))[f"{kernel}/kernel"], expected, atol=1e-6)
    base = {name: tree for name, tree in variables["params"].items() if name != "lora"}
    assert np.abs(apply({"params": base}, *inputs)[0] - plain[0]).max() > 1e-2


@pytest.mark.slow
def test_fresh_adapters_change_nothing():
    config = complete(dict(model=SHALLOW, optim=dict(lora=3), init_from="a model"))
    network = build_model(config, Tokenizer.train(CAPTIONS, 400))
    params, plain = jax.jit(  # one program, which draws the same numbers once
        lambda key: [model.init(key, *network.example_inputs())["params"] for model in (network, network.model)]
    )(jax.random.key(0))
    assert_same(lora.merged(params), plain)
    a = by_name(params["lora"])["visual/transformer/resblocks_0/mlp/c_proj/a"]
    assert a.shape == (256, 3) and 0.8 / 16 < np.abs(a).max() <= 1 / 16


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(), r"config.init_from=None. Expected a trained model, since config.optim.lora=8"),
        (dict(init_from="x", init_towers="text"), r"config.init_towers='text'. Expected both"),
        (dict(init_from="x", init_skip=("proj",)), r"config.init_skip=\('proj',\). Expected \(\)"),
    ],
)
def test_adapters_need_a_whole_trained_model(given, message):
    with pytest.raises(InputError, match=message):
        complete(given | {"optim": {"lora": 8}})


@pytest.mark.parametrize(
    "rule", [("ln_final", {"freeze": False}), ("token_embedding", {"weight_decay": 0.0}), ("c_fc/bias", {"lr": 0.1})]
)
def test_a_rule_for_what_adapters_leave_as_it_is_is_refused(rule):
    config = complete(dict(model=VIT, optim=dict(lora=3, rules=[rule]), init_from="a model"))
    _, variables = make_variables(config, Tokenizer.train(CAPTIONS, 400))
    with pytest.raises(InputError, match=rf"'{rule[0]}' is found in no parameter's name of an adapter or"):
        rules.treatments(config.optim, variables["params"])


def test_a_rank_above_the_matrices_is_refused():
    config = complete(dict(model=VIT, optim=dict(lora=64), init_from="a model"))
    with pytest.raises(InputError, match=r"config.optim.lora=64. Expected less than the sides of text/.*: 64, 64"):
        make_variables(config, Tokenizer.train(CAPTIONS, 400))


@pytest.fixture(scope="module")
def averaged_adapters(tmp_path_factory):
    """A workdir of a run with adapters and averages, made without training; its state."""
    path = tmp_path_factory.mktemp("made") / "run"
    config = complete(dict(model=VIT, batch_size=8, optim=dict(lora=3, ema=0.9, warmup_steps=1), init_from="a model"))
    words, path_of = Tokenizer.train(CAPTIONS, 400), path / "config.json"
    path.mkdir()
    words.save(path / "tokenizer.json")
    path_of.write_text(to_json(config))
    params, others = (make_variables(config, words, seed)[1]["params"] for seed in (0, 1))
    ema = {name: x for name, x in by_name(others).items() if "lora/" in name}
    state = steps.AveragedState(np.int32(3), params, {}, {}, {"params": nested(ema)})
    with Checkpoints(path, config.checkpoint) as checkpoints:
        checkpoints.save(3, state, 0)
    return path, state


def test_a_workdir_is_read_merged_and_averaged_by_choice(averaged_adapters, tmp_path, monkeypatch, capsys):
    path, state = averaged_adapters
    last, mean = pretrained.read(path), pretrained.read(path, ema=True)
    assert_same(last.variables["params"], lora.merged(state.params))
    assert_same(mean.variables["params"], lora.merged(steps.averaged(state).params))
    assert (last.averaged, mean.averaged, mean.step) == (False, True, 3)
    monkeypatch.setattr(sys, "argv", ["convert", str(path), str(tmp_path / "hf"), "--ema"])
    convert.main()
    assert_same(pretrained.read(tmp_path / "hf").variables["params"], mean.variables["params"])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "averaged over the steps, config.optim.ema = 0.9" in card and "LoRA of rank 3, merged" in card
    z = [load(path, ema=ema).encode_text("a cat") for ema in (False, True)]
    assert np.abs(z[0] - z[1]).max() > 1e-3


def test_averages_that_are_not_there(averaged_adapters, tmp_path):
    plain = make_workdir(tmp_path / "plain", VIT)
    with pytest.raises(InputError, match=r"plain has no averaged weights: its run has config.optim.ema=None"):
        pretrained.read(plain, ema=True)
    pretrained_folder = tmp_path / "x.pt"
    pretrained_folder.write_bytes(b"")
    with pytest.raises(InputError):
        inference.model.load(pretrained_folder, ema=True)


@pytest.mark.slow
def test_a_run_trains_adapters_and_evaluates_averages_beside(tmp_path, capsys, one_device, compiled_once):
    origin = make_workdir(tmp_path / "origin", SHALLOW)
    config = complete(
        dict(
            model=SHALLOW,
            init_from=str(origin),
            batch_size=16,
            loss=dict(objective="clip"),
            data=dict(train=32, val=16),
            eval=dict(
                zero_shot={"seen": {"format": "shapes", "path": "seen:8"}},
                every={"retrieval": None, "geometry": None},
                diagnostics=False,
            ),
            steps=2,
            optim=dict(lr=1e-2, warmup_steps=1, lora=4, ema=0.5),
        )
    )
    loop.train(config, tmp_path / "run")
    assert "of them trained" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (found,) = [row for row in rows if "zero_shot/seen/top1" in row]
    assert 0 <= found["zero_shot/seen/ema/top1"] <= 1 and found["val/clip/ema"] != found["val/clip"]
    settings = evaluate.settings(None, tmp_path / "run", [])
    results = evaluate.evaluate(settings, tmp_path / "run")
    assert results["zero_shot"]["seen"]["top1"] == pytest.approx(found["zero_shot/seen/top1"])
    assert results["zero_shot"]["seen/ema"]["top1"] == pytest.approx(found["zero_shot/seen/ema/top1"])
    own, theirs = pretrained.read(tmp_path / "run").variables["params"], pretrained.read(origin).variables["params"]
    near = {name: np.abs(x - by_name(theirs)[name]).max() for name, x in by_name(own).items()}
    assert near["text/text_projection"] == 0 < near["text/transformer/resblocks_0/mlp/c_fc/kernel"] < 0.5
