"""The finished runs of a study, one JSON file each, with the configuration that it is a run of."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import make_folder, write_whole
from rankclip_jax.common.ownership import inside
from rankclip_jax.config import completed, override
from rankclip_jax.config.keys import BEFORE
from rankclip_jax.study.arms import Arm
from rankclip_jax.study.training import Job

_NOT_TRAINED = ("log_every", "checkpoint", "plan", "study", "seed")
_OF_STUDY = ("limit", "mismatched", "duplicates", "search_seed", "select_on", "select_share", "pairs", "probe_l2")


def identity(config: ConfigDict) -> dict:
    """What makes two runs the same: all of an arm's configuration but what is looked at, printed or planned."""
    unused = BEFORE | {"data.squash": config.data.squash or BEFORE["data.squash"]}  # but squash: one value for all runs
    fields = json.loads(json.dumps(override(config.to_dict(), [f"{key}={value!r}" for key, value in unused.items()])))
    kept = {k: v for k, v in fields.items() if k not in _NOT_TRAINED}
    return kept | {"study": {k: fields["study"][k] for k in _OF_STUDY}}


def file_of(folder: Path, arm: Arm, job: Job) -> Path:
    """FOLDER/[CONDITION/]OBJECTIVE-lrRATE-seedSEED.json."""
    return inside(folder, f"{arm}-lr{job.lr:g}-seed{job.seed}.json")


def read(file: Path, wanted: dict) -> dict | None:
    """The run; None where it is not done. Raises InputError for what is not a run, or is of another configuration."""
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
        config = identity(completed(found["config"]))  # keys that are younger than the run have the value of its time
        known = {"objective", "lr", "seed", "seconds", "curve", "final"} <= found.keys()
    except (InputError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        known = False
    if not known:
        raise InputError(f"{file} is there already, and no run of a study; take another --workdir, or move it away")
    if config != wanted:
        differing = sorted(k for k in wanted.keys() | config.keys() if wanted.get(k) != config.get(k))
        raise InputError(
            f"{file} is of another configuration ({', '.join(differing)}); take another --workdir, or remove it"
        )
    return {"condition": ""} | {key: value for key, value in found.items() if key != "config"}


def write(file: Path, result: dict) -> None:
    """Whole or not at all."""
    make_folder(file.parent)
    write_whole(file, json.dumps(result, indent=1))
