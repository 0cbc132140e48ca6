"""What a workdir holds for a report."""

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.metrics_file import read_metrics
from rankclip_jax.common.trees import flatten
from rankclip_jax.evaluation import results_file


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      name: the workdir's last part, or more of it where runs share that.
      rows: metrics.jsonl, a dict a line.
      config: config.json; empty without one.
      results: of eval.json, what was evaluated last (results_file.latest).
      confusion: set -> {"classes", "confusion"}; geometry: set -> arrays (evaluation/artifacts.py).
      retrieval: set -> queries and answers.
      bad: reason -> (count, first places).
    """

    name: str
    rows: list[dict]
    config: dict
    results: dict
    confusion: dict[str, dict]
    geometry: dict[str, dict]
    retrieval: dict[str, dict]
    bad: dict[str, tuple[int, list[str]]]

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric, finite ones."""
        found = [(row["step"], row.get(key)) for row in self.rows]
        return [(step, value) for step, value in found if isinstance(value, int | float) and np.isfinite(value)]


def read_run(workdir: str | Path) -> Run:
    """Reads a workdir.

    Raises:
      InputError: it is no folder, holds neither metrics.jsonl nor eval.json, or a file in it is damaged.
    """
    folder = Path(workdir)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; give the workdir of a run")
    run = Run(
        name=folder.resolve().name,
        rows=read_metrics(folder),
        config=_json(folder / "config.json"),
        results=results_file.latest(folder / "eval.json"),
        confusion=_by_set(folder, "zero_shot_", ".npz", _arrays),
        geometry=_by_set(folder, "geometry_", ".npz", _arrays),
        retrieval=_by_set(folder, "retrieval_", ".json", _json),
        bad=_bad(folder / "bad_samples.jsonl"),
    )
    if not run.rows and not run.results:
        raise InputError(f"{folder} holds neither metrics.jsonl nor eval.json; give the workdir of a run")
    return run


def differences(runs: list[Run]) -> list[tuple[str, list]]:
    """(key, a value a run) of the configuration keys in which the runs differ; None where a run lacks a key."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key) for config in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _by_set(folder: Path, prefix: str, suffix: str, read: Callable) -> dict:
    files = sorted((folder / "eval").glob(f"{prefix}*{suffix}"))
    return {file.name.removeprefix(prefix).removesuffix(suffix): read(file) for file in files}


def _json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path} is not JSON; delete it, or evaluate again with --mode=eval") from None


def _arrays(path: Path) -> dict:
    try:
        with np.load(path) as arrays:  # allow_pickle stays off: a file may come from anywhere
            return dict(arrays)
    except Exception as error:  # whatever NumPy and zipfile raise on a torn file
        raise InputError(f"{path} cannot be read ({one_line(error)}); evaluate again with --mode=eval") from None


def _bad(path: Path) -> dict:
    places = collections.defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            sample = json.loads(line)
        except ValueError:
            continue  # a line that a crash cut off
        places[str(sample.get("reason", "?"))].append(str(sample.get("where", "?")))
    ordered = sorted(places.items(), key=lambda item: -len(item[1]))
    return {reason: (len(found), found[:5]) for reason, found in ordered}
