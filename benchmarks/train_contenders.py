"""The contenders of benchmarks/train_step.py and packed_text.py, each in a process of its own.

    train_contenders MODEL CONTENDER BATCH

A contender's texts have the whole context, or, with " | packed", " | padded" or " | padded to the longest" behind its
name, the lengths of CC3M's captions.
"""

import json
import resource
import sys
import time
import traceback

import numpy as np

from rankclip_jax import config as configs
from rankclip_jax.common.errors import one_line

OURS, PYTORCH = ("clip", "rankclip"), ("transformers", "transformers, compiled")
# Tokens: captions, counted with OpenAI's tokenizer and both marks in the first 97 captions of CC3M's validation set
# (Validation_GCC-1.1.0-Validation.tsv). They have 10.4 words on average, with a deviation of 4.4, and a median of 9;
# of the whole of CC3M, Sharma et al. 2018 (aclanthology.org/P18-1238) report 10.3, 4.5 and 9.
CC3M = {7: 7, 8: 6, 9: 10, 10: 11, 11: 15, 12: 5, 13: 15, 14: 6, 15: 3, 16: 2, 17: 2, 18: 4, 19: 2, 20: 1, 21: 1}
CC3M |= {22: 1, 23: 1, 24: 2, 25: 2, 33: 1}


def made_batch(batch: int, side: int, length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (B, side, side, 3) pictures and int32 (B, length) texts that end with the vocabulary's last token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary - 1, (batch, length), np.int32)
    tokens[:, -1] = vocabulary - 1
    return rng.integers(0, 256, (batch, side, side, 3), np.uint8), tokens


def captions(batch: int, length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 (B, length) texts that end as captions of CC3M do, and the lengths that such captions have (n,)."""
    rng, lengths = np.random.default_rng(1), np.repeat(*np.array(list(CC3M.items())).T)
    tokens = np.zeros((batch, length), np.int32)
    for row, count in zip(tokens, rng.choice(lengths, batch), strict=True):
        row[: count - 1], row[count - 1] = rng.integers(1, vocabulary - 1, count - 1), vocabulary - 1
    return tokens, lengths


def ours(name: str, objective: str, batch: int, form: str = ""):
    """-> (steps, memory, facts): steps(count) does so many of our steps, as rankclip_jax.train jits them, and gives the
    last loss; memory() is the peak in bytes on a GPU, and None on a CPU.

    `objective`: clip or rankclip, perhaps with a number of parts or config.model.vision.patch_dropout behind it:
    "rankclip, 4 parts", "rankclip, dropout 0.5"."""
    import jax

    from rankclip_jax import models
    from rankclip_jax.common import commands, packing
    from rankclip_jax.common.devices import devices_of
    from rankclip_jax.parallel.mesh import make_mesh, to_devices
    from rankclip_jax.train import flops, optim
    from rankclip_jax.train import step as steps

    commands.keep_freed_memory()
    on_cpu = jax.default_backend() == "cpu"
    batch = batch or (16 if on_cpu else 256)
    objective, _, how = objective.partition(", ")
    parts = int(how.removesuffix(" parts")) if how.endswith(" parts") else 1
    dropout = float(how.removeprefix("dropout ")) if how.startswith("dropout ") else 0.0
    fields = {"accumulate": parts, "model": {"vision": {"patch_dropout": dropout}}, "loss": {"objective": objective}}
    config = configs.complete({"batch_size": batch} | fields)
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    model = models.build(name, dtype="float32" if on_cpu else "bfloat16", devices=devices_of(mesh))
    tx = optim.make_optimizer(config.optim, 100_000)
    state = steps.Fresh(model, tx, 0, mesh, config.sharding).state()
    train_step = steps.make_train_step(model, tx, config, mesh, total_steps=100_000, steps_per_epoch=1_000)
    text = model.config.text
    pixels, tokens = made_batch(batch, model.config.vision.image_size, text.context_length, text.vocab_size)
    data, rows = to_devices({"image": pixels, "tokens": tokens}, mesh), None
    if form:
        tokens, lengths = captions(batch, text.context_length, text.vocab_size)
        data["tokens"] = to_devices(tokens, mesh)
    if form == "packed":
        rows = packing.rows_for(lengths, batch, 1, text.context_length)

    def run(count):
        nonlocal state
        for _ in range(count):
            if rows:  # in every step, as the host does
                units = tokens[None]
                packed = packing.pack(units, packing.lengths(units, text.eot_id), rows)
                data["tokens"] = to_devices(packed, mesh)
            state, numbers = train_step(state, data)
        jax.block_until_ready(state)
        return float(numbers["loss"])

    device = jax.devices()[0]
    peak = flops.peak_tflops(device.device_kind)
    facts = {"batch": batch, "device": device.device_kind, "peak": peak, "rows": rows or batch}
    facts["flops"] = flops.step_flops(model.config, batch, text_rows=rows, patches=model.config.kept_patches(dropout))

    def memory():
        return None if on_cpu else device.memory_stats()["peak_bytes_in_use"]

    return run, memory, facts


def pytorch(name: str, contender: str, batch: int, form: str = ""):
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
    if form:
        tokens, _ = captions(batch, text.context_length, text.vocab_size)
    if form == "padded to the longest":
        tokens = tokens[:, : tokens.any(axis=0).sum()]
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
    name, batch = sys.argv[1], int(sys.argv[3])
    contender, _, form = sys.argv[2].partition(" | ")
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    try:
        run, memory, facts = (pytorch if contender in PYTORCH else ours)(name, contender, batch, form)
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
