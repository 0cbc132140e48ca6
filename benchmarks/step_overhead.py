"""What the ranking terms cost in a whole training step: python -m benchmarks.step_overhead [--batch 256] ...

The same model and batch, one step with CLIP's loss and one with RankCLIP's in turn, so that a machine whose speed
drifts slows both alike. Needs no TensorFlow.
"""

import argparse
import time

import jax
import numpy as np

from rankclip_jax import models, optim, sharding
from rankclip_jax import step as steps
from rankclip_jax.config import complete


def prepare(objective: str, model, mesh, batch: int):
    """A jitted step that has run once, its state, and a batch of made data."""
    config = complete({"batch_size": batch, "loss": {"objective": objective}})
    tx = optim.make_optimizer(config.optim, 100_000)
    state = steps.init_state(model, tx, 0, mesh, config.sharding)
    train_step = steps.make_train_step(model, tx, config, mesh, total_steps=100_000, steps_per_epoch=1_000)
    side, text = model.config.vision.image_size, model.config.text
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, text.vocab_size, (batch, text.context_length), np.int32)
    tokens[:, -1] = text.eot_id
    pixels = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    data = steps.to_devices({"image": pixels, "tokens": tokens}, mesh)
    state, _ = jax.block_until_ready(train_step(state, data))
    return train_step, state, data


def main() -> None:
    """Prints seconds a step of each objective, every round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    flags = parser.parse_args()
    mesh = sharding.make_mesh({"data": -1})
    model = models.build(flags.model, dtype=flags.dtype)
    ready = {objective: prepare(objective, model, mesh, flags.batch) for objective in ("clip", "rankclip")}
    seconds = {objective: [] for objective in ready}
    for round_number in range(flags.rounds):
        for objective in ready:
            train_step, state, data = ready[objective]
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(train_step(state, data))
            seconds[objective].append(time.perf_counter() - begin)
            ready[objective] = train_step, state, data
            print(f"round {round_number + 1}  {objective:9} {seconds[objective][-1]:.3f} s", flush=True)
    clip, rank = np.median(seconds["clip"]), np.median(seconds["rankclip"])
    print(
        f"{flags.model}, batch {flags.batch}, {flags.dtype}, {jax.device_count()} {jax.default_backend()} device(s): "
        f"clip {clip:.3f} s, rankclip {rank:.3f} s, ratio {rank / clip:.4f}"
    )


if __name__ == "__main__":
    main()
