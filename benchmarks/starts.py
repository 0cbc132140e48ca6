"""A small training run for benchmarks/faults.py: how it is started, as a process of its own, and what it must leave."""

import contextlib
import csv
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.quick_compile import XLA_FLAGS
from rankclip_jax.common import commands
from rankclip_jax.common.metrics_file import OF_THE_MACHINE

STEPS = 24


def prepare(folder: Path) -> None:
    """Settings for all starts, and the data: 48 small pictures with captions."""
    cache = {"DIR": folder / "jax_cache", "MIN_COMPILE_TIME_SECS": 0, "MIN_ENTRY_SIZE_BYTES": 0}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.pop("DIR"))
    os.environ |= {f"JAX_PERSISTENT_CACHE_{key}": str(value) for key, value in cache.items()}
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "data.csv", "w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["image", "caption"])
        for i in range(48):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "images" / f"{i}.png")
            rows.writerow([f"images/{i}.png", f"picture {i} of {'a red circle' if i % 2 else 'a blue square'}"])
    commands.quiet_tensorflow()
    pipeline = ("input_pipeline.captions", "input_pipeline.pipeline", "clu.metric_writers")
    # Imports alone: JAX has no backend yet, so that a fork is safe. No start goes through the modules' objects, and so
    # copies their pages: a fifth of its processor time.
    commands.imported("rankclip_jax.train.__main__", *pipeline, "matplotlib.figure")


def flags(folder: Path, workdir: Path) -> list[str]:
    """The run: 24 steps of 8 pictures with the contrastive loss alone, whose step JAX can cache, saving every 2."""
    return [
        "--config=configs/shapes.py",
        f"--workdir={workdir}",
        "--config.data.format=csv",
        f"--config.data.train={folder / 'data.csv'}",
        "--config.data.val=None",
        "--config.loss.objective=clip",
        "--config.batch_size=8",
        "--config.epochs=4",
        "--config.log_every=1",
        "--config.optim.warmup_steps=2",
        "--config.model.image_size=16",
        "--config.model.context_length=16",
        "--config.model.vision={'layers':(1,1),'width':8,'stem':'small'}",
        "--config.model.text={'layers':1,'width':32,'heads':2}",
        "--config.checkpoint.every_steps=2",
        "--config.checkpoint.keep=3",
        "--config.eval.zero_shot={}",
        "--config.eval.retrieval={}",
        "--config.eval.geometry={}",
    ]


class Start:
    """A process that runs the command line; what it prints goes to a file."""

    def __init__(self, arguments: list[str], log: Path, before: Callable | None = None):
        """`before`: called in the process before the command line."""
        self.log, self.begin = log, time.monotonic()
        log.write_text("")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setpgid(0, 0)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            code = _run(arguments, before)
        except BaseException as error:
            print(f"the campaign itself failed: {error!r}", file=sys.stderr, flush=True)
            code = 99
        os._exit(code)

    def wait(self, until: Callable[[], bool] = lambda: False, timeout: float = 3600) -> int | None:
        """The exit code (-9: killed), or None as soon as `until()`."""
        while time.monotonic() < self.begin + timeout:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if until():
                return None
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        raise TimeoutError(f"hangs: {self.text()[-500:]}")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def reached(self, step: int) -> Callable[[], bool]:
        return lambda: bool(re.search(rf"^step {step}/", self.text(), re.MULTILINE))

    def error(self) -> str:
        """Its error line; AssertionError if there is not exactly one, or a traceback."""
        lines = [line for line in self.text().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.text(), f"not one clear line: {self.text()[-3000:]}"
        return lines[0]


def _run(arguments, before) -> int:
    from rankclip_jax.train import __main__ as train

    sys.argv = ["rankclip_jax.train", *arguments]
    try:
        if before:
            before()
        train.main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else 1
    else:
        code = 0
    import jax

    sys.stdout.flush()
    jax.distributed.shutdown()  # as Python does at a normal exit
    return code


def outcome_of(workdir: Path) -> tuple:
    """What must be equal: every line of numbers, and the last checkpoint's positions and fingerprints."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in rows]
    return numbers, json.loads((workdir / "checkpoints" / str(STEPS) / "data" / "metadata").read_text())


def saves_begun(workdir: Path, seen: set, count: int) -> bool:
    """Whether `count` saves have begun since the first call with the set `seen`, which it fills."""
    with contextlib.suppress(OSError):
        seen |= {path.name for path in (workdir / "checkpoints").iterdir() if "orbax-checkpoint-tmp" in path.name}
    return len(seen) >= count


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def short(line: str) -> str:
    """A line for the table, without the folders of this run of the campaign."""
    line = re.sub(r"/\S*/(?=run\d|small_disk|data\.csv|images|file/run)", "", line)
    return line if len(line) < 160 else line[:157].rpartition(" ")[0] + " ..."
