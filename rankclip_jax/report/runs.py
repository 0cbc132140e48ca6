"""What a workdir holds for a report."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import flatten
from rankclip_jax.evaluation.artifacts import plain
from rankclip_jax.figures import names
from rankclip_jax.report.files import Files


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. All that is in it has the types that are said here, whatever the files hold (files.py).

    Attributes:
      name: the workdir's last part; of runs side by side as many parts as tell them apart (`apart`).
      rows: metrics.jsonl, a dict a line.
      config: config.json; empty without one.
      samples: number of training samples; None: not known.
      results: {"model", "step", "zero_shot": {set: numbers}, ...}, of eval.json what was evaluated last; without
        one, of metrics.jsonl, and then "model" is None.
      confusion: set -> {"classes", "confusion"}; geometry: set -> arrays (evaluation/artifacts.py).
      examples, retrieval: set -> pictures that were classified; queries and answers.
      bad: reason -> (count, first places).
      unreadable: file -> what was left out of it.
    """

    name: str
    rows: list[dict]
    config: dict
    samples: int | None
    results: dict
    confusion: dict[str, dict]
    examples: dict[str, dict]
    geometry: dict[str, dict]
    retrieval: dict[str, dict]
    bad: dict[str, tuple[int, list[str]]]
    unreadable: dict[str, list[str]]

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric, finite ones."""
        return [(row["step"], row[key]) for row in self.rows if key in row and math.isfinite(row[key])]

    def setting(self, key: str) -> Any:
        """Of config.json: "model.name". None where there is no such key."""
        found: Any = self.config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found


def apart(workdirs: Sequence[str]) -> list[str]:
    """Names of runs: seed0/run, seed1/run -> the same; a/one, b/two -> one, two."""
    parts = [one.split("/") if "://" in one else list(Path(one).resolve().parts) for one in workdirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(filter(None, part[-depth:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def read_run(workdir: str | Path) -> Run:
    """Reads a workdir. What cannot be read is left out, and named in `unreadable`.

    Raises:
      InputError: it is not a folder, or nothing of a run can be read there.
    """
    folder = Path(workdir)
    if not folder.is_dir():
        what = f"{folder} is not a folder" if folder.exists() else f"no folder {folder}"
        raise InputError(f"{what}; give the workdir of a run")
    files = Files(folder)
    rows = files.metrics()
    results = files.evaluations()

    def drawn(kind: str, found: dict) -> dict:
        """Without the drawings of sets that only another step or model was evaluated on."""
        return {name: one for name, one in found.items() if not results or name in map(plain, results.get(kind, {}))}

    run = Run(
        name=folder.resolve().name,
        rows=rows,
        config=files.config(),
        samples=files.samples(),
        results=results or _while_training(files, rows),
        confusion=drawn("zero_shot", files.confusion()),
        examples=drawn("zero_shot", files.examples()),
        geometry=drawn("geometry", files.geometry()),
        retrieval=drawn("retrieval", files.retrieval()),
        bad=files.bad(),
        unreadable=files.unreadable,
    )
    if not run.rows and not run.results:
        raise InputError(_no_run(folder, files.unreadable))
    return run


def differences(runs: list[Run]) -> list[tuple[str, list]]:
    """(key, a value a run) of the configuration keys in which the runs differ; None where a run lacks a key."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key) for config in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _while_training(files: Files, rows: list[dict]) -> dict:
    """What training evaluated last, as eval.json would have it."""
    found: dict[str, dict] = {}
    steps: dict[str, int] = {}
    for row in rows:
        for key, value in row.items():
            if parts := names.split(key):
                kind, name, number = parts
                found.setdefault(kind, {}).setdefault(name, {})[number] = value
                steps[kind] = row["step"]
        for key, counts in row.get("counts", {}).items():
            kind, _, name = key.partition("/")
            if isinstance(counts, dict) and name in found.get(kind, {}):
                found[kind][name] |= counts
    results = files.checked("metrics.jsonl", found)
    return results | {"model": None, "step": max(steps.values()), "steps": steps} if results else {}


def _no_run(folder: Path, unreadable: dict[str, list[str]]) -> str:
    if unreadable:
        said = "; ".join(f"{file} {why[0]}" for file, why in list(unreadable.items())[:3])
        return f"nothing of a run can be read in {folder}: {said}"
    inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))[:3]
    if inside:
        return f"{folder} holds workdirs of runs but is not one itself; give them: {' '.join(map(str, inside))}"
    empty = "is empty" if not any(folder.iterdir()) else "holds neither metrics.jsonl nor eval.json"
    return f"{folder} {empty}; give the workdir of a run"
