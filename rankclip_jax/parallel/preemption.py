"""Being asked to stop: SIGTERM, which is also how Cloud TPU, Kubernetes and SLURM give notice."""

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # saved and stopped; start again to resume (all codes: common/commands.py)


class Preempted(Exception):  # noqa: N818 -- not an error: the run was asked to stop, saved, and can resume
    """The state is saved."""


class Notice:
    """Whether to save and stop now, agreed among all processes. As a context: handlers are put back at its end.

    Of one process SIGTERM is watched here. Of many, JAX watches it, and its coordination service finds a step that
    none of them has passed yet: whichever of them got the signal, all save that step.
    """

    def __init__(self) -> None:
        self._received: list[bool] = []
        self._before: Any = None
        self._agreed = jax.distributed.is_initialized()

    def __enter__(self) -> "Notice":
        if not self._agreed:
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._received.append(True))
        return self

    def __exit__(self, *_: object) -> None:
        if not self._agreed:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """To be asked once in every step, by every process."""
        return multihost_utils.reached_preemption_sync_point(step) if self._agreed else bool(self._received)
