"""Being asked to stop: Ctrl-C, a closed terminal, or SIGTERM, as Cloud TPU, Kubernetes and SLURM give notice."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # saved and stopped; start again to resume (all codes: common/commands.py)


class Preempted(Exception):  # noqa: N818 -- not an error: the run was asked to stop, saved, and can resume
    """The state is saved."""


class Notice:
    """Whether to save and stop now, agreed among all processes. As a context: handlers are put back at its end.

    Of one process SIGTERM is watched here. Of many, JAX watches it, and its coordination service finds a step that
    none of them has passed yet: whichever of them got the signal, all save that step. Ctrl-C is a SIGTERM; a second one
    ends the process at once, with 130. SIGHUP, by which a terminal says that it is gone, is a SIGTERM too; what nohup
    ignores stays ignored.
    """

    def __init__(self) -> None:
        self._received: list[bool] = []
        self._before: dict[int, Any] = {}
        self._agreed = jax.distributed.is_initialized()
        self._terminals = [output for output in (1, 2) if os.isatty(output)]

    def __enter__(self) -> "Notice":
        if not self._agreed:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: self._received.append(True))
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._hung_up)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        # os.write, since print would fail where it was interrupted itself.
        os.write(2, b"\nsaving this step; Ctrl-C again quits at once and loses it\n")
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        os.kill(os.getpid(), signal.SIGTERM)

    def _hung_up(self, _number: int, _frame: FrameType | None) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in self._terminals:  # to which nothing can be written any more
            os.dup2(nowhere, output)
        os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """To be asked once in every step, by every process."""
        return multihost_utils.reached_preemption_sync_point(step) if self._agreed else bool(self._received)
