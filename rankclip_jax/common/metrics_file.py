"""metrics.jsonl: the numbers of a run, a line a time."""

import json
import time
from pathlib import Path

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import write_whole

# What is not the same in a run that is trained again, or resumed.
OF_THE_MACHINE = ("images_per_second", "images_read_per_second", "data_wait", "tflops_per_device", "mfu")
OF_THE_MACHINE += ("seconds", "start")


def now() -> str:
    """2026-11-26 10:33 UTC"""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def read_metrics(workdir: str | Path) -> list[dict]:
    """The lines of WORKDIR/metrics.jsonl; a last line cut off by a crash is left out.

    Raises:
      InputError: another line is not an object with a step.
    """
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise InputError(f"{path} line {number} is not JSON; fix or delete it") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"{path} line {number} is not an object with a step; fix or delete it")
        rows.append(row)
    return rows


class MetricsFile:
    """Appends to WORKDIR/metrics.jsonl. Opened for a run that resumes at `step`, it drops what came after.

    The first line of each start has `start`: when that was, and `about`. Each line has `seconds` since then.
    """

    def __init__(self, workdir: str | Path, step: int, about: dict | None = None):
        path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file, self._begin = path.open("a"), time.monotonic()
        self._start: dict = {"start": {"date": now(), **(about or {})}}

    def write(self, step: int, numbers: dict) -> None:
        """One line: the step and the numbers."""
        seconds = round(time.monotonic() - self._begin, 1)
        self._file.write(json.dumps({"step": step, **numbers, "seconds": seconds, **self._start}) + "\n")
        self._start = {}
        self._file.flush()

    def close(self) -> None:
        self._file.close()
