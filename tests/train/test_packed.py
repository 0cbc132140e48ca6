"""A step on packed captions is the step on padded ones: for every form of the step, and whatever the lengths are."""

import functools
import json
import math
import re

import jax
import numpy as np
import optax
import pytest

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.packing import Packed
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config import complete, load
from rankclip_jax.parallel.mesh import to_devices
from rankclip_jax.train import flops, loop
from rankclip_jax.train import step as steps
from rankclip_jax.train.hlo import collectives
from rankclip_jax.train.packed_batches import PackedBatches
from rankclip_jax.train.session import Session, Vocabulary
from tests.common.test_packing import EOT, captions
from tests.support.made_models import drawn, made_state
from tests.train.test_block_order import cut_off

BATCH, LENGTH = 32, 77
MODEL = dict(name="ViT-tiny", image_size=16, context_length=LENGTH)
MODEL |= dict(vision=dict(width=32, layers=1, heads=2), text=dict(width=32, heads=2, layers=2))


def session(devices=1, rows=(14, 32), model=None, mesh=None, **fields):
    """`rows`: config.model.pack_rows."""
    model = MODEL | {"pack_text": "on", "pack_rows": rows} | (model or {})
    optim = {"lr": 1e-3, "warmup_steps": 1}
    config = complete({"batch_size": BATCH, "model": model, "mesh": mesh or {"data": -1}, "optim": optim} | fields)
    return Session(config, Vocabulary(EOT + 1, EOT), devices=jax.devices()[:devices])


def batch_of(lengths, views=1, seed=0):
    """Pictures, and captions of these lengths (0: without an end of text)."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, views) if views > 1 else (BATCH,)
    pixels = rng.integers(0, 256, (*shape, 16, 16, 3)).astype(np.uint8)
    return {"image": pixels, "tokens": captions(np.broadcast_to(lengths, shape[::-1]).T, LENGTH, rng)}


def some_lengths(seed=0):
    return np.random.default_rng(seed).integers(2, 45, BATCH)


# All with the same rows, so that one program serves; there is one for packed and one for padded captions.
CASES = {
    "random": some_lengths(),
    "random, other": some_lengths(1),
    "all 77": 77,
    "all 2": 2,
    "all 77 but one": np.where(np.arange(BATCH) == 9, 2, 77),
    "no end of text": 0,
    "some without an end of text": some_lengths() * (np.arange(BATCH) % 5 > 0),
}


@functools.cache
def parameters():
    return drawn(session().model)["params"]


@functools.cache
def text_tower(devices):
    """-> (session, value and gradients of (parameters, tokens): a text tower over the devices, and its embeddings)."""
    run = session(devices, rows=(32, 32))
    weight_BxD = np.random.default_rng(3).normal(size=(BATCH, 128)).astype(np.float32)

    def weighed(params, tokens):
        z_BxD = run.model.apply({"params": params}, tokens, method="encode_text")
        return (z_BxD * weight_BxD).sum(), z_BxD

    return run, parameters(), jax.jit(jax.value_and_grad(weighed, has_aux=True))


def close(of, expected, name, scale=None):
    assert np.abs(of - expected).max() <= 1e-6 * np.abs(expected if scale is None else scale).max(), name


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("case", CASES)
def test_embeddings_and_gradients_of_any_lengths(case, devices):
    run, params, value_and_grad = text_tower(devices)
    tokens = batch_of(CASES[case])["tokens"]
    packed = run.pack(tokens)
    assert packed.tokens.shape == (devices, BATCH // devices, LENGTH)
    ((_, z), grads), ((_, z_packed), grads_packed) = (
        value_and_grad(params, to_devices({"tokens": x}, run.mesh)["tokens"]) for x in (tokens, packed)
    )
    close(z_packed, z, "embeddings")
    found = zip(*map(jax.tree_util.tree_leaves_with_path, (grads, grads_packed)), strict=True)
    for (path, grad), (_, grad_packed) in found:
        scale, name = None, jax.tree_util.keystr(path)
        if "attn" in name and re.search("[qk]_proj'\\]\\['bias", name):
            # Sums that cancel: a key's bias shifts all logits alike, and so has no gradient; a query's has a small one.
            scale = grads["text"]["transformer"][path[2].key]["attn"]["q_proj"]["kernel"]
        close(grad_packed, grad, name, scale)


def gradients(run, *batches):
    """One step on each -> its metrics, each parameter's gradient, and the text of its program."""
    tx = optax.trace(0.0)  # which keeps the gradients in its state: sooner compiled than Adam
    state = made_state(run.model, tx, run.mesh, run.config.sharding)
    start, where = jax.device_get(state), jax.tree.map(lambda x: x.sharding, state)
    step = steps.make_train_step(run.model, tx, run.config, run.mesh, total_steps=10, steps_per_epoch=2)
    for batch in batches:
        # A step frees the state that it is given.
        given = jax.device_put(start, where), to_devices(batch, run.mesh)
        program = step.lower(*given).compile()
        state, metrics = program(*given)
        found = jax.tree_util.tree_leaves_with_path(state.opt_state.trace)
        found = {jax.tree_util.keystr(path): np.asarray(g) for path, g in found}
        yield {key: float(value) for key, value in metrics.items()}, found, program.as_text()


def of(objective):
    return dict(loss={"objective": objective})


SCANNED = {"scan_layers": True, "remat": "dots_saveable", "text": MODEL["text"]}  # of two layers
FORMS = {  # with each objective, but not each with each: all read the same embeddings
    "clip": of("clip"),
    "accumulated, two views": of("clip") | dict(accumulate=2, data={"two_views": True}),
    "rankclip, frozen": of("rankclip") | dict(optim={"warmup_steps": 1, "freeze": "text"}),
    "siglip, accumulated, fsdp": of("siglip") | dict(accumulate=2, mesh={"data": 1, "fsdp": 4}, sharding="fsdp"),
    "cyclip, scanned, rematerialised, tensor": of("cyclip")
    | dict(model=SCANNED, mesh={"data": 4, "model": 2}, sharding="tensor"),
    "rank, rematerialised, fsdp+tensor": of("rank")
    | dict(model={"remat": True}, mesh={"data": 2, "fsdp": 2, "model": 2}, sharding="fsdp+tensor"),
}
QUICK = ("clip",)


@functools.cache
def both(form):
    """gradients of a step of this form on padded captions, and on the same ones packed."""
    devices = math.prod(FORMS[form].get("mesh", {"data": 8}).values())
    fields = FORMS[form]
    model = {"text": MODEL["text"] | {"layers": 1}} | fields.get("model", {})
    run = session(devices, (3, 4), **fields | {"model": model})
    batch = batch_of(some_lengths(), views=1 + run.config.data.two_views)
    packed = run.pack(batch["tokens"], run.config.accumulate)
    assert packed.tokens.shape[1] < packed.ends.shape[1]  # fewer rows than captions
    return list(gradients(run, batch, batch | {"tokens": packed}))


@pytest.mark.parametrize("form", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FORMS])
def test_every_form_of_the_step(form):
    (metrics, grads, _), (metrics_packed, grads_packed, _) = both(form)
    for key, value in metrics.items():
        assert metrics_packed[key] == pytest.approx(value, rel=1e-5), key
    # Rounding of the embeddings comes through the loss to all gradients.
    largest = max(np.abs(grad).max() for grad in grads.values())
    for name, grad in grads.items():
        assert np.abs(grads_packed[name] - grad).max() <= 2e-6 * largest, name


def test_no_row_of_the_tower_leaves_its_device():
    padded, packed = (collectives(program) for _, _, program in both("clip"))
    assert padded == packed and set(padded) == {"all-gather", "all-reduce", "reduce-scatter"}


class Stream:
    """TrainBatches, as far as PackedBatches knows them."""

    def __init__(self, batches):
        self.position, self.read, self._batches = 0, 0, iter(batches)

    def __next__(self):
        batch = next(self._batches)
        if isinstance(batch, Exception):
            raise batch
        self.position += BATCH
        return batch


def test_what_does_not_fit_one_device_is_padded_on_all():
    run = session(8, (3, 4))
    fits, overflows = batch_of(some_lengths()), batch_of(np.where(np.arange(BATCH) // 4 == 5, 77, 9))
    stream = Stream([fits, overflows, fits, InputError("torn"), fits])
    batches = PackedBatches(run, stream, 4)
    assert isinstance(next(batches)["tokens"], Packed) and batches.position == BATCH
    np.testing.assert_array_equal(next(batches)["tokens"], overflows["tokens"])
    assert isinstance(next(batches)["tokens"], Packed) and batches.position == 3 * BATCH
    with pytest.raises(InputError, match="torn"):
        next(batches)
    assert next(batches, None) is None  # the fifth was not asked for
    assert next(PackedBatches(session(8, None, {"pack_text": "off"}), Stream([fits]), 1)) is fits


def test_operations_are_those_of_the_rows():
    run = session(8, (3, 4), accumulate=2)
    config, text = run.model.config, run.model.config.text
    # Two pairs a unit and ceil(3 * 2 / 4) rows: here, all; so of the base, with 3 rows for 4 pairs.
    assert run.step_tflop(True) == run.step_tflop(False) == flops.step_flops(config, BATCH) / 1e12
    run = session(8, (3, 4))
    a_row = 2 * (12 * text.width**2 * LENGTH + 2 * LENGTH**2 * text.width) * text.layers
    assert run.step_tflop(False) - run.step_tflop(True) == pytest.approx(3 * (BATCH / 4) * a_row / 1e12)


def test_texts_of_any_lengths_encode_as_padded():
    tokenizer = Tokenizer.train(["a red circle", "two blue squares and a green one"] * 9, 300)
    rng = np.random.default_rng(0)
    texts = ["red " * n for n in rng.integers(0, 90, 150)] + ["", "blue"] * 20
    fields = {"batch_size": BATCH, "model": MODEL}
    packed, padded = (
        Session(complete(fields | {"model": MODEL | {"pack_text": how}}), tokenizer) for how in ("auto", "off")
    )
    state = made_state(padded.model, optax.identity(), padded.mesh)
    expected = padded.encode_texts(state, texts)
    np.testing.assert_allclose(packed.encode_texts(state, texts), expected, atol=1e-6)
    assert packed.encode_texts(state, []).shape == (0, 128)


SMALL = ["steps=4", "batch_size=64", "data.train=128", "data.val=64", "eval.zero_shot={}", "log_every=1"]
SMALL += ["model.name=ViT-tiny", "model.image_size=16", "model.vision={'layers':1,'width':64,'heads':1,'patch_size':8}"]
SMALL += ["model.text={'layers':1,'width':64,'heads':1}", "optim.warmup_steps=1", "optim.schedule=constant"]
SMALL += ["loss.objective=clip", "loss.schedule=constant", "eval.every={'retrieval':None,'geometry':None}"]
SMALL += ["eval.diagnostics=False"]


@pytest.mark.slow
def test_a_run_packs_by_itself_and_resumes_to_the_bit(tmp_path, compiled_once):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(load("configs/shapes.py", SMALL), whole)
    cut_off(whole, parts, 2)
    loop.train(load("configs/shapes.py", SMALL), parts)
    model = json.loads((whole / "config.json").read_text())["model"]
    assert model["pack_text"] == "on" and model["pack_rows"][1] == 8 and model["pack_rows"][0] < 8
    of = {}
    for run in (whole, parts):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        of[run] = {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}
        assert all(row["padded_steps"] in (0, 1) for row in rows if "loss" in row)
        assert any("val/clip" in row for row in rows)
    assert of[whole] == of[parts] and len(of[whole]) == 4
    assert json.loads((parts / "config.json").read_text())["model"] == model
