"""What one GPU makes of rankclip_jax: python -m benchmarks.gpu OUT.

    python -m benchmarks.gpu OUT [--minutes 8] [--only agreement checkpoint loss training] [--small]

Writes OUT.md, to read, and OUT.json, the same with every round, each time that something is measured:
agreement    five training steps of tiny models give the CPU's numbers
checkpoint   what is saved is read back bit for bit
loss         the ranking loss beside plain JAX and PyTorch
training     the step of ViT-B/32, ViT-B/16 and RN50 with CLIP's and RankCLIP's objective, and transformers'
What does not fit in the time or on the card is named and left out. A section that fails is a line, and the others
still run. The exit code is 1 where agreement or checkpoint failed, 2 where nothing was started. --small rehearses all
of it in a minute or two, on a CPU too. One GPU is used, no TensorFlow and no network; torch, transformers and allrank
only to compare.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import ranking_loss, train_step
from benchmarks.gpu_report import markdown
from benchmarks.train_contenders import OURS, PYTORCH
from rankclip_jax.common.errors import one_line

CHECKS = ("agreement", "checkpoint")
WEIGHTS = {"agreement": 5, "checkpoint": 2, "loss": 5, "training": 12}  # a section's part of the time that is left
LOSSES = ("ours", "plain JAX", "plain PyTorch", "PyTorch allrank")
# Of the card's memory, for the guard: plain JAX's by XLA's compiler for H100 at B = 16,384, the others' as on a CPU.
BYTES_PER_SCORE = ranking_loss.BYTES_PER_SCORE | {"plain JAX": 70}
BESIDE_PYTORCH = (*OURS, PYTORCH[1])


class Sizes(NamedTuple):
    """Batches of the loss; (model, batch, contenders) of training; rounds; a turn, in steps and in seconds."""

    batches: tuple = (1024, 4096, 8192, 16384, 32768)
    training: tuple = (
        ("ViT-B/32", 256, BESIDE_PYTORCH),
        ("ViT-B/16", 256, OURS),
        ("RN50", 256, OURS),
        ("ViT-B/32", 1024, OURS),
    )
    rounds: int = 5
    steps: int = 10
    turn: float = 0.2


SMALL = Sizes((32,), (("ViT-tiny", 4, BESIDE_PYTORCH),), rounds=2, steps=1, turn=0.0)


def checks(name: str, end: float = float("inf")) -> Iterator[dict]:
    """The rows of a function of gpu_checks.py, in a process of its own, killed at `end`."""
    command = [sys.executable, "-m", "benchmarks.gpu_checks", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, train_step.killed_at(process, end):
        for row in map(json.loads, process.stdout):
            if "failed" in row:
                raise RuntimeError(row["failed"])
            yield row
        if process.wait():
            raise RuntimeError("out of time" if time.monotonic() >= end else f"exit code {process.returncode}")


def no_time(expected: float, end: float) -> str | None:
    """Why what takes `expected` seconds is left out, if it is."""
    left = max(0, end - time.monotonic())
    return f"no time: it takes about {expected:.0f} s, and {left:.0f} s are left" if left < expected else None


def groups(names: Iterable[str], batch: int, limit: float) -> list[list[str]]:
    """Who takes turns: as many as the card holds at once, in this order; who alone needs more is in no group."""
    made, used = [], limit
    for name in names:
        needed = BYTES_PER_SCORE.get(name, 0) * batch**2
        if needed < limit:
            if used + needed >= limit:
                made.append([])
                used = 0
            made[-1].append(name)
            used += needed
    return made


def loss(sizes: Sizes, limit: float, end: float) -> Iterator[dict]:
    """A row a batch: what ranking_loss.measure found. `limit`: bytes that the card has."""
    expected, missing = 1.0, {}
    for batch in sizes.batches:
        if why := no_time(expected, end):
            yield {"batch": batch, "left_out": why}
            continue
        begin = time.monotonic()
        turns = groups([name for name in LOSSES if name not in missing], batch, limit)
        found = {name: missing.get(name, f"needs more than {limit / 2**30:.0f} GiB") for name in LOSSES}
        for names in turns:
            found |= ranking_loss.measure(batch, names, sizes.rounds, sizes.turn, end)
        yield {"batch": batch, "turns": turns, "found": found}
        missing = {name: got for name, got in found.items() if str(got).startswith("not installed")}
        calls = [statistics.median(got["seconds"]) for got in found.values() if not isinstance(got, str)]
        # The next batch starts as many processes, and each of its calls takes four times as long.
        expected = time.monotonic() - begin + 3 * (sizes.rounds + 1) * sum(calls)


def training(sizes: Sizes, end: float) -> Iterator[dict]:
    """A row a model: what train_step.measure found, and its numbers."""
    longest = 1.0  # of a contender
    for model, batch, contenders in sizes.training:
        row = {"model": model, "batch": batch}
        if why := no_time(longest * len(contenders), end):
            yield row | {"left_out": why}
            continue
        begin = time.monotonic()
        facts, found = train_step.measure(model, contenders, batch, sizes.rounds, sizes.steps, end)
        yield row | {"facts": facts, "found": found, "numbers": train_step.rows(facts, found)}
        longest = max(longest, (time.monotonic() - begin) / len(contenders))


def write(report: dict, out: str) -> None:
    """OUT.json and OUT.md."""
    Path(f"{out}.json").write_text(json.dumps(report, indent=1))
    Path(f"{out}.md").write_text(markdown(report))


def take(name: str, rows: Iterable[dict], report: dict, out: str) -> None:
    """Writes a section's rows into the report as they come; what they raise is the section's last line."""
    begin, section = time.monotonic(), {"rows": []}
    report["sections"][name] = section
    try:
        for row in rows:
            section["rows"].append(row)
            write(report, out)
    except Exception as error:  # of any kind: the other sections still run
        section["error"] = one_line(error, kind=True)
    section["seconds"] = time.monotonic() - begin
    write(report, out)


def failed(report: dict) -> list[str]:
    """The checks that failed: no row, one that is not ok, or an error."""

    def is_whole(section):
        rows = section["rows"]
        return rows and "error" not in section and all(row.get("ok", "left_out" in row) for row in rows)

    return [name for name in CHECKS if name in report["sections"] and not is_whole(report["sections"][name])]


def header(device: str) -> dict[str, str]:
    """With what it is measured: card, driver, versions, date."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        card = "no nvidia-smi"
    found = {"device": device, "card, memory, driver": card}
    for package in ("jax", "jaxlib", "torch", "transformers", "allrank"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}


def set_environment() -> None:
    """For the processes to come: both platforms for agreement (JAX takes the first), and memory as it is needed."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"
    for key, value in train_step.ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def refused(why: str) -> int:
    """The exit code of a run that does not start."""
    print(f"error: {why}", file=sys.stderr)
    return 2


def main() -> int:
    """Runs the sections; the exit code."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="writes OUT.md and OUT.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="what no longer fits is left out (default: 8)")
    parser.add_argument("--only", nargs="+", default=WEIGHTS, choices=WEIGHTS, help="some of the sections")
    parser.add_argument("--small", action="store_true", help="a rehearsal with tiny sizes, whose times mean nothing")
    flags = parser.parse_args()
    out = flags.out.removesuffix(".md")
    if Path(f"{out}.json").exists() or Path(f"{out}.md").exists():
        return refused(f"{out}.json or {out}.md is there already: give another OUT")
    set_environment()
    try:
        (found,) = checks("device")
    except RuntimeError as error:
        return refused(f"JAX does not start: {error}")
    if found["platform"] != "gpu" and not flags.small:
        return refused(f'JAX finds no GPU, only {found["device"]}. Run: pip install "jax[cuda13]", or try --small')
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if flags.small else Sizes()
    report = {"header": header(found["device"]), "small": flags.small, "sizes": sizes._asdict(), "sections": {}}
    end = begin + 60 * flags.minutes - 10  # the last processes need some seconds to stop
    wanted = [name for name in WEIGHTS if name in flags.only]
    with tempfile.TemporaryDirectory() as cache:
        # XLA keeps its choice of kernels there: RankCLIP's step gets CLIP's, and compiles sooner.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        for i, name in enumerate(wanted):
            left = end - time.monotonic()
            part = left * WEIGHTS[name] / sum(WEIGHTS[later] for later in wanted[i:])
            print(f"{name}: at most {part:.0f} s", file=sys.stderr, flush=True)
            until = time.monotonic() + part
            if name in CHECKS:
                rows = checks(name, until)
            else:
                rows = training(sizes, until) if name == "training" else loss(sizes, 0.97 * found["memory"], until)
            take(name, rows, report, out)
    print(f"{out}.md and {out}.json, in {(time.monotonic() - begin) / 60:.1f} minutes")
    for name in failed(report):
        print(f"{name} FAILED")
    return 1 if failed(report) else 0


if __name__ == "__main__":
    sys.exit(main())
