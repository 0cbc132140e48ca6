"""Seconds from a command to its first step, and where they go: python -m benchmarks.starting [--against CHECKOUT].

    python -m benchmarks.starting [--only demo] [--rounds 5]
    git worktree add ../before v0.1.0 && python -m benchmarks.starting --against ../before

The demo, and ViT-B/32 (configs/cc3m.py in float32, batch 8) on 300 tars of 10,000 pairs each, which are simulated as in
benchmarks/scale.py, their index included. Each start is a process of its own, ended when step 1 is shown; those of the
two checkouts take turns. The page cache is warm. About a minute a round, twice that with --against.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import scale

REPO = Path(__file__).parents[1]
# Prints a line at the end of each part: what it was, the time, and the seconds of processor.
CHILD = """
import importlib, json, os, resource, sys, time
def mark(part):
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps(["part", part, time.time(), used.ru_utime + used.ru_stime]), flush=True)
def after(owner, name, part):
    whole = getattr(owner, name)
    def both(*args, **kwargs):
        found = whole(*args, **kwargs)
        mark(part)
        return found
    setattr(owner, name, both)
found = importlib.import_module
def import_module(name, package=None):
    module = found(name, package)
    if name == "rankclip_jax.train.__main__":
        mark("Python, JAX and our imports")
        watch()
    return module
def watch():
    from rankclip_jax.train import opening, packed_batches, recorder
    opened = opening.open_data
    def open_data(*args, **kwargs):
        import tensorflow
        mark("TensorFlow's import")
        return opened(*args, **kwargs)
    opening.open_data = open_data
    after(opening, "open_data", "opening the data")
    after(opening, "open_session", "tokenizer and model")
    after(opening, "open_state", "parameters")
    after(opening, "open_batches", "the pipeline")
    after(packed_batches.PackedBatches, "__next__", "loggers and first batch")
    def write(*args, **kwargs):
        mark("what is left of the compilation, step 1")
        os._exit(0)
    recorder.Recorder.write = write
importlib.import_module = import_module
sys.argv = ["rankclip", "train", *sys.argv[1:]]
from rankclip_jax import cli
cli.main()
"""


def command(name: str, folder: Path) -> list[str]:
    """The words of the command line, without --workdir. Writes what it reads."""
    from rankclip_jax.common.tokenizer import Tokenizer

    if name == "demo":
        return ["shapes"]
    scale.make(folder / "shards", 300, 10_000)
    Tokenizer.train([f"picture {number}" for number in range(1000)], 512).save(folder / "tokenizer.json")
    return [
        "--config=configs/cc3m.py",
        "--config.batch_size=8",
        "--config.log_every=1",
        "--config.model.dtype=float32",
        f"--config.tokenizer.path={folder / 'tokenizer.json'}",
        "--config.data.format=webdataset",
        f"--config.data.train={folder / 'shards'}/*.tar",
        "--config.data.val=None",
    ]


def start(checkout: Path, words: list[str]) -> dict[str, tuple[float, float]]:
    """Part -> (seconds, seconds of processor) of one start."""
    with tempfile.TemporaryDirectory() as workdir:
        words = [sys.executable, "-u", "-c", CHILD, *words, f"--workdir={workdir}/run"]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        begin = time.time()
        done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    marks = [json.loads(line)[1:] for line in done.stdout.splitlines() if line.startswith('["part"')]
    if done.returncode or not marks or not marks[-1][0].endswith("step 1"):
        sys.exit(f"the start failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found, wall, used = {}, begin, 0.0
    for part, now, processor in marks:
        if part in found:  # the second batch, which is read before step 1 is shown
            continue
        found[part] = now - wall, processor - used
        wall, used = now, processor
    return found | {"together": (wall - begin, used)}


def table(found: dict[str, list[dict]]) -> list[str]:
    """Medians over the rounds, as lines of Markdown; `found`: "before" (perhaps) and "now" -> its starts."""
    median = {
        name: {part: [statistics.median(one[part][i] for one in starts) for i in (0, 1)] for part in starts[0]}
        for name, starts in found.items()
    }
    heads = [f"{name}, s (of processor)" for name in median] + ["now / before"] * (len(median) - 1)
    lines = [f"| part | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for part in median["now"]:
        cells = [f"{of[part][0]:.2f} ({of[part][1]:.2f})" for of in median.values()]
        if "before" in median:
            cells.append(f"{median['now'][part][0] / median['before'][part][0]:.2f}")
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Prints a table for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="a checkout of another version")
    parser.add_argument("--only", choices=["demo", "shards"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"before": options.against.resolve()} if options.against else {}
    checkouts["now"] = REPO
    for name in [options.only] if options.only else ["demo", "shards"]:
        with tempfile.TemporaryDirectory() as folder:
            words, found = command(name, Path(folder)), {which: [] for which in checkouts}
            for _ in range(options.rounds):
                for which, checkout in checkouts.items():
                    found[which].append(start(checkout, words))
        print(f"\n{name}, median of {options.rounds} rounds\n\n" + "\n".join(table(found)), flush=True)


if __name__ == "__main__":
    main()
