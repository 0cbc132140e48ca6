"""The workdir of a run: whose files are in it, whether it holds a run, and that one start at a time works in it."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rankclip_jax import config as configs
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError, check_utf8
from rankclip_jax.common.files import write_whole
from rankclip_jax.common.ownership import Owned, at_work
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.parallel import processes
from rankclip_jax.weights import checkpoint

_LOCK, _DATA = ".lock", "data.json"
_LOST = "bring it back from a copy, or give a new --workdir"  # what to do about a file of a run
_BESIDE = "tokenizer.json", "config.json"  # also beside checkpoints that lie elsewhere
# Data may lie elsewhere when a run resumes, since _DATA says whether they are the same.
_MOVED = re.compile(r"config\.data\.(train|val)(\.[^.]+\.path)?: (['\[].*) -> (['\[].*)")


def bad_samples(process: int) -> str:
    """Name of the file in which a process lists what it could not use."""
    return f"bad_samples.process{process}.jsonl" if process else "bad_samples.jsonl"


def stored_config(workdir: Path) -> ConfigDict | None:
    """The configuration of the run in a workdir, completed; None: there is no config.json.

    Raises:
      InputError: it is damaged, or was not written by this project.
    """
    path = workdir / "config.json"
    if path.exists():
        Owned(workdir, "train").check(["config.json"])
    try:
        return configs.completed(json.loads(path.read_text())) if path.is_file() else None
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{path}: {error}") from None
        raise InputError(f"{path} is damaged ({error}); {_LOST}") from None


def settings(
    spec: str | None, workdir: Path | None, overrides: Sequence[str], fallback: dict | None = None
) -> ConfigDict:
    """The configuration of a command line: of the file `spec`; None: of the run in the workdir; each with `overrides`.

    Args:
      fallback: where there is neither.

    Raises:
      InputError: there is neither, and no fallback; or what `config.complete` refuses.
    """
    if spec:
        return configs.load(spec, overrides)
    old = stored_config(workdir) if workdir else None
    start = fallback if old is None else old.to_dict()
    if start is None:
        raise InputError(f"{workdir} holds no run (no config.json); give --config FILE to start one")
    return configs.complete(configs.override(start, overrides))


def with_known(config: ConfigDict, workdir: Path) -> ConfigDict:
    """`config` with what the run in a workdir knows beside its configuration: its vocabulary and number of samples."""
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        if (workdir / "tokenizer.json").is_file():
            config.tokenizer.vocab_size, config.tokenizer.path = Tokenizer.load(workdir).vocab_size, None
        if config.plan.samples is None and (train := _data_at_start(workdir).get("train")):
            config.plan.samples = train["samples"]
    return config


def check_same_run(workdir: Path, config: ConfigDict) -> ConfigDict | None:
    """The stored configuration of the run that `config` resumes: where a config.json has a checkpoint. Else None.

    Raises:
      InputError: its run has another configuration, or none that is known; or files of others are in the way.
    """
    if len(set(processes.of_all((workdir / "config.json").exists()))) > 1:
        raise InputError(f"only some processes find a run in {workdir}; it must be a folder that all of them share")
    Owned(workdir, "train").check(_names(config))
    old = stored_config(workdir) or _beside_checkpoints(config)
    folders = [checkpoint.folder_of(workdir, each.checkpoint) for each in (old, config) if each is not None]
    begun = [folder for folder in folders if checkpoint.steps(folder)]
    if old is None and begun:  # of any configuration
        raise InputError(f"{begun[0]} has checkpoints of a run whose {' or '.join(_BESIDE)} is missing; {_LOST}")
    if old is None or not begun:
        return None
    check_same_config(workdir, old, config)
    return old


def check_same_config(workdir: Path, old: ConfigDict, config: ConfigDict) -> None:
    """Raises InputError where a configuration changes what must not change in the run of a workdir."""
    recorded = (workdir / _DATA).exists()
    changed = configs.differences(old.to_dict(), configs.with_stored(config, old).to_dict())
    if changed := [change for change in changed if not (recorded and _MOVED.fullmatch(change))]:
        raise InputError(
            f"{workdir} holds a run with another configuration ({'; '.join(changed)}); "
            "give a new --workdir, or the old values to resume it"
        )


def check_length(workdir: Path, step: int, old: tuple[int, float], new: tuple[int, float]) -> None:
    """Raises InputError where a run that has done `step` steps cannot be made longer or shorter.

    Args:
      old, new: (total steps, number of first steps whose rates do not depend on them).
    """
    (total, free), (new_total, new_free) = old, new
    if total != new_total and step > min(free, new_free):
        raise InputError(
            f"{workdir} is at step {step} of {total}, and for {new_total} steps it would have differed "
            f"from step {int(min(free, new_free)) + 1} on. Give the old config.epochs and config.steps to resume it; "
            f"or, to train for longer from its weights, a new --workdir with --config.init_from={workdir}. Runs "
            "with config.optim.schedule=constant, or wsd until it decays, can be made longer; with "
            "config.model.vision.patch_dropout_until, before their whole images begin"
        )


def kept_for_longer(config: ConfigDict, free: float) -> int | None:
    """The step whose last checkpoint before or at it stays, since the run can be made longer from there; None: there is
    none, or it is any. `free`: of opening.run_length. Under a cosine, it would be one of the warm-up."""
    return int(free) if config.optim.schedule != "cosine" and math.isfinite(free) else None


def _data_at_start(workdir: Path) -> dict:
    """What data.json holds; empty for a run that is older than it. Raises InputError where it is damaged."""
    path = workdir / _DATA
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); {_LOST}") from None


def check_same_data(workdir: Path, found: Mapping[str, dict | None], of_before: Callable[[str], dict | None]) -> None:
    """Raises InputError where a run resumes with other data than it began with.

    Args:
      found: {"train": {"samples", "fingerprint"}, "val": the same, or None}. A run older than data.json takes any.
      of_before: name -> what an earlier version would have stored; it is asked where the data differ.
    """
    began = _data_at_start(workdir)
    for name, now in found.items():
        before = began.get(name)
        if before and now and before != now and before != of_before(name):
            more = f"{before['samples']:,} samples" if before["samples"] != now["samples"] else "the same number"
            raise InputError(
                f"config.data.{name} has other data than the run in {workdir} began with: {now['samples']:,} samples, "
                f"and {more} then. Give the data as they were to resume it; or, to train on these from its "
                f"weights, a new --workdir with --config.init_from={workdir}"
            )


def begin(workdir: Path, config: ConfigDict, tokenizer: Tokenizer, data: Mapping[str, dict | None]) -> None:
    """Writes what makes a folder a run, at each start: config.json last, so that it says that all is there."""
    tokenizer.save(workdir / "tokenizer.json")
    write_whole(workdir / _DATA, json.dumps(data) + "\n")
    write_whole(workdir / "config.json", configs.to_json(config) + "\n")
    if folder := config.checkpoint.folder:  # for whoever finds the checkpoints without the workdir
        if not storage.is_remote(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        for name in _BESIDE:
            storage.write(storage.join(folder, name), (workdir / name).read_bytes())
    storage.push(workdir)


def tokenizer_file(workdir: Path, config: ConfigDict) -> str:
    """The tokenizer of the run that a workdir, or else config.checkpoint.folder, holds.

    Raises:
      InputError: neither has one.
    """
    own = workdir / "tokenizer.json"
    folder = config.checkpoint.folder
    if not folder and not own.exists():
        raise InputError(f"{own}, the tokenizer of the run, is missing; {_LOST}")
    return str(own) if own.exists() or not folder else storage.join(folder, "tokenizer.json")


def _beside_checkpoints(config: ConfigDict) -> ConfigDict | None:
    """The configuration beside checkpoints elsewhere, of a run whose workdir is lost; None: there is none."""
    path = config.checkpoint.folder and storage.join(config.checkpoint.folder, "config.json")
    if not path or not all(storage.exists(storage.join(config.checkpoint.folder, name)) for name in _BESIDE):
        return None
    try:
        return configs.completed(json.loads(storage.read(path)))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); bring it back from a copy, or give another folder") from None


@contextlib.contextmanager
def claimed(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Takes the folder for this start, in the first process; another start in it is refused until the end. In a bucket,
    where a lock would outlast its machine, another start takes it over, and this one stops at its next save.

    Raises:
      InputError: files of others are in the way, another start is at work, or the name is not UTF-8.
    """
    check_utf8(workdir)
    if not processes.is_first():
        yield
        return
    Owned(workdir, "train").claim(_names(config))
    (workdir / _LOCK).touch()
    with at_work(workdir / _LOCK, "training", "give a new --workdir"):
        storage.take(workdir)
        yield


def _names(config: ConfigDict) -> list[str]:
    """What a run writes in its workdir. TensorBoard's events and profile/ get names that nobody has."""
    names = ["config.json", "tokenizer.json", "metrics.jsonl", "curves.png", _LOCK, _DATA]
    names += [bad_samples(process) for process in range(jax.process_count())]
    return names if config.checkpoint.folder else [*names, "checkpoints"]
