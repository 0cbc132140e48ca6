"""The numbers of a run: metrics.jsonl, the console, and the curves as a picture."""

import json
import time
from pathlib import Path

from rankclip_jax.errors import InputError
from rankclip_jax.files import whole, write_whole


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
                raise InputError(f"{path} line {number} is not JSON; mend or delete it") from None
    return rows


class MetricsFile:
    """Appends to WORKDIR/metrics.jsonl. Opened for a run that goes on at `step`, it drops what came after."""

    def __init__(self, workdir: str | Path, step: int):
        path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")

    def write(self, step: int, numbers: dict) -> None:
        """One line: the step and the numbers."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()


class Progress:
    """Console lines with rate and time left."""

    def __init__(self, step: int, total_steps: int, batch_size: int):
        self._total, self._batch = total_steps, batch_size
        self._step, self._time = step, time.monotonic()

    def line(self, step: int, epoch: int, numbers: dict, waited: float, read: int) -> tuple[str, dict[str, float]]:
        """Returns the line for `step`, and the speed since the last one.

        Args:
          waited: seconds in which the devices had no data.
          read: samples that this process read, whether usable or not.
        """
        now = time.monotonic()
        seconds = max(now - self._time, 1e-9)
        rate = (step - self._step) / seconds
        self._step, self._time = step, now
        left = time.strftime("%H:%M:%S", time.gmtime((self._total - step) / max(rate, 1e-9)))
        shown = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        speed = {
            "images_per_second": round(rate * self._batch, 1),
            "images_read_per_second": round(read / seconds, 1),
            "data_wait": round(min(waited / seconds, 1.0), 4),
        }
        images = f"{speed['images_per_second']:.0f} images/s"
        waits = f" (waits for data {100 * speed['data_wait']:.0f} %)" if speed["data_wait"] >= 0.01 else ""
        return f"step {step}/{self._total}  epoch {epoch}  {shown}  {images}{waits}  {left} left", speed

    def pause(self) -> float:
        """Time spent since is not training; call the result of this with `resume`."""
        return time.monotonic()

    def resume(self, paused: float) -> None:
        """Ends a pause, so that evaluation does not count in the rate."""
        self._time += time.monotonic() - paused


def table(results: dict[str, dict[str, float]], title: str = "zero-shot", percent: bool = True) -> str:
    """A row for each set. Counts (int) as they are, the rest in per cent, or with four decimals."""
    columns = list(dict.fromkeys(key for row in results.values() for key in row))
    first = max(12, len(title) + 2, *(len(name) + 2 for name in results))
    widths = [max(11, len(column) + 2) for column in columns]
    lines = [title.ljust(first) + "".join(c.rjust(w) for c, w in zip(columns, widths, strict=True))]

    def cell(row, column):
        value = row.get(column)
        if value is None or isinstance(value, int):
            return "" if value is None else f"{value:,}"
        return f"{100 * value:.2f} %" if percent and column != "l2" else f"{value:.4g}"

    for name, row in results.items():
        lines.append(name.ljust(first) + "".join(cell(row, c).rjust(w) for c, w in zip(columns, widths, strict=True)))
    return "\n".join(lines)


def plot_curves(workdir: str | Path) -> Path:
    """Draws loss and zero-shot accuracy over the steps to WORKDIR/curves.png."""
    from rankclip_jax import figures  # which reads metrics by way of this file

    path = Path(workdir) / "curves.png"
    with whole(path) as part:
        figures.curves({"": workdir}).savefig(part, format="png")
    return path
