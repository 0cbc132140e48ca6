"""config.profile: a trace of some steps, for TensorBoard's or XProf's profile page."""

from pathlib import Path
from typing import Any

import jax


class Trace:
    """Records the steps from `first` to `last` of config.profile into WORKDIR/profile; nothing where that is None."""

    def __init__(self, steps: tuple[int, int] | None, workdir: str | Path):
        self._first, self._last = steps or (None, None)
        self._folder, self._running = Path(workdir) / "profile", False
        self._began = self._now = 0  # the first step that came, and the last; 0: none

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._first and self._now and not self._began <= self._first <= self._now:
            asked = self._first, self._last
            print(f"no trace: config.profile={asked}, and the steps were {self._began} to {self._now}")

    def before(self, step: int) -> None:
        """To be called before a step is handed to the devices."""
        self._began, self._now = self._began or step, step
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """To be called with the step's result; waits for the last one, so that the trace has its end."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was recorded."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"trace of the steps from {self._first}: {self._folder}")
