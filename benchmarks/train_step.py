"""The whole training step, ours and that of transformers.CLIPModel, in turn: python -m benchmarks.train_step.

    python -m benchmarks.train_step [--models ViT-B/32 RN50] [--batch 16] [--rounds 5]
    python -m benchmarks.train_step --parts 1 2 4 8    # our step, the batch in so many parts (config.accumulate)
    python -m benchmarks.train_step --scaling          # memory and traffic of 1 to 256 devices, compiled only

Each contender lives in a process of its own and does one step when it is its turn, so that a machine whose speed drifts
slows all alike and each one's memory is its own. A step is forward, backward and AdamW on made pictures and texts:
float32 on a CPU; bfloat16 (in PyTorch: autocast) on a GPU. PyTorch runs its model as it is and, where torch.compile
works, compiled; transformers has no counterpart to RN50. Needs no TensorFlow.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

from rankclip_jax import config as configs
from rankclip_jax.train import plan

OURS, PYTORCH = ("clip", "rankclip"), ("transformers", "transformers, compiled")
# Freed memory is kept for the next step, as rankclip_jax.train does; JAX takes only the GPU memory that it needs.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


def made_batch(batch: int, side: int, length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (B, side, side, 3) pictures and int32 (B, length) texts that end with the vocabulary's last token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary - 1, (batch, length), np.int32)
    tokens[:, -1] = vocabulary - 1
    return rng.integers(0, 256, (batch, side, side, 3), np.uint8), tokens


def ours(name: str, objective: str, batch: int | None):
    """-> (a function that does a step, facts): our step as rankclip_jax.train jits it.

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
    mesh = make_mesh({"data": -1})
    model = models.build(name, dtype="float32" if on_cpu else "bfloat16", devices=devices_of(mesh))
    tx = optim.make_optimizer(config.optim, 100_000)
    state = steps.init_state(model, tx, 0, mesh, config.sharding)
    train_step = steps.make_train_step(model, tx, config, mesh, total_steps=100_000, steps_per_epoch=1_000)
    text = model.config.text
    pixels, tokens = made_batch(batch, model.config.vision.image_size, text.context_length, text.vocab_size)
    data = to_devices({"image": pixels, "tokens": tokens}, mesh)

    def step():
        nonlocal state
        state, numbers = jax.block_until_ready(train_step(state, data))
        return float(numbers["loss"])

    device = jax.devices()[0]
    peak = flops.peak_tflops(device.device_kind)
    facts = {"batch": batch, "device": device.device_kind, "flops": flops.step_flops(model.config, batch), "peak": peak}

    def memory():
        return None if on_cpu else device.memory_stats()["peak_bytes_in_use"]

    return step, memory, facts


def pytorch(compiled: bool, batch: int | None):
    """-> the same of transformers.CLIPModel, whose defaults are ViT-B/32."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = batch or (16 if device.type == "cpu" else 256)
    model = CLIPModel(CLIPConfig()).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1, fused=True)
    forward = torch.compile(model) if compiled else model
    pixels, tokens = made_batch(batch, 224, 77, model.config.text_config.vocab_size)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
    tokens = torch.from_numpy(tokens).long().to(device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(input_ids=tokens, pixel_values=pixels / 127.5 - 1, return_loss=True).loss
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for the device

    def memory():
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else None

    return step, memory, {"batch": batch}


def contend(name: str, contender: str, batch: int | None) -> None:
    """In a child: a step for each line that comes in, and its seconds back."""
    print("{}", flush=True)  # it is alive; what follows may take minutes
    is_ours = contender not in PYTORCH
    step, memory, facts = ours(name, contender, batch) if is_ours else pytorch(contender == PYTORCH[1], batch)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - begin
        used = memory() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(facts | {"seconds": seconds, "loss": loss, "memory": used}), flush=True)


class Child:
    """A contender in its process; `step` is None where it died, as a compiler that is not there makes it."""

    def __init__(self, name: str, contender: str, batch: int | None):
        command = [sys.executable, "-m", "benchmarks.train_step", "--child", name, contender]
        self._process = subprocess.Popen(
            [*command, "--batch", str(batch or 0)],
            env=ENVIRONMENT | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._process.stdout.readline()

    def step(self) -> dict | None:
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(name: str, contenders: list[str], batch: int | None, rounds: int) -> None:
    """Prints a table of the contenders for one model; the first is the measure of the others."""
    children = {contender: Child(name, contender, batch) for contender in contenders}
    first = {}
    for contender, child in children.items():
        first[contender] = child.step()  # compiles
        print(f"{name}, {contender}: {'failed' if first[contender] is None else 'ready'}", file=sys.stderr, flush=True)
    first = {contender: facts for contender, facts in first.items() if facts}
    children = {contender: children[contender] for contender in first}
    if not children:
        return
    results = {contender: [] for contender in children}
    for _ in range(rounds):
        for contender, child in children.items():
            results[contender].append(child.step())
    for child in children.values():
        child.end()
    facts = next(iter(first.values()))
    base = np.median([result["seconds"] for result in next(iter(results.values()))])
    print(f"\n{name}, batch {facts['batch']}, {facts['device']}, median of {rounds} interleaved rounds\n")
    print("| step | images/s | seconds (range) | time, first = 1 | TFLOP/s | MFU | memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for contender, found in results.items():
        times = [result["seconds"] for result in found]
        seconds, low, high = np.median(times), min(times), max(times)
        tflops = facts["flops"] / seconds / 1e12
        mfu = f"{100 * tflops / facts['peak']:.1f} %" if facts["peak"] else ""
        print(
            f"| {contender} | {facts['batch'] / seconds:.3g} | {seconds:.3g} ({low:.3g} to {high:.3g}) | "
            f"{seconds / base:.2f} | {tflops:.3g} | {mfu} | {found[-1]['memory'] / 1e9:.1f} |"
        )


def scaling(a_device: int = 16) -> None:
    """Prints what ViT-B/32's RankCLIP step needs on 1 to 256 devices with `a_device` pairs each."""
    print(f"ViT-B/32, rankclip, float32, {a_device} pairs a device\n")
    print("| devices | batch | sharding | states, MiB | activations, MiB | collectives a step, MiB of results |")
    print("|---|---|---|---|---|---|")
    for count in (1, 8, 64, 256):
        for sharding, mesh in (("replicated", {"data": -1}), ("fsdp", {"data": 1, "fsdp": -1})):
            fields = {"batch_size": a_device * count, "mesh": mesh, "sharding": sharding}
            config = configs.complete(fields | {"model": {"name": "ViT-B/32", "scan_layers": True}})
            config.tokenizer.vocab_size = 49408
            found = plan.compile_step(config, {"count": count, "topology": None})
            kinds = sorted(found["collectives"].items())
            moved = ", ".join(f"{n} {kind} {size / 2**20:,.0f}" for kind, (n, size) in kinds)
            print(
                f"| {count} | {a_device * count:,} | {sharding} | {found['states'] / 2**20:,.0f} | "
                f"{found['temporary'] / 2**20:,.0f} | {moved or 'none'} |",
                flush=True,
            )


def main() -> None:
    """Runs what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B/32", "RN50"])
    parser.add_argument("--batch", type=int, default=0, help="default: 16 on a CPU, 256 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", type=int, nargs="+", help="compare these numbers of parts instead")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        return contend(*flags.child, flags.batch)
    if flags.scaling:
        return scaling()
    for name in flags.models:
        contenders = [*OURS, *(PYTORCH if name == "ViT-B/32" else ())]
        if flags.parts:
            contenders = [f"rankclip, {parts} parts" for parts in flags.parts]
        compare(name, contenders, flags.batch, flags.rounds)


if __name__ == "__main__":
    main()
