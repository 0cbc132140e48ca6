"""Saving the checkpoints of a run, in the background; checkpoint.py says what they hold and reads them."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.parallel import processes
from rankclip_jax.parallel.preemption import Preempted
from rankclip_jax.weights import checkpoint, late_callbacks
from rankclip_jax.weights.fingerprint import fingerprints

_PATIENCE = 10  # seconds from the end of the main thread of a failed run to that of its process
_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system")

# What a save writes into the folder of its step, without endings; Orbax writes those of its own names.
_WRITTEN = {"state", "data", "metrics", "_CHECKPOINT_METADATA", "commit_success"}


class Checkpoints:
    """Writes the checkpoints of a run, in the background.

    Keeps the latest `config.keep`, every multiple of `config.keep_every`, the best by `config.best`
    (`checkpoint.best_step`), and the last from which a run can be lengthened. As a context: a failed save is told once,
    by the exception, and at the end all is written.
    """

    def __init__(self, workdir: str | Path, config: ConfigDict, start: int | None = None, free: int | None = None):
        """Opens the folder of the checkpoints.

        Args:
          start: the step that was restored. Newer ones proved damaged, and make way under another name.
          free: the last step that does not depend on the run's length (train/schedule.py); None: none is kept for it.

        Raises:
          InputError: nothing can be saved there.
        """
        folder = checkpoint.folder_of(workdir, config)
        self._folder, self._best, self._saved = folder, config.best, start
        self._running, self._failed = False, False
        self._latest, self._every, self._free, self._strangers = config.keep, config.keep_every, free or 0, set()
        try:
            if processes.is_first():
                probe(folder)
                _make_way(folder, start)
            # The others look into the folder only now. All keep the same steps, since they delete together.
            known = json.loads(processes.from_first(lambda: json.dumps(checkpoint.scores(folder, config.best))))
            self._scores = {int(step): score for step, score in known.items() if int(step) <= (start or 0)}
            self._strangers = {step for step in checkpoint.steps(folder) if not _is_ours(folder / str(step))}
            # Orbax's own clearing away (cleanup_tmp_directories) knows no owner: in a bucket it takes every folder.
            options = ocp.CheckpointManagerOptions(preservation_policy=_Kept(self._kept))
            self._manager = ocp.CheckpointManager(folder, options=options)
        except Exception as error:
            raise self._cannot_save(error) from error

    def __enter__(self) -> "Checkpoints":
        self._report = _one_report()
        self._report.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        error = raised[1]
        try:
            # What was being saved is good. But of many processes the others may never come to finish it.
            if not self._failed and (error is None or isinstance(error, Preempted) or jax.process_count() == 1):
                self.close()
        except Exception:
            raised = sys.exc_info()
            raise
        finally:
            self._report.__exit__(*raised)

    def save(self, step: int, state: Any, position: int | tuple[int, ...]) -> None:
        """Starts to write; returns as soon as the state is copied, so that the next step may donate it.

        Args:
          position: this process's place in its stream of data, or in those of its lanes.

        Raises:
          InputError: this checkpoint, or the one before, could not be written. Those before it are as they were.
        """
        if step == self._saved:
            return
        data: dict[str, Any] = {"positions": processes.of_all(position), "fingerprints": fingerprints(state)}
        data["crc32"] = checkpoint.crc32(data)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            raise self._cannot_save(error) from error
        self._saved, self._running = step, True

    def check(self) -> None:
        """Raises as `save` does if the save that ran in the background has failed. To be asked in every step."""
        if self._running and not self._manager.is_saving_in_progress():
            self._running = False
            try:
                self._manager.wait_until_finished()  # which has nothing to wait for
            except Exception as error:
                raise self._cannot_save(error) from error

    def score(self, step: int, numbers: dict[str, float]) -> None:
        """Notes what a saved step was worth by config.best, if that is among the numbers, once it was evaluated.

        The step that was best before is removed now, unless something else keeps it. Raises as `save` does. The number
        of process 0 counts: another's may differ in its last bits, and all delete the same.
        """
        if self._best is None or step != self._saved:
            return
        mine = numbers.get(self._best)
        score = json.loads(processes.from_first(lambda: json.dumps(None if mine is None else float(mine))))
        if score is None:
            return
        before = checkpoint.best_step(self._scores, self._best)
        self._scores[step] = score
        try:
            self._manager.wait_until_finished()
            if processes.is_first():
                scores = json.dumps({self._best: self._scores})
                storage.write(str(self._folder / checkpoint.SCORES), scores.encode())
            saved = self._manager.all_steps()
            if before in saved and before not in self._kept(saved):
                self._manager.delete(before)
        except Exception as error:
            raise self._cannot_save(error) from error

    def close(self) -> None:
        """Waits until everything is written. Raises as `save` does."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as error:
            raise self._cannot_save(error) from error

    def _cannot_save(self, error: Exception) -> Exception:
        if not self._failed:
            self._failed = True
            threading.Thread(target=_end_with_main_thread, daemon=True).start()
        return _cannot_save(self._folder, error)

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """Those of the saved steps that stay; what is not a checkpoint of ours is not ours to remove."""
        multiples = [step for step in steps if self._every and step % self._every == 0]
        free = [step for step in steps if step <= self._free]
        kept = {*sorted(steps)[-self._latest :], *multiples, *sorted(free)[-1:], *self._strangers}
        return {step for step in steps if step in kept or step == checkpoint.best_step(self._scores, self._best)}


@dataclasses.dataclass
class _Kept(preservation_policy.PreservationPolicy):
    """Keeps what a function of all steps names."""

    kept: Callable[[Sequence[int]], set[int]]

    def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
        kept = self.kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def probe(folder: epath.Path) -> None:
    """Writes a file into the folder of the checkpoints and deletes it, as Orbax will.

    Raises:
      InputError: a package, a credential or a permission is missing.
    """
    if str(folder).startswith("gs://"):
        try:
            import google.cloud.storage  # noqa: F401 (Orbax imports it at the first save)
        except ImportError:
            raise InputError(
                f"{folder}: checkpoints in a bucket need the package google-cloud-storage; pip install -e '.[gcs]' (or "
                "pip install google-cloud-storage)"
            ) from None
        name = storage.join(str(folder), f".probe-{secrets.token_hex(8)}")
        storage.write(name, b"can this be written?")  # says in one line what is wrong
        storage.delete(name)
    elif storage.is_remote(folder):
        raise InputError(f"{folder}: Orbax saves no checkpoints there; give gs://BUCKET/FOLDER, or a local folder")
    file = folder / f".probe-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("can this be written?")
        file.unlink()
    except Exception as error:  # of the system, or of TensorFlow
        raise _cannot_save(folder, error) from error


def _is_ours(path: epath.Path) -> bool:
    """Whether there is nothing in a folder but what our saves put there; some or all of it may be lacking."""
    if os.path.islink(path) or not path.is_dir():
        return False
    return {name.name.partition(".")[0] for name in path.iterdir()} <= _WRITTEN


def _make_way(folder: epath.Path, start: int | None) -> None:
    """Clears away saves that were cut off, which would fill the disk, and renames damaged checkpoints after `start`.

    Raises:
      InputError: something else has the name of a save to come, which Orbax would remove.
    """
    for path in folder.iterdir():
        named = re.fullmatch(r"(\d+)(\.orbax-checkpoint-tmp)?", path.name)
        if not named:
            continue
        # In a bucket a save has its name from the start, and at the end the file commit_success.txt.
        cut_off = named[2] or (str(folder).startswith("gs://") and not (path / "commit_success.txt").exists())
        to_come = cut_off or int(named[1]) > (start or 0)
        if to_come and not _is_ours(path):
            raise InputError(f"{path} is not a checkpoint of this run, and in the way of one; move it away")
        if cut_off:
            path.rmtree()
        elif start is not None and to_come:
            path.rename(_free_name(folder, f"damaged-{path.name}"))


def _free_name(folder: epath.Path, name: str) -> epath.Path:
    taken = [path.name for path in folder.iterdir()]
    return folder / next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if n not in taken)


@contextlib.contextmanager
def _one_report() -> Iterator[None]:
    """Keeps off the console what else is said of a failed save, which is raised here, in one line."""
    logger = logging.getLogger("absl")

    def not_orbax(record: logging.LogRecord) -> bool:  # which logs an error in the background with its stack
        return not (record.exc_info and "orbax" in record.pathname)

    logger.addFilter(not_orbax)
    try:
        with late_callbacks.one_report():
            yield
    finally:
        logger.removeFilter(not_orbax)


def _end_with_main_thread() -> None:
    """Ends the process soon after its main thread: after a failed save, Orbax's threads may wait for each other."""
    threading.main_thread().join()
    time.sleep(_PATIENCE)
    os._exit(1)


def _cannot_save(folder: epath.Path, error: Exception) -> Exception:
    if isinstance(error, InputError):
        return error
    said = next((words for words in _FULL if words in str(error)), one_line(error))
    remedy = "allow more: ulimit -n 8192" if "Too many open files" in said else "make room or make it writable"
    return InputError(
        f"cannot save in {folder}: {said}. The checkpoints before are as they were; {remedy}, and start again to resume"
    )
