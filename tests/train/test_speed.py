"""What makes a step fast changes none of its numbers, and is there: fused attention, donation, policies, traces."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankclip_jax import config as configs
from rankclip_jax import models
from rankclip_jax.common.devices import Devices
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.common.trees import by_name, nested, overlaid
from rankclip_jax.config import complete
from rankclip_jax.parallel import compilation_cache
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.train import flops, optim
from rankclip_jax.train import step as steps
from rankclip_jax.train.profile import Trace
from rankclip_jax.train.session import Session, Vocabulary, build_model
from tests.support.made_models import drawn
from tests.train.test_step import CLIP, SMALL, TEXT


def make(dtype="float32", remat=False, name="ViT-tiny", **fields):
    config = complete({"batch_size": 16, "optim": {"warmup_steps": 2}} | fields)
    model = models.build(name, text=TEXT, **SMALL[name], dtype=dtype, remat=remat)
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    tx = optim.make_optimizer(config.optim, 100)
    state = steps.Fresh(model, tx, 0, mesh, None).abstract
    batch = {
        "image": jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.uint8),
        "tokens": jax.ShapeDtypeStruct((16, 8), jnp.int32),
    }
    train_step = steps.make_train_step(model, tx, config, mesh, total_steps=100, steps_per_epoch=2)
    return model, train_step, state, batch


@pytest.mark.slow
def test_the_state_is_donated():
    _, train_step, state, batch = make(**CLIP)
    memory = train_step.lower(state, batch).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size <= memory.alias_size_in_bytes <= 1.1 * size


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny"])
def test_bfloat16_is_of_the_towers_only(name):
    model, train_step, state, batch = make("bfloat16", name=name)
    new_state, metrics = jax.eval_shape(train_step, state, batch)
    for leaf in jax.tree.leaves((new_state, metrics)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    images, tokens = model.example_inputs(2)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, tokens)
    assert {z.dtype for z in jax.eval_shape(model.apply, variables, images, tokens)} == {jnp.dtype("float32")}
    text = train_step.lower(state, batch).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line or "convolution" in line]
    in_half = [line for line in products if "xbf16>) ->" in line]
    assert len(in_half) > len(products) / 2  # the rest: the resize and the loss, in float32


@pytest.mark.slow
def test_a_policy_changes_what_is_recomputed_not_the_gradient():
    model = make()[0]
    images, tokens = (jnp.ones_like(x) for x in model.example_inputs(2))
    params = drawn(model)

    def products(remat):
        model = make(remat=remat)[0]

        def loss(params):
            z_img, z_txt, scale = model.apply(params, images, tokens)
            return scale * jnp.vdot(z_img, z_txt)

        gradient = jax.jit(jax.grad(loss))
        return str(gradient.trace(params).jaxpr).count("dot_general"), lambda: gradient(params)

    found = {remat: products(remat) for remat in (False, "dots_saveable", "dots_with_no_batch_dims_saveable", True)}
    counts = [count for count, _ in found.values()]
    assert counts[0] == counts[1] < counts[2] < counts[3]
    policy, whole = (found[remat][1]() for remat in ("dots_with_no_batch_dims_saveable", False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), policy, whole)


def test_an_unknown_policy_is_refused():
    tokenizer = Tokenizer.train(["a red circle"], 64)
    with pytest.raises(InputError, match="remat='dots'. Expected one of False, True, dots_saveable"):
        build_model(complete({"model": {"name": "ViT-tiny", "remat": "dots"}}), tokenizer)


def test_a_trace_of_some_steps(tmp_path, capsys):
    for steps_traced, exists in ((None, False), ((3, 4), True)):
        trace = Trace(steps_traced, tmp_path)
        for step in range(1, 7):
            trace.before(step)
            trace.after(step, jnp.ones(4) + step)
        assert any(tmp_path.rglob("*.xplane.pb")) == exists
    assert capsys.readouterr().out.count("profile") == 1


@pytest.mark.parametrize("asked", [(7, 9), (1, 2)])
def test_steps_that_do_not_come_leave_no_trace_and_are_said(asked, tmp_path, capsys):
    with Trace(asked, tmp_path) as trace:
        for step in range(3, 7):
            trace.before(step)
            trace.after(step, jnp.ones(4))
    assert capsys.readouterr().out == f"no trace: config.profile={asked}, and the steps were 3 to 6\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla T4", 65),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_names_that_jax_has(kind, peak):
    assert flops.peak_tflops(kind) == peak


def test_utilisation_is_a_share_of_the_peak():
    assert flops.utilisation(16.0, Devices("cpu", "cpu", None, 8)) == {"tflops_per_device": 2.0}
    v5e = Devices("tpu", "TPU v5 lite", None, 8)
    assert flops.utilisation(788.0, v5e) == {"tflops_per_device": 98.5, "mfu": 0.5}


def few_layers(name):
    """At most two in each tower, or stage of one: fields of models.build."""

    def few(layers):
        return tuple(map(few, layers)) if isinstance(layers, tuple) else min(layers, 2)

    preset = models.PRESETS[name]
    return {"vision": {"layers": few(preset.vision.layers)}, "text": {"layers": few(preset.text.layers)}}


@pytest.mark.parametrize(
    "name",
    ["RN-tiny"] + [pytest.param(n, marks=pytest.mark.slow) for n in models.PRESETS if n != "RN-tiny" and "@" not in n],
)
def test_operations_are_those_that_xla_counts(name):
    """By XLA's own count of the unrolled towers, forward and backward, which only a CPU's backend gives uncompiled.

    Of deep towers a few layers, which are all alike; three are counted whole.
    """
    model = models.build(name, **{} if name in ("ViT-B/32", "SigLIP-B/16", "RN50") else few_layers(name))
    images, tokens = model.example_inputs(2)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, tokens)

    def towers(variables):
        z_img, z_txt, _ = model.apply(variables, images, tokens)
        return z_img.sum() + z_txt.sum()

    counted = jax.jit(jax.grad(towers)).lower(variables).cost_analysis()["flops"]
    ours = flops.step_flops(model.config, 2) - 24 * 4 * model.config.embed_dim  # the loss, which they lack
    assert 0.98 < ours / counted <= 1
    assert flops.step_flops(model.config, 2, views=2) == 2 * ours + 24 * 4 * model.config.embed_dim


SOME = {
    "LiT": ("ViT-tiny", r"^text/"),
    "last blocks": ("ViT-tiny", r"resblocks_[23]/|ln_post|ln_final|proj$|text_projection"),
    "heads": ("ViT-tiny", r"ln_post|ln_final|visual/proj|text_projection"),
    "values in the middle, and norms": ("ViT-tiny", r"visual/.*resblocks_2/attn/v_proj|text/.*resblocks_1/ln_2"),
    "matrices with adapters": ("ViT-tiny", r"(attn|mlp)/.*kernel$"),
    "MAP": ("SigLIP-B/16", r"attnpool|head"),
    "last stage": ("RN-tiny", r"layer4|attnpool|text_projection"),
    "shortcuts": ("RN-tiny", r"layer2_0/downsample|ln_final"),
    "text": ("RN-tiny", r"^text/"),
}


QUICK = ("last blocks", "matrices with adapters", "MAP", "last stage")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in SOME])
def test_operations_of_what_is_frozen_are_not_counted(case):
    name, pattern = SOME[case]
    small = dict(vision=dict(layers=4), text=dict(layers=3)) if name != "RN-tiny" else {}
    model = models.build(name, **small)
    images, tokens = model.example_inputs(2)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, tokens)
    every = by_name(variables["params"])
    trained = {key: x for key, x in every.items() if re.search(pattern, key)}

    def towers(trained, variables):
        own = variables | {"params": overlaid(variables["params"], nested(trained))}
        z_img, z_txt, _ = model.apply(own, images, tokens)
        return (z_img * z_txt).sum()  # a gradient needs both

    counted = jax.jit(jax.grad(towers)).lower(trained, variables).cost_analysis()["flops"]
    loss = 24 * 4 * model.config.embed_dim
    ours = flops.step_flops(model.config, 2, trained=trained) - loss
    assert 0.97 < ours / counted <= 1.001
    assert flops.step_flops(model.config, 2, trained=every) == flops.step_flops(model.config, 2)
    forward = flops.step_flops(model.config, 2, trained=()) - loss
    assert forward < ours < flops.step_flops(model.config, 2) - loss


def test_a_session_counts_what_its_rules_train():
    def tflop(scan=True, **optim):
        model = {"name": "ViT-tiny", "scan_layers": scan, "vision": {"layers": 2}, "text": {"layers": 2}}
        given = {"batch_size": 16, "model": model, "optim": optim, "init_from": "a model"}
        return Session(configs.complete(given), Vocabulary(64, 63)).step_tflop(False)

    last = [(r"resblocks_0/|conv1|embedding|ln_pre", {"freeze": True})]
    assert tflop(rules=last) == tflop(False, rules=last) < tflop(lora=4) < tflop() == tflop(False)
    assert tflop(freeze="vision") == tflop(rules=[("^visual/", {"freeze": True})]) < 0.7 * tflop()


def test_the_compilation_cache_keeps_out_of_cpus(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.enable("cpu")
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    try:
        compilation_cache.enable("tpu")
        assert jax.config.jax_compilation_cache_dir.endswith("rankclip_jax/xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
