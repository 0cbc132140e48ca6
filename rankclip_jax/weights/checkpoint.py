"""Checkpoints of a run: the state and the place in the data, written in the background, checked when read.

WORKDIR/checkpoints/STEP (or config.checkpoint.folder/STEP, which may be in a bucket) appears under its name only when
it is complete. It holds `state` (Orbax, readable on any devices, mesh and sharding), `data` (JSON: each process's place
in its stream, and the fingerprint of every array) and perhaps `metrics`. What does not read back bit for bit is
damaged: it is named, passed over, never deleted.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import sys
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.parallel import processes
from rankclip_jax.parallel.preemption import Preempted
from rankclip_jax.weights.fingerprint import fingerprints

# What a save writes into the folder of its step, without endings; Orbax writes those of its own names.
_WRITTEN = {"state", "data", "metrics", "_CHECKPOINT_METADATA", "commit_success"}


class Restored(NamedTuple):
    """What a checkpoint holds: `positions` are those of the processes that saved it, in their order."""

    step: int
    state: Any
    positions: list[int]


class Checkpoints:
    """Writes the checkpoints of a run, in the background.

    Keeps the latest `config.keep`, every multiple of `config.keep_every`, and the one whose metric `config.best` is
    highest. As a context: a failed save is told once, by the exception, and at the end all is written.
    """

    def __init__(self, workdir: str | Path, config: ConfigDict, start: int | None = None):
        """`start`: the step that was restored. Newer ones proved damaged, and make way under another name."""
        folder = _folder(workdir, config)
        self._folder, self._best, self._saved = folder, config.best, start
        policies = [keep.LatestN(config.keep)]
        if config.keep_every:
            policies.append(keep.EveryNSteps(config.keep_every))
        metric = (lambda metrics: metrics[config.best]) if config.best else None
        if config.best:
            policies.append(keep.BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False))
        try:
            if processes.is_first():
                _make_way(folder, start)
            processes.of_all(0)  # the others look into the folder only now
            policies.append(_Strangers([step for step in _steps(folder) if not _is_ours(folder / str(step))]))
            # Orbax's own clearing away (cleanup_tmp_directories) knows no owner: in a bucket it takes every folder.
            options = ocp.CheckpointManagerOptions(
                best_fn=metric, preservation_policy=keep.AnyPreservationPolicy(policies)
            )
            self._manager = ocp.CheckpointManager(folder, options=options)
        except Exception as error:
            raise _cannot_save(folder, error) from error

    def __enter__(self) -> "Checkpoints":
        self._context = contextlib.ExitStack()
        self._context.enter_context(_told_once())
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        with self._context:
            # What was being saved is good. But of many processes the others may never come to finish it.
            if error is None or isinstance(error, Preempted) or jax.process_count() == 1:
                self.close()

    def save(self, step: int, state: Any, position: int, metrics: dict) -> None:
        """Starts to write; returns as soon as the state is copied, so that the next step may donate it.

        Args:
          position: this process's place in its stream of data.

        Raises:
          InputError: this checkpoint, or the one before, could not be written. Those before it are as they were.
        """
        if step == self._saved:
            return
        data = {"positions": processes.of_all(position), "fingerprints": fingerprints(state)}
        data["crc32"] = _crc(data)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        try:
            self._manager.save(step, args=items, metrics=metrics if self._best in metrics else None)
        except Exception as error:
            raise _cannot_save(self._folder, error) from error
        self._saved = step

    def close(self) -> None:
        """Waits until everything is written. Raises as `save` does."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as error:
            raise _cannot_save(self._folder, error) from error


def restore(workdir: str | Path, config: ConfigDict, abstract_state: Any, best: bool = False) -> Restored | None:
    """The newest checkpoint that is whole, or with `best` that of config.best; None where there is no checkpoint.

    `config` is config.checkpoint; `abstract_state` says the shapes and shardings, which need not be those of the run
    that saved. A damaged checkpoint is named on stderr and the next one taken; all processes of a run take the same.

    Raises:
      InputError: there are checkpoints and all of them are damaged.
    """
    order = _by_worth(_folder(workdir, config), config.best if best else None)
    return _first_whole(*order, lambda folder, data: _read_state(folder, data, abstract_state))


def read_variables(workdir: str | Path, config: ConfigDict) -> tuple[int, dict] | None:
    """(step, {"params", "batch_stats"} as NumPy arrays) of the best checkpoint (`restore`), without the optimiser.

    None without a complete checkpoint. Writes nothing, and takes no accelerator.
    """
    found = _first_whole(*_by_worth(_folder(workdir, config), config.best), _read_variables, alone=True)
    return found and (found.step, found.state)


def _first_whole(folder, steps, read, alone=False) -> Restored | None:
    reason = None
    for step in steps:
        state, data, problem = None, None, None
        try:
            data = _read_data(folder / str(step))
            state, check = read(folder / str(step) / "state", data)
        except Exception as error:  # whatever Orbax, TensorStore or JSON raise on damage of every kind
            problem = one_line(error, kind=True)
        # A file that one process cannot read, another may not need; all resume from the same step.
        if (alone and problem is None) or (not alone and min(processes.of_all(problem is None))):
            problem = check()
            if problem is None:
                return Restored(step, state, data["positions"])
        reason = problem or reason or "another process could not read it"
        print(f"checkpoint {folder / str(step)} is damaged and passed over: {reason}", file=sys.stderr)
    if steps:
        raise InputError(
            f"none of the {len(steps)} checkpoints in {folder} can be read (the last: {reason}); nothing was deleted. "
            "Bring one back from a copy, or start in a new --workdir"
        )
    return None


def _read_data(folder) -> dict:
    data = ocp.JsonCheckpointHandler().restore(folder / "data")
    if "position" in data:  # written before there were several processes
        return {"positions": [data["position"]], "fingerprints": {}}
    if data.pop("crc32") != _crc(data):
        raise ValueError("data does not match its checksum")
    return data


def _read_state(folder, data, abstract_state):
    state = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(abstract_state))
    return state, lambda: _difference(state, data["fingerprints"])


def _read_variables(folder, data):
    with _quiet(), ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        wanted = {name: tree[name] for name in ("params", "batch_stats") if tree.get(name)}
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        variables = reader.restore(
            folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=numpy, partial_restore=True)
        )

    def check():
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return _difference(variables, data["fingerprints"])

    return variables, check


@contextlib.contextmanager
def _told_once():
    """Keeps off the console what else is said of a failed save, which is raised here, in one line."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def not_orbax(record: logging.LogRecord) -> bool:  # which logs an error in the background with its stack
        return not (record.exc_info and "orbax" in record.pathname)

    def without_late_callbacks(unraisable) -> None:  # of TensorStore's other writes, each with a stack
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.addFilter(not_orbax)
    sys.unraisablehook = without_late_callbacks
    try:
        yield
    finally:
        logger.removeFilter(not_orbax)
        sys.unraisablehook = hook


@contextlib.contextmanager
def _quiet():
    """Orbax warns that `state` alone lacks a file that its manager wrote one folder up."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _difference(tree, saved: dict[str, int]) -> str | None:
    for name, number in fingerprints(tree).items() if saved else ():
        if saved.get(name) != number:
            return f"{name} is not what was saved"
    return None


def _folder(workdir, config) -> epath.Path:
    if config.folder:
        return epath.Path(config.folder)
    return epath.Path(workdir).resolve() / "checkpoints"


def _steps(folder) -> list[int]:
    """Complete checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((found.step for found in ocp.path.step.standard_name_format().find_all(folder)), reverse=True)


def _by_worth(folder, best) -> tuple[epath.Path, list[int]]:
    steps, scores = _steps(folder), {}
    for step in steps if best else ():
        try:
            scores[step] = json.loads((folder / str(step) / "metrics" / "metrics").read_text())[best]
        except (OSError, ValueError, KeyError):  # it was saved without, or is damaged
            continue
    first = [max(scores, key=lambda step: (scores[step], step))] if scores else []
    return folder, first + [step for step in steps if step not in first]


@dataclasses.dataclass
class _Strangers(keep.PreservationPolicy):
    """Keeps the folders that have a step's name and are no checkpoints of ours."""

    steps: list[int]

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


def _is_ours(path) -> bool:
    """Whether there is nothing in a folder but what our saves put there; some or all of it may be lacking."""
    if os.path.islink(path) or not path.is_dir():
        return False
    return {name.name.partition(".")[0] for name in path.iterdir()} <= _WRITTEN


def _make_way(folder, start) -> None:
    """Clears away saves that were cut off, which would fill the disk, and renames damaged checkpoints after `start`.

    Raises:
      InputError: something else has the name of a save to come, which Orbax would remove.
    """
    folder.mkdir(parents=True, exist_ok=True)  # fails where it cannot be written
    for path in folder.iterdir():
        named = re.fullmatch(r"(\d+)(\.orbax-checkpoint-tmp)?", path.name)
        if not named:
            continue
        # In a bucket a save has its name from the start, and at the end the file commit_success.txt.
        cut_off = named[2] or (str(folder).startswith("gs://") and not (path / "commit_success.txt").exists())
        to_come = cut_off or int(named[1]) > (start or 0)
        if to_come and not _is_ours(path):
            raise InputError(f"{path} is no checkpoint of this run, and in the way of one; move it away")
        if cut_off:
            path.rmtree()
        elif start is not None and to_come:
            path.rename(_free_name(folder, f"damaged-{path.name}"))


def _free_name(folder, name):
    taken = [path.name for path in folder.iterdir()]
    return folder / next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if n not in taken)


def _crc(data: dict) -> int:
    return zlib.crc32(json.dumps([data["positions"], data["fingerprints"]], sort_keys=True).encode())


def _cannot_save(folder, error) -> Exception:
    if isinstance(error, InputError):
        return error
    time.sleep(0.5)  # TensorStore's other writes call back within a fifth of that, while `_told_once` lasts
    return InputError(
        f"cannot save in {folder}: {one_line(error)}. The checkpoints before are as they were; "
        "make room or make it writable, and start again to resume"
    )
