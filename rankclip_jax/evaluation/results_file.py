"""eval.json: the results of evaluations by model, step, kind and set. A new evaluation adds to it.

{"run": {"800": {"zero_shot": {"seen": {"top1": 0.98, ...}}, "missing": {"retrieval/x": reason},
                 "evaluated": {"date": "2026-11-26 10:33 UTC", "device": "1 x NVIDIA H100 80GB HBM3"}}},
 "ViT-B-32.pt": {"0": ...}}

"run" is the workdir's own. What was evaluated last stands last, among models and among steps.
"""

import json
import re
from pathlib import Path

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import write_whole

RUN = "run"


def key(model: str | None) -> str:
    """The name of a model given by its path; None: the workdir's own. One in a folder "run" is "./run"."""
    if model is None:
        return RUN
    return f"./{model}" if model == RUN else model


def read(path: Path) -> dict[str, dict[str, dict]]:
    """Model -> step -> results; empty where there is no file. Raises InputError for a file of another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON; move it away, and evaluate again with --mode=eval") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if isinstance(found, dict) and isinstance(found.get("step"), int):  # one evaluation, as files were at first
        found = {RUN: {str(found.pop("step")): found}}
    if not (isinstance(found, dict) and all(map(_by_step, found.values()))):
        raise InputError(f"{path} holds no results of evaluations; move it away, and evaluate again with --mode=eval")
    return found


def _by_step(rows: object) -> bool:
    """Whether this is {step: results}; a step is written in digits."""
    return isinstance(rows, dict) and all(
        re.fullmatch("[0-9]{1,15}", step) and isinstance(row, dict) for step, row in rows.items()
    )


def add(path: Path, model: str, step: int, results: dict) -> None:
    """Adds the results of one evaluation; of a set that is there they replace the old ones.

    Raises:
      InputError: as `read` does, or `path` cannot be written.
    """
    found = read(path)
    by_step = found.pop(model, {})
    old = by_step.pop(str(step), {})
    old = {kind: rows for kind, rows in old.items() if isinstance(rows, dict)}  # of a damaged file what can be used
    merged = {kind: old.get(kind, {}) | rows for kind, rows in results.items() if kind != "missing"}
    merged = {kind: rows for kind, rows in old.items() if kind not in results} | merged
    missing = old.get("missing", {}) | results.get("missing", {})
    done = {f"{kind}/{name}" for kind, rows in merged.items() for name in rows}
    merged["missing"] = {name: why for name, why in missing.items() if name not in done}
    write_whole(path, json.dumps(found | {model: by_step | {str(step): merged}}, indent=2) + "\n")


def latest(path: Path) -> dict:
    """{"model", "step", "zero_shot": {set: numbers}, ...} of what was evaluated last, of the run itself if it was; {}
    where nothing was."""
    found = read(path)
    if not any(found.values()):
        return {}
    model = RUN if found.get(RUN) else [name for name, by_step in found.items() if by_step][-1]
    step = list(found[model])[-1]
    return {**found[model][step], "model": model, "step": int(step)}
