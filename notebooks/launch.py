"""Starts trainings as separate processes and watches them, from a notebook or a script."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.metrics_file import read_metrics
from rankclip_jax.common.ownership import Owned
from rankclip_jax.parallel import preemption

_CLOSING = 60.0  # seconds that a stopped run may take to save


def run(module: str, *arguments: object) -> str:
    """Runs `python -m MODULE ARGUMENTS` and returns its stdout, which has no progress bars.

    Raises:
      InputError: it ended with an error; the message is the last line of it.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if ended.returncode:
        raise InputError(f"{module} stopped with code {ended.returncode}: {_last_line(ended.stderr)}")
    return ended.stdout


class Training:
    """A running `python -m rankclip_jax.train`. Its output is appended to WORKDIR/train.log.

    Attributes:
      workdir: its folder.
      process: subprocess.Popen.
    """

    def __init__(self, config: str, workdir: str | Path, settings: Sequence[str] = ()):
        """Starts it, in the current folder.

        Args:
          config: what --config takes.
          workdir: what --workdir takes; created if missing.
          settings: "key=value" of the configuration, as config.load takes them: "optim.lr=1e-3".

        Raises:
          InputError: the workdir has a train.log of something else, or cannot be written.
        """
        self.workdir = Path(workdir)
        Owned(self.workdir, "launch").claim(["train.log"])
        self._log = self.workdir / "train.log"
        self._from = self._log.stat().st_size if self._log.exists() else 0
        self._before = self._last_step()
        command = [sys.executable, "-m", "rankclip_jax.train", "--config", config, "--workdir", str(workdir)]
        command += [f"--config.{setting}" for setting in settings]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # so that the log is complete, whatever ends the run
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def _last_step(self) -> int:
        return max((row["step"] for row in read_metrics(self.workdir)), default=0)

    def step(self) -> int:
        """The last step in metrics.jsonl beyond those of earlier starts; 0 before it."""
        last = self._last_step()
        return last if last > self._before else 0

    def output(self) -> str:
        """What this start has printed so far."""
        return self._log.read_bytes()[self._from :].decode(errors="replace")

    def stop(self) -> None:
        """Sends SIGTERM, as on a preempted machine, and waits until the run has saved and ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_CLOSING)
            except subprocess.TimeoutExpired:  # it hangs, and holds memory that the next run needs
                self.process.kill()
                self.process.wait()


def watch(*trainings: Training, seconds: float = 3.0) -> Iterator[None]:
    """Yields every `seconds` while one of them runs, and once when all have ended. Left early, it stops them all.

    Raises:
      InputError: one ended otherwise than done or stopped by SIGTERM; the message is the last line that it printed.
    """
    try:
        while any(training.process.poll() is None for training in trainings):
            time.sleep(seconds)
            _check(trainings)
            yield
        _check(trainings)
        yield
    finally:
        for training in trainings:
            training.stop()


def _check(trainings) -> None:
    for training in trainings:
        if training.process.poll() not in (None, 0, preemption.EXIT_CODE):
            code, last = training.process.returncode, _last_line(training.output())
            raise InputError(f"{training.workdir} stopped with code {code}: {last}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it printed nothing"])[-1]
