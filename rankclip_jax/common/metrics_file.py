"""metrics.jsonl: the numbers of a run, a line a time."""

import json
from pathlib import Path

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import write_whole


def read_metrics(workdir: str | Path) -> list[dict]:
    """The lines of WORKDIR/metrics.jsonl; a last line cut off by a crash is left out."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path} line {number} is not JSON; fix or delete it") from None
    return rows


class MetricsFile:
    """Appends to WORKDIR/metrics.jsonl. Opened for a run that resumes at `step`, it drops what came after."""

    def __init__(self, workdir: str | Path, step: int):
        path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")

    def write(self, step: int, numbers: dict) -> None:
        """One line: the step and the numbers."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
