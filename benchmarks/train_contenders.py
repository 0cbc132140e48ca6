"""The contenders of benchmarks/train_step.py, each in a process of its own: train_contenders MODEL CONTENDER BATCH."""

import json
import resource
import sys
import time
import traceback

import numpy as np

from rankclip_jax import config as configs
from rankclip_jax.common.errors import one_line

OURS, PYTORCH = ("clip", "rankclip"), ("transformers", "transformers, compiled")


def made_batch(batch: int, side: int, length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (B, side, side, 3) pictures and int32 (B, length) texts that end with the vocabulary's last token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary - 1, (batch, length), np.int32)
    tokens[:, -1] = vocabulary - 1
    return rng.integers(0, 256, (batch, side, side, 3), np.uint8), tokens


def ours(name: str, objective: str, batch: int):
    """-> (steps, memory, facts): steps(count) does so many of our steps, as rankclip_jax.train jits them, and gives the
    last loss; memory() is the peak in bytes on a GPU, and None on a CPU.

    `objective`: clip or rankclip, perhaps with a number of parts behind it: "rankclip, 4 parts"."""
    import jax

    from rankclip_jax import models
    from rankclip_jax.common.devices import devices_of
    from rankclip_jax.parallel.mesh import make_mesh, to_devices
    from rankclip_jax.train import flops, optim
    from rankclip_jax.train import step as steps

    on_cpu = jax.default_backend() == "cpu"
    batch = batch or (16 if on_cpu else 256)
    objective, _, parts = objective.removesuffix(" parts").partition(", ")
    config = configs.complete({"batch_size": batch, "accumulate": int(parts or 1), "loss": {"objective": objective}})
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    model = models.build(name, dtype="float32" if on_cpu else "bfloat16", devices=devices_of(mesh))
    tx = optim.make_optimizer(config.optim, 100_000)
    state = steps.init_state(model, tx, 0, mesh, config.sharding)
    train_step = steps.make_train_step(model, tx, config, mesh, total_steps=100_000, steps_per_epoch=1_000)
    text = model.config.text
    pixels, tokens = made_batch(batch, model.config.vision.image_size, text.context_length, text.vocab_size)
    data = to_devices({"image": pixels, "tokens": tokens}, mesh)

    def run(count):
        nonlocal state
        for _ in range(count):
            state, numbers = train_step(state, data)
        jax.block_until_ready(state)
        return float(numbers["loss"])

    device = jax.devices()[0]
    peak = flops.peak_tflops(device.device_kind)
    facts = {"batch": batch, "device": device.device_kind, "flops": flops.step_flops(model.config, batch), "peak": peak}

    def memory():
        return None if on_cpu else device.memory_stats()["peak_bytes_in_use"]

    return run, memory, facts


def pytorch(name: str, contender: str, batch: int):
    """-> the same of transformers.CLIPModel, in the sizes of a preset that is a ViT."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from rankclip_jax import models
    from rankclip_jax.weights.architecture import to_hugging_face

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = batch or (16 if device.type == "cpu" else 256)
    config = models.configure(name)
    model = CLIPModel(CLIPConfig.from_dict(to_hugging_face(config))).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1, fused=True)
    forward = torch.compile(model) if contender == PYTORCH[1] else model
    text = config.text
    pixels, tokens = made_batch(batch, config.vision.image_size, text.context_length, text.vocab_size)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
    tokens = torch.from_numpy(tokens).long().to(device)

    def run(count):
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = forward(input_ids=tokens, pixel_values=pixels / 127.5 - 1, return_loss=True).loss
            loss.backward()
            optimizer.step()
        return loss.item()  # waits for the device

    def memory():
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else None

    return run, memory, {"batch": batch}


def main() -> None:
    """In a child: as many steps as each line that comes in says, and the seconds of one back, or {"error"}."""
    name, contender, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    try:
        run, memory, facts = (pytorch if contender in PYTORCH else ours)(name, contender, batch)
        for line in sys.stdin:
            begin = time.perf_counter()
            loss = run(int(line))
            seconds = (time.perf_counter() - begin) / int(line)
            used = memory() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer = facts | {"seconds": seconds, "loss": loss, "memory": used}
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:  # of any kind: a library that is not installed, a compiler, memory
        traceback.print_exc()
        print(json.dumps({"error": one_line(error, kind=True)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
