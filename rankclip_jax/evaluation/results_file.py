"""eval.json: the results of evaluations by model, step, kind and set. A new evaluation adds to it.

{"run": {"800": {"zero_shot": {"seen": {"top1": 0.98, ...}}, "missing": {"retrieval/x": reason}}},
 "ViT-B-32.pt": {"0": ...}}

"run" is the workdir's own. What was evaluated last stands last, among models and among steps.
"""

import json
from pathlib import Path

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import write_whole

RUN = "run"


def read(path: Path) -> dict[str, dict[str, dict]]:
    """Model -> step -> results; empty where there is no file. Raises InputError for a file of another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise InputError(f"{path} is not JSON; move it away, and evaluate again with --mode=eval") from None
    if isinstance(found, dict) and isinstance(found.get("step"), int):  # one evaluation, as files were at first
        found = {RUN: {str(found.pop("step")): found}}
    by_step = list(found.values()) if isinstance(found, dict) else [None]
    if not all(isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()) for rows in by_step):
        raise InputError(f"{path} holds no results of evaluations; move it away, and evaluate again with --mode=eval")
    return found


def add(path: Path, model: str, step: int, results: dict) -> None:
    """Adds the results of one evaluation; of a set that is there they replace the old ones.

    Raises:
      InputError: as `read` does, or `path` cannot be written.
    """
    found = read(path)
    by_step = found.pop(model, {})
    old = by_step.pop(str(step), {})
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
    return {"model": model, "step": int(step), **found[model][step]}
