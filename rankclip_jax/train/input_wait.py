"""How long the devices stand idle because the next batch is not there, and what to do about it."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from rankclip_jax.common.tasks import cores

WORTH_SAYING = 0.15  # share of the time


class InputWait:
    """Takes batches from the pipeline and measures the wait for them.

    The host runs ahead of the devices, so its own waiting costs nothing while the step before is still running. A
    thread notes when each step ends, and only what of the wait comes after that counts.
    """

    def __init__(self, batches: Any):
        """`batches`: an iterator with `read`, the samples that it has read so far (TrainBatches)."""
        self._batches, self._read = batches, batches.read
        self._waits = []
        self._step_end: Future | None = None
        self._thread = ThreadPoolExecutor(1)

    def __iter__(self) -> "InputWait":
        return self

    def __next__(self) -> dict:
        begin = time.monotonic()
        batch = next(self._batches)
        if self._step_end is not None:
            self._waits.append((begin, time.monotonic(), self._step_end))
        return batch

    def step_started(self, result: jax.Array) -> None:
        """Says that a step was handed to the devices, of which `result` is an output."""
        self._step_end = self._thread.submit(lambda: (jax.block_until_ready(result), time.monotonic())[1])

    def close(self) -> None:
        """Ends the thread, at the end of its last step."""
        self._thread.shutdown(wait=False)

    def take(self) -> tuple[float, int]:
        """Since the last call: seconds of idle devices, and the samples read by this process, bad ones included."""
        waits, self._waits = self._waits, []
        read, self._read = self._batches.read - self._read, self._batches.read
        return sum(max(0.0, end - max(begin, step_end.result())) for begin, end, step_end in waits), read


def advice(share: float, read_per_second: float, resize: str) -> str:
    """One line for a run that waits for data a `share` of its time."""
    remedy = (
        "set config.data.resize=device"
        if resize == "host"
        else "store large pictures smaller (python -m input_pipeline.prepare ... --short-side 288, for a model of 224 "
        "pixels), or give this host more cores"
    )
    return (
        f"input-bound: the devices waited for data {100 * share:.0f} % of the time; this host reads "
        f"{read_per_second:.0f} images/s with {cores()} cores; {remedy}"
    )
