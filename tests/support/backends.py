"""The programs of a run, each for any devices: what tests lower and compile for GPUs and TPUs that are not here."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rankclip_jax import doctor, models
from rankclip_jax.common.devices import Devices
from rankclip_jax.common.packing import Packed
from rankclip_jax.config import complete
from rankclip_jax.losses import embedding_diagnostics, gradient_cosine, objective_loss, plackett_luce_nll
from rankclip_jax.parallel.mesh import batch_sharding, batch_shards
from rankclip_jax.study.training import Programs
from rankclip_jax.train import optim
from rankclip_jax.train import step as steps
from rankclip_jax.weights import fingerprint
from rankclip_jax.weights.lora import Adapted

H100 = Devices("gpu", "NVIDIA H100 80GB HBM3", 9.0, 8)
V5E = Devices("tpu", "TPU v5 lite", None, 8)
VIT = dict(name="ViT-tiny", image_size=32, vision=dict(width=64, layers=1, heads=1))
RESNET = dict(name="RN-tiny", image_size=16, vision=dict(width=8, layers=(1, 1)))
SHORT = dict(vision=dict(width=8, layers=(1,)))  # its second stage takes long to compile
SIGLIP = dict(name="SigLIP-B/16", image_size=32, embed_dim=64, vision=VIT["vision"])
TEXT = dict(width=64, heads=1, layers=1)
BATCH, WORDS = 64, dict(vocab_size=64, eot_id=63, context_length=9)  # an odd length, as CLIP's is


def abstract(mesh: Mesh, shape: tuple, dtype, split: bool = True) -> jax.ShapeDtypeStruct:
    """A batch's array, split over the mesh, or one that all devices have."""
    where = batch_sharding(mesh) if split else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def made(mesh: Mesh, devices: Devices, model: dict = VIT, **changes):
    """-> (config, model, optimiser, abstract state, abstract batch)."""
    changes = {"batch_size": BATCH, "optim": {"warmup_steps": 1}} | changes
    rows = changes.pop("packed_rows", None)
    fields = {"dtype": "bfloat16"} | changes.pop("fields", {}) | model
    config = complete(changes)
    model = models.build(devices=devices, text=TEXT, **fields, **WORDS)
    model = Adapted(model, config.optim.lora) if config.optim.lora else model
    tx = optim.make_optimizer(config.optim, 100)
    state = steps.Fresh(model, tx, 0, mesh, config.sharding, config.optim).abstract
    side, views = model.config.vision.image_size, 1 + config.data.two_views
    array = functools.partial(abstract, mesh)
    batch = {"tokens": array((BATCH, *[2] * (views - 1), WORDS["context_length"]), jnp.int32)}
    if rows:
        units = batch_shards(mesh) * config.accumulate
        texts = array((units, rows, WORDS["context_length"]), jnp.int32)
        batch["tokens"] = Packed(texts, texts, array((units, BATCH * views // units), jnp.int32))
    if config.data.resize == "device":
        batch["image"] = array((BATCH, 48, 48, 3), jnp.uint8)
        batch |= {"size": array((BATCH, 2), jnp.int32), "windows": array((BATCH, views, 4), jnp.float32)}
    else:
        batch["image"] = array((BATCH, side, side, 3), jnp.uint8)
    return config, model, tx, state, batch


def train_step(mesh: Mesh, devices: Devices, **changes) -> tuple[Callable, tuple]:
    """The training step and its arguments."""
    config, model, tx, state, batch = made(mesh, devices, **changes)
    return steps.make_train_step(model, tx, config, mesh, total_steps=100, steps_per_epoch=2), (state, batch)


def validation(mesh: Mesh, devices: Devices) -> tuple[Callable, tuple]:
    config, model, _, state, batch = made(mesh, devices)
    return steps.make_val_step(model, config, mesh), (state, batch)


def embed(mesh: Mesh, devices: Devices, what: str) -> tuple[Callable, tuple]:
    _, model, _, state, batch = made(mesh, devices)
    batch.pop("tokens" if what == "image" else "image")
    return steps.make_embed_step(model), (state, batch)


def loss(mesh: Mesh, devices: Devices, with_mesh: bool = True, **options) -> tuple[Callable, tuple]:
    """The loss and its gradient, over the mesh or as a user calls it, without one."""
    z_BxD = abstract(mesh, (512, 32), jnp.float32)
    over = {"mesh": mesh} if with_mesh else {}
    value = jax.jit(jax.value_and_grad(lambda a, b: objective_loss(a, b, 14.0, **over, **options)[0], (0, 1)))
    return value, (z_BxD, z_BxD)


def lists(mesh: Mesh, devices: Devices) -> tuple[Callable, tuple]:
    scores = abstract(mesh, (8, 100), jnp.float32, split=False)
    return jax.jit(jax.value_and_grad(lambda s, r: plackett_luce_nll(s, r, decay="log").sum())), (scores, scores)


def diagnostics(mesh: Mesh, devices: Devices) -> tuple[Callable, tuple]:
    z_BxD = abstract(mesh, (64, 32), jnp.float32, split=False)
    return jax.jit(lambda a, b: (embedding_diagnostics(a, b), gradient_cosine(a, b, 14.0))), (z_BxD, z_BxD)


def study_epoch(mesh: Mesh, devices: Devices) -> tuple[Callable, tuple]:
    """An epoch of a study: one scan over data on the device."""
    config, model, *_ = made(mesh, devices, epochs=2)
    programs, count = Programs(model, config, 2 * BATCH), 2 * BATCH
    arrays = dict(image=((count, 48, 48, 3), np.uint8), size=((count, 2), np.int32), tokens=((count, 9), np.int32))
    data = {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}
    seed, rate = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    init, epoch = programs._one
    return epoch, (jax.eval_shape(init, seed, rate), seed, data)


def restoring(mesh: Mesh, devices: Devices) -> tuple[Callable, tuple]:
    """What checks a restored state."""
    *_, state, _ = made(mesh, devices)
    return jax.jit(lambda leaves: [fingerprint._sum(leaf) for leaf in leaves]), (jax.tree.leaves(state),)


def doctors_step(mesh: Mesh, devices: Devices) -> tuple[Callable, tuple]:
    """The step that the doctor runs, on one device."""
    return _doctors_step(mesh.devices.flat[0])


@functools.cache
def _doctors_step(device: jax.Device) -> tuple[Callable, tuple]:
    step, state, batch = doctor.small_program([device])  # draws its state
    return step, (state, batch)


# The meshes of programs that need other axes than "data".
AXES = {
    "step: fsdp": {"data": 1, "fsdp": -1},
    "step: muon": {"data": 1, "fsdp": -1},
    "step: tensor": {"data": -1, "model": 2},
    "step: fsdp+tensor": {"data": 1, "fsdp": -1, "model": 2},
}
# Each choice varied once, some of them together, against the base: a ViT in bfloat16 with RankCLIP's loss, replicated,
# one view.
TRAIN = {
    "base": {},
    "ResNet": dict(model=RESNET),
    "SigLIP": dict(model=SIGLIP, loss={"objective": "siglip"}, fields=dict(logit_bias=-10.0)),
    "SigLIP, ranked": dict(model=SIGLIP),
    "float32": dict(fields=dict(dtype="float32")),
    "float32 ResNet": dict(model=RESNET, fields=dict(dtype="float32")),
    "XLA's attention": dict(fields=dict(attention="xla")),
    **{name: dict(sharding=name) for name in ("fsdp", "tensor", "fsdp+tensor")},
    "in parts, scanned, remat": dict(accumulate=2, fields=dict(scan_layers=True, remat=True)),
    "frozen, released": dict(
        optim={"warmup_steps": 1, "freeze": "vision", "layer_lr_decay": 0.5}, loss={"form": "released"}
    ),
    "rules": dict(optim={"warmup_steps": 1, "rules": [("^visual/.*ln", {"freeze": True}), ("^text/", {"lr": 0.1})]}),
    "lion, top_k": dict(
        optim={"warmup_steps": 1, "name": "lion", "ema": 0.99},
        loss={"top_k": 10, "decay": "log", "keep_self": False},
    ),
    "adafactor": dict(optim={"warmup_steps": 1, "name": "adafactor"}, fields=dict(scan_layers=True)),
    "muon": dict(optim={"warmup_steps": 1, "name": "muon"}, fields=dict(scan_layers=True), sharding="fsdp"),
    "lora, two views": dict(optim={"warmup_steps": 1, "lora": 4}, init_from="a model", data={"two_views": True}),
    "packed": dict(packed_rows=2),
    "ResNet, packed, clip": dict(model=RESNET | SHORT, packed_rows=2, loss={"objective": "clip"}),
    "packed, in parts": dict(packed_rows=2, accumulate=2, data={"two_views": True}, fields=dict(scan_layers=True)),
    "host resize": dict(data={"resize": "host", "flip": True, "color_jitter": (0.1, 0.1, 0.1)}),
    **{name: dict(loss={"objective": name}) for name in ("clip", "rank", "cyclip")},
}
OTHERS = {
    "validation": validation,
    "embed images": functools.partial(embed, what="image"),
    "embed texts": functools.partial(embed, what="text"),
    "loss": loss,
    "loss without a mesh": functools.partial(loss, with_mesh=False),
    "plackett_luce_nll": lists,
    "diagnostics": diagnostics,
    "study": study_epoch,
    "restoring": restoring,
    "the doctor's step": doctors_step,
}
PROGRAMS = {f"step: {name}": functools.partial(train_step, **changes) for name, changes in TRAIN.items()} | OTHERS
