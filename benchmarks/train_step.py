"""The whole training step, ours and that of transformers.CLIPModel, in turn: python -m benchmarks.train_step.

    python -m benchmarks.train_step [--models ViT-B/32 RN50] [--batch 8 32] [--rounds 5] [--minutes 25]
    python -m benchmarks.train_step --only rankclip "transformers, compiled" --batch 32    # where memory is short
    python -m benchmarks.train_step --parts 1 2 4 8    # our step, the batch in so many parts (config.accumulate)
    python -m benchmarks.train_step --dropout 0 0.5    # with such shares of the patches left out
    python -m benchmarks.train_step --scaling          # memory and traffic of 1 to 256 devices, compiled only

Each contender lives in a process of its own and does one step when it is its turn, so that a machine whose speed
drifts slows all of them and each one's memory is its own; all are in memory together. A step is forward, backward and
AdamW on made pictures and texts: float32 on a CPU; bfloat16 (in PyTorch: autocast) on a GPU. PyTorch runs its model as
it is and, where torch.compile works, compiled; transformers has no counterpart to RN50. Both have one device. The
tables share the minutes equally; where they are too few, medians are those of fewer rounds. Needs no TensorFlow.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from benchmarks.train_contenders import OURS, PYTORCH
from rankclip_jax import config as configs
from rankclip_jax.train import plan
from rankclip_jax.train.targets import Target

ENVIRONMENT = {  # JAX takes only the GPU memory that it needs
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_CLIENT_MEM_FRACTION": "0.92",  # JAX would stop at three quarters, PyTorch does not
}
# Freed memory is kept for the next step, as ours keeps it (commands.keep_freed_memory). PyTorch is 7 % faster with one
# arena for all of its threads. --as-installed: without, as its users have it.
OF_PYTORCH = {"MALLOC_TRIM_THRESHOLD_": str(2**64 - 1), "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}


@contextlib.contextmanager
def killed_at(process: subprocess.Popen, end: float) -> Iterator[None]:
    """Inside, the process is killed when time.monotonic() reaches `end`."""
    killer = threading.Timer(max(0, min(end - time.monotonic(), threading.TIMEOUT_MAX)), process.kill)
    killer.daemon = True
    killer.start()
    try:
        yield
    finally:
        killer.cancel()


class Child:
    """A contender of benchmarks/train_contenders.py in its process, killed where it does not answer by `end`."""

    def __init__(self, name: str, contender: str, batch: int | None, end: float = float("inf")):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_contenders", name, contender, str(batch or 0)],
            env=ENVIRONMENT | (OF_PYTORCH if contender.startswith(PYTORCH) else {}) | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._end = end

    def run(self, steps: int) -> dict:
        """Its answer: a step's "seconds", the "loss", "memory" in bytes and facts, or "error"."""
        with killed_at(self._process, self._end):
            with contextlib.suppress(BrokenPipeError):  # it has died; what it said before is still to be read
                self._process.stdin.write(f"{steps}\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "out of time" if time.monotonic() >= self._end else "it died"}

    def end(self) -> None:
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def measure(
    name: str, contenders: Sequence[str], batch: int | None, rounds: int, steps: int = 1, end: float = float("inf")
) -> tuple[dict, dict]:
    """-> (facts of the machine and model, {contender: {"seconds": one of each round, "memory"} or {"error"}}).

    A round is so many steps of each contender in turn, which JAX and PyTorch hand to a GPU without waiting between."""
    children = {contender: Child(name, contender, batch, end) for contender in contenders}
    facts, found = {}, {}
    for contender, child in children.items():
        first = child.run(steps)  # compiles
        print(f"{name}, {contender}: {first.get('error', 'ready')}", file=sys.stderr, flush=True)
        found[contender] = first if "error" in first else {"seconds": [], "memory": 0}
        if "flops" in first:
            facts = facts or {key: value for key, value in first.items() if key not in ("seconds", "loss", "memory")}
    left = [contender for contender in contenders if "error" not in found[contender]]
    for _ in range(rounds):
        for contender in list(left):
            got = children[contender].run(steps)
            if "error" in got:  # the rounds that it has stand
                left.remove(contender)
                found[contender] = found[contender] if found[contender]["seconds"] else got
                continue
            found[contender]["seconds"].append(got["seconds"])
            found[contender]["memory"] = got["memory"]
    for child in children.values():
        child.end()
    return facts, found


def rows(facts: dict, found: dict) -> list[dict]:
    """The numbers of each contender that ran: rates, and times as a multiple of the first one's. None without facts,
    which ours give."""
    base, made = None, []
    for contender, result in found.items() if facts else ():
        if "error" in result:
            continue
        seconds = statistics.median(result["seconds"])
        base = base or seconds
        tflops = facts["flops"] / seconds / 1e12
        made.append(
            {
                "step": contender,
                "images_per_second": facts["batch"] / seconds,
                "seconds": seconds,
                "range": [min(result["seconds"]), max(result["seconds"])],
                "ratio": seconds / base,
                "tflops": tflops,
                "mfu": tflops / facts["peak"] if facts["peak"] else None,
                "memory": result["memory"],
            }
        )
    return made


def table(made: list[dict]) -> list[str]:
    """`rows` as lines of Markdown."""
    lines = [
        "| step | images/s | seconds (range) | time, first = 1 | TFLOP/s | MFU | memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in made:
        low, high = row["range"]
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
        lines.append(
            f"| {row['step']} | {row['images_per_second']:.3g} | {row['seconds']:.3g} ({low:.3g} to {high:.3g}) | "
            f"{row['ratio']:.2f} | {row['tflops']:.3g} | {mfu} | {row['memory'] / 1e9:.1f} |"
        )
    return lines


def compare(name: str, contenders: list[str], batch: int, rounds: int, end: float) -> None:
    """Prints a table of the contenders for one model; the first is the measure of the others. `end`: as of Child."""
    facts, found = measure(name, contenders, batch, rounds, end=end)
    made = rows(facts, found)
    if made:
        rounds = min(len(result["seconds"]) for result in found.values() if "error" not in result)
        print(f"\n{name}, batch {facts['batch']}, {facts['device']}, median of {rounds} interleaved rounds\n")
        print("\n".join(table(made)), flush=True)


PAIRS = 16  # a device, in `scaling`


def scaling(name: str = "ViT-B/32", counts: Sequence[int] = (1, 8, 64, 256)) -> None:
    """Prints what a model's RankCLIP step needs on so many devices with PAIRS pairs each."""
    print(f"{name}, rankclip, float32, {PAIRS} pairs a device\n")
    print("| devices | batch | sharding | states, MiB | activations, MiB | collectives a step, MiB of results |")
    print("|---|---|---|---|---|---|")
    for count in counts:
        for sharding, mesh in (("replicated", {"data": -1}), ("fsdp", {"data": 1, "fsdp": -1})):
            fields = {"batch_size": PAIRS * count, "mesh": mesh, "sharding": sharding}
            fields |= {"model": {"name": name, "scan_layers": True}, "tokenizer": {"vocab_size": 49408}}
            config = configs.complete(fields | {"optim": {"lr": 5e-4, "warmup_steps": 1}})
            found = plan.compile_step(config, Target("cpu", "cpu", count, None))
            kinds = sorted(found["collectives"].items())
            moved = ", ".join(f"{n} {kind} {size / 2**20:,.0f}" for kind, (n, size) in kinds)
            print(
                f"| {count} | {PAIRS * count:,} | {sharding} | {found['states'] / 2**20:,.0f} | "
                f"{found['temporary'] / 2**20:,.0f} | {moved or 'none'} |",
                flush=True,
            )


def main() -> None:
    """Runs what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B/32", "RN50"])
    parser.add_argument("--batch", type=int, nargs="+", default=[0], help="default: 16 on a CPU, 256 on a GPU")
    parser.add_argument("--only", nargs="+", choices=[*OURS, *PYTORCH], default=[*OURS, *PYTORCH])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=25, help="the most that it takes (25)")
    parser.add_argument("--parts", type=int, nargs="+", help="compare these numbers of parts instead")
    parser.add_argument("--dropout", type=float, nargs="+", help="compare these shares of patches left out instead")
    parser.add_argument("--as-installed", action="store_true", help="PyTorch with malloc's defaults")
    parser.add_argument("--scaling", action="store_true")
    flags = parser.parse_args()
    if flags.scaling:
        return scaling()
    if flags.as_installed:
        OF_PYTORCH.clear()
    tables = [(name, batch) for name in flags.models for batch in flags.batch]
    begin = time.monotonic()
    for number, (name, batch) in enumerate(tables, 1):
        contenders = [one for one in flags.only if one in OURS or name == "ViT-B/32"]
        if flags.parts:
            contenders = [f"rankclip, {parts} parts" for parts in flags.parts]
        if flags.dropout:
            contenders = [f"rankclip, dropout {share:g}" for share in flags.dropout]
        compare(name, contenders, batch, flags.rounds, begin + 60 * flags.minutes * number / len(tables))


if __name__ == "__main__":
    main()
