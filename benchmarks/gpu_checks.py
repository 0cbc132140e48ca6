"""The checks of benchmarks/gpu.py, each in a process of its own: python -m benchmarks.gpu_checks agreement."""

import functools
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.train_contenders import made_batch
from rankclip_jax.common.errors import one_line

# Relative, over five steps. Twice to ten times what eight CPU devices in place of one change, whose sums have another
# order: float32 4e-6 and 2e-4, bfloat16 7e-4 and 3e-2. Attention without its mask changes 1e-2 and 2e-1.
TOLERANCE = {"float32": {"loss": 1e-4, "grad_norm": 2e-3}, "bfloat16": {"loss": 2e-3, "grad_norm": 6e-2}}
ATTENTION_TOLERANCE = {"output": 1e-2, "gradients": 1e-2}  # of the norm: rounding is 2e-3, a row too many among 17 4e-2
TINY = {
    "ViT": dict(name="ViT-tiny", image_size=32, vision=dict(width=64, layers=2, heads=1)),
    "ResNet": dict(name="RN-tiny", image_size=16, vision=dict(width=8, layers=(1, 1))),
}
CONFIG = {"batch_size": 32, "optim": {"lr": 1e-3, "warmup_steps": 1}}
TEXT = dict(width=64, heads=1, layers=2, vocab_size=64, eot_id=63, context_length=9)  # odd lengths, as CLIP's are


@functools.cache
def fresh(tower: str):
    """A tower's fresh state with AdamW, made on the CPU."""
    import jax

    from rankclip_jax import config as configs
    from rankclip_jax import models
    from rankclip_jax.parallel.mesh import make_mesh
    from rankclip_jax.train import optim
    from rankclip_jax.train import step as steps

    tx = optim.make_optimizer(configs.complete(CONFIG).optim, 100)
    on_cpu = make_mesh({"data": -1}, jax.devices("cpu")[:1])
    return jax.device_get(steps.Fresh(models.build(**TINY[tower], text=TEXT), tx, 0, on_cpu, None).state())


def tiny(tower: str, dtype: str, attention: str, device):
    """-> (configuration, state on the device, step, five batches); all that goes in is the same for any device."""
    import jax

    from rankclip_jax import config as configs
    from rankclip_jax import models
    from rankclip_jax.common.devices import devices_of
    from rankclip_jax.parallel.mesh import make_mesh, to_devices
    from rankclip_jax.parallel.sharding import state_shardings
    from rankclip_jax.train import optim
    from rankclip_jax.train import step as steps

    mesh = make_mesh({"data": -1}, [device])
    model = models.build(**TINY[tower], text=TEXT, dtype=dtype, attention=attention, devices=devices_of(mesh))
    config = configs.complete(CONFIG)
    tx = optim.make_optimizer(config.optim, 100)
    where = state_shardings(steps.Fresh(model, tx, 0, mesh, None).abstract, mesh, None)
    state = jax.device_put(fresh(tower), where)
    train = steps.make_train_step(model, tx, config, mesh, total_steps=5, steps_per_epoch=1)
    side, text = model.config.vision.image_size, model.config.text
    pixels, tokens = made_batch(5 * 32, side, text.context_length, text.vocab_size)
    rows = [slice(32 * i, 32 * (i + 1)) for i in range(5)]
    return config, state, train, [to_devices({"image": pixels[r], "tokens": tokens[r]}, mesh) for r in rows]


@functools.cache
def five_steps(tower: str, dtype: str, attention: str, device) -> list[dict]:
    """Loss and gradient norm of each; float32 products in full, where GPUs by default take TF32."""
    import jax

    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        _, state, train, batches = tiny(tower, dtype, attention, device)
        found = []
        for batch in batches:
            state, numbers = train(state, batch)
            found.append({key: float(numbers[key]) for key in ("loss", "grad_norm")})
    return found


def difference(found: list[dict], expected: list[dict]) -> dict[str, float]:
    """The largest relative difference of each number over the steps; NaN where one is not finite."""
    return {
        key: float(np.max([abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(found, expected, strict=True)]))
        for key in expected[0]
    }


def attention(device, length: int, causal: bool, implementation: str = "cudnn") -> dict[str, float]:
    """How far fused attention in bfloat16 is from matrix products on the CPU in float32, of their norm."""
    import jax
    import jax.numpy as jnp

    from rankclip_jax.models.attention import attend, attend_fused

    inputs = np.random.default_rng(0).normal(size=(4, 8, length, 128)).astype(jnp.bfloat16)

    def both(device, dtype, attend):
        *qkv, d_y = (jax.device_put(x.astype(dtype), device) for x in inputs)
        y, pull_back = jax.vjp(jax.jit(attend), *qkv)
        return [np.stack(jax.device_get(x)).astype(np.float32) for x in ([y], pull_back(d_y))]

    fused = both(device, jnp.bfloat16, lambda q, k, v: attend_fused(q, k, v, 2, causal, implementation))
    truth = both(jax.devices("cpu")[0], np.float32, lambda q, k, v: attend(q, k, v, 2, causal))
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(fused, truth, strict=True)]
    return dict(zip(ATTENTION_TOLERANCE, errors, strict=True))


def checked(case: str, against: str, errors: Callable[[], dict], tolerance: dict) -> dict:
    """A row of agreement: the errors, and whether each is within its tolerance."""
    row = {"case": case, "against": against, "tolerance": tolerance}
    try:
        found = errors()
    except Exception as error:  # of any kind: the other cases still run
        return row | {"error": one_line(error, kind=True), "ok": False}
    ok = all(found[key] <= limit for key, limit in tolerance.items())  # NaN is not
    return row | {"errors": {k: x if math.isfinite(x) else str(x) for k, x in found.items()}, "ok": ok}


def agreement() -> Iterator[dict]:
    """Rows of `checked`."""
    import jax

    from rankclip_jax import models
    from rankclip_jax.common.devices import devices_of
    from rankclip_jax.models.attention import choose_attention

    here, cpu = jax.devices()[0], jax.devices("cpu")[0]

    def steps(tower, dtype, attention, *other):
        return lambda: difference(five_steps(tower, dtype, attention, here), five_steps(tower, dtype, *other))

    for dtype in TOLERANCE:
        for tower in TINY:
            yield checked(f"{tower}, {dtype}", "CPU", steps(tower, dtype, "auto", "auto", cpu), TOLERANCE[dtype])
    try:
        choose_attention("cudnn", models.configure(**TINY["ViT"], text=TEXT), "bfloat16", devices_of([here]))
    except ValueError as error:
        yield {"case": "cuDNN attention", "left_out": str(error)}
        return
    errors = steps("ViT", "bfloat16", "auto", "xla", here)
    yield checked("ViT, bfloat16, cuDNN attention", "matrix products", errors, TOLERANCE["bfloat16"])
    for length, causal in ((9, True), (17, False), (50, False)):
        case = f"cuDNN attention alone, {length} rows{', causal' if causal else ''}"
        errors = functools.partial(attention, here, length, causal)
        yield checked(case, "matrix products, CPU, float32", errors, ATTENTION_TOLERANCE)


def checkpoint() -> Iterator[dict]:
    """One row: the arrays of a state after a step, and which of them were read back otherwise."""
    import jax

    from rankclip_jax.common.trees import by_name
    from rankclip_jax.weights.checkpoint import restore
    from rankclip_jax.weights.saving import Checkpoints

    config, state, train, batches = tiny("ViT", "float32", "auto", jax.devices()[0])
    state, _ = train(state, batches[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with tempfile.TemporaryDirectory() as folder:
        saving = Checkpoints(folder, config.checkpoint)
        saving.save(1, state, 32)
        saving.close()
        read = restore(folder, config.checkpoint, abstract)
    saved, got = by_name(state), by_name(read.state)
    wrong = [name for name, array in saved.items() if not same(array, got[name])]
    nbytes = sum(array.nbytes for array in saved.values())
    yield {"arrays": len(saved), "bytes": nbytes, "different": wrong, "ok": not wrong}


def same(a, b) -> bool:
    """Whether two arrays have the same bits, type and place."""
    return a.dtype == b.dtype and a.sharding == b.sharding and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def device() -> Iterator[dict]:
    """What JAX finds."""
    import jax

    found = jax.devices()[0]
    yield {
        "platform": found.platform,
        "device": found.device_kind,
        "memory": (found.memory_stats() or {}).get("bytes_limit", 2 * 2**30),
    }


def main() -> None:
    """In a child: the rows of one check, a line each; {"failed"} where it raised."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not a row
    try:
        for row in {f.__name__: f for f in (device, agreement, checkpoint)}[sys.argv[1]]():
            print(json.dumps(row), file=answers, flush=True)
    except Exception as error:  # of any kind: it becomes a line of the report
        traceback.print_exc()
        print(json.dumps({"failed": one_line(error, kind=True)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
