"""Checkpoints of a run: the state and the place in the data, written in the background, checked when read.

WORKDIR/checkpoints/STEP (or config.checkpoint.folder/STEP, which may be in a bucket) appears under its name only when
it is complete. It holds `state` (Orbax, readable on any devices, mesh and sharding), `data` (JSON: each process's place
in its stream, or each lane's, and the fingerprint of every array). What does not read back bit for bit is damaged: it
is named, passed over, never deleted. saving.py writes them.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from rankclip_jax.common import storage
from rankclip_jax.common.devices import host_device
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.trees import by_name
from rankclip_jax.parallel import processes
from rankclip_jax.weights import late_callbacks
from rankclip_jax.weights.fingerprint import fingerprints

SCORES = "scores.json"  # beside the checkpoints: {metric: {step: its value}}
# The metrics of config.best of which lower values are better: losses, distances, and what robustness loses.
_LOWER = re.compile(
    r"val/(clip|siglip|rank_\w+|cyclic_\w+)(/ema)?|(val|geometry/.+)/(alignment|uniformity_\w+)(/ema)?|robustness/.+/drop"
)
# What a store, a credential or a full memory says, and damage does not.
_NOT_NOW = re.compile(
    r"\b(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED)\b|"
    r"CURL error|[Tt]imed? ?out|"
    r"\b(ServiceUnavailable|TooManyRequests|Forbidden|Unauthorized|InternalServerError|BadGateway|RetryError|"
    r"RefreshError|TransportError)\b"
)
_ERRORS_NOW = MemoryError, ConnectionError, TimeoutError, PermissionError
_VARIABLES = "params", "batch_stats", "ema"  # of a state; the last only with config.optim.ema


class Restored(NamedTuple):
    """What a checkpoint holds: `positions` are those of the processes that saved it, in their order, or of lanes."""

    step: int
    state: Any
    positions: list[int]


def restore(workdir: str | Path, config: ConfigDict, abstract_state: Any) -> Restored | None:
    """The newest checkpoint that is whole; None where there is no checkpoint.

    `config` is config.checkpoint; `abstract_state` says the shapes and shardings, which need not be those of the run
    that saved. A damaged checkpoint is named on stderr and the next one taken; all processes of a run take the same.

    Raises:
      InputError: there are checkpoints, and all of them are damaged or of another model.
    """

    def read(folder, data):
        _check_model(folder, abstract_state)
        state = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(abstract_state))
        return state, lambda: _difference(state, data["fingerprints"])

    return _first_whole(*_by_worth(folder_of(workdir, config), None), read)


def restore_variables(workdir: str | Path, config: ConfigDict, abstract: dict) -> Restored | None:
    """As `restore`, of {"params", "batch_stats"} (and "ema") alone, of the best checkpoint by config.best if any."""

    def read(folder, data):
        _check_model(folder, abstract)
        args = ocp.checkpoint_utils.construct_restore_args(abstract)
        with _quiet(), ocp.PyTreeCheckpointer() as reader:
            args = ocp.args.PyTreeRestore(item=abstract, restore_args=args, partial_restore=True)
            variables = reader.restore(folder, args=args)
        return variables, lambda: _difference(variables, data["fingerprints"])

    return _first_whole(*_by_worth(folder_of(workdir, config), config.best), read)


def read_variables(
    workdir: str | Path, config: ConfigDict, names: Sequence[str] = _VARIABLES[:2]
) -> tuple[int, dict] | None:
    """(step, {"params", "batch_stats"} as NumPy arrays) of the best checkpoint (`restore`), without the optimiser.

    None without a complete checkpoint. Writes nothing, and takes no accelerator.
    """
    read = functools.partial(_read_variables, names=names)
    found = _first_whole(*_by_worth(folder_of(workdir, config), config.best), read, alone=True)
    return found and (found.step, found.state)


def _first_whole(folder, candidates, read, alone=False) -> Restored | None:
    reason = None
    for step in candidates:
        state, data, problem = None, None, None
        try:
            with late_callbacks.one_report():
                data = _read_data(folder / str(step))
                state, check = read(folder / str(step) / "state", data)
        except InputError:
            raise
        except Exception as error:  # whatever Orbax, TensorStore or JSON raise on damage of every kind
            _refuse_if_not_now(folder / str(step), error)
            problem = one_line(error, kind=True)
        # A file that one process cannot read, another may not need; all resume from the same step.
        if (alone and problem is None) or (not alone and min(processes.of_all(problem is None))):
            problem = check()
            if problem is None:
                return Restored(step, state, data["positions"])
        reason = problem or reason or "another process could not read it"
        print(f"checkpoint {folder / str(step)} is damaged and passed over: {reason}", file=sys.stderr)
    if candidates:
        raise InputError(
            f"none of the {len(candidates)} checkpoints in {folder} can be read (the last: {reason}); nothing was "
            "deleted. Bring one back from a copy, or start in a new --workdir"
        )
    return None


def _refuse_if_not_now(folder: epath.Path, error: BaseException) -> None:
    """Raises InputError where an error says that a checkpoint cannot be read now, which is no damage."""
    while error.__cause__ is not None:  # what Orbax raises says where, and not what TensorStore said
        error = error.__cause__
    error = _closed(folder) or error
    said = one_line(error, kind=True)
    if isinstance(error, _ERRORS_NOW) or _NOT_NOW.search(said):
        raise InputError(
            f"checkpoint {folder} cannot be read now ({said}). It may be whole, so none before it is taken: start "
            "again to resume, or move it away"
        ) from None


def _closed(folder: epath.Path) -> PermissionError | None:
    """The error of a local folder of a checkpoint that this user may not open: to Orbax its files are absent."""
    for path in (str(folder), *(os.path.join(at, name) for at, names, _ in os.walk(folder) for name in names)):
        if os.path.exists(path) and not os.access(path, os.R_OK | os.X_OK):
            return PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return None


def _read_data(folder) -> dict:
    data = ocp.JsonCheckpointHandler().restore(folder / "data")
    if "position" in data:  # written before there were several processes
        return {"positions": [data["position"]], "fingerprints": {}}
    if data.pop("crc32") != crc32(data):
        raise ValueError("data does not match its checksum")
    return data


def _check_model(folder, abstract) -> None:
    """Raises InputError where a checkpoint is not of the shapes asked for: that is no damage."""
    saved = {name: leaf.shape for name, leaf in by_name(_saved_tree(folder)).items()}
    for name, leaf in by_name(abstract).items():
        if name.partition("/")[0] not in _VARIABLES:
            continue  # what an optimizer keeps follows from them, and from the configuration
        if name not in saved or tuple(saved[name]) != leaf.shape:
            there = f"{tuple(saved[name])}" if name in saved else "absent"
            raise InputError(f"{folder.parent} is of another model: {name} is {there} there, {leaf.shape} here")


def _saved_tree(folder):
    """Shapes and dtypes of what is saved. A PyTreeCheckpointer would make None of most errors."""
    with _quiet():
        return ocp.PyTreeCheckpointHandler().metadata(folder).tree


def _read_variables(folder, data, names):
    tree = _saved_tree(folder)
    with _quiet(), ocp.PyTreeCheckpointer() as reader:
        wanted = {name: tree[name] for name in names if tree.get(name)}
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        variables = reader.restore(
            folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=numpy, partial_restore=True)
        )

    def check():
        with jax.default_device(host_device()):
            return _difference(variables, data["fingerprints"])

    return variables, check


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


def folder_of(workdir, config) -> epath.Path:
    """Where the checkpoints are: config.folder (config.checkpoint's), or WORKDIR/checkpoints, also of a bucket."""
    if config.folder:
        return epath.Path(config.folder)
    return epath.Path(storage.origin(workdir) or Path(workdir).resolve()) / storage.CHECKPOINTS


def steps(folder: epath.Path) -> list[int]:
    """Complete checkpoints, newest first. Raises InputError where a bucket cannot be listed."""
    if not storage.is_folder(str(folder)):  # of a bucket that refuses, TensorFlow's is_dir says that there is none
        return []
    try:
        return sorted((found.step for found in ocp.path.step.standard_name_format().find_all(folder)), reverse=True)
    except OSError:
        raise
    except Exception as error:  # of TensorFlow
        raise InputError(f"{folder} cannot be listed: {one_line(error)}") from None


def scores(folder: epath.Path, metric: str | None) -> dict[int, float]:
    """{step: value of the metric} of the steps that were evaluated; older runs wrote it into the step's folder."""
    if metric is None:
        return {}
    found = {}
    for step in steps(folder):
        try:
            found[step] = float(json.loads((folder / str(step) / "metrics" / "metrics").read_text())[metric])
        except (OSError, ValueError, KeyError, TypeError):  # it was saved without, or is damaged
            continue
    try:
        listed = json.loads((folder / SCORES).read_text())[metric]
        return found | {int(step): float(value) for step, value in listed.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return found
    except Exception as error:  # else the best would be forgotten, and removed
        raise InputError(f"{folder / SCORES} cannot be read: {one_line(error)}") from None


def _by_worth(folder, metric) -> tuple[epath.Path, list[int]]:
    """The steps to try: the one with the best metric, if any was evaluated, then from the newest on."""
    there, known = steps(folder), scores(folder, metric)
    step = best_step({step: score for step, score in known.items() if step in there}, metric)
    best = [] if step is None else [step]
    return folder, best + [step for step in there if step not in best]


def best_step(scores: Mapping[int, float], metric: str | None) -> int | None:
    """The step whose value of the metric is best, the latest of equal ones: the highest, or (_LOWER) the lowest."""
    sign = -1 if metric and _LOWER.fullmatch(metric) else 1
    return max(scores, key=lambda step: (sign * scores[step], step), default=None)


def crc32(data: dict) -> int:
    """The checksum that is stored beside a checkpoint's positions and fingerprints."""
    return zlib.crc32(json.dumps([data["positions"], data["fingerprints"]], sort_keys=True).encode())
