"""What the flags of training and evaluation stand for: an experiment, a workdir, and changed keys."""

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rankclip_jax import evaluation
from rankclip_jax.common import storage, tables
from rankclip_jax.common.errors import InputError, located
from rankclip_jax.config import experiments
from rankclip_jax.config.guess import guess_format
from rankclip_jax.config.keys import KEYS, USUAL


@dataclasses.dataclass(frozen=True)
class Given:
    """`config`: an experiment; None: that of the workdir's run. `overrides`: "key.of.a.group=value", in order."""

    config: str | None
    workdir: str | Path | None  # a str: in a bucket
    overrides: list[str]


def add_to(parser: argparse.ArgumentParser) -> None:
    """The flags that `read` knows."""
    parser.add_argument(
        "what",
        nargs="?",
        metavar="WHAT",
        help="to train: an experiment, data of your own (a table, a folder, shards), or a workdir, to resume it; to "
        "evaluate: a workdir, an export, a .pt or a hub id",
    )
    parser.add_argument(
        "--config",
        help="name or file of an experiment, with its argument after a colon; default: that of WHAT, or of the "
        "workdir's run",
    )
    parser.add_argument("--workdir", help="folder of the run; default: runs/ and the name of WHAT")
    parser.add_argument("--mode", choices=["train", "eval", "plan"], default="train")
    data = add_sets(parser)
    data.add_argument("--val", metavar="DATA", help="held-out pairs: for the validation loss; a table: for retrieval")
    data.add_argument("--tokenizer", help="a tokenizer.json or hub id, for weights that have none")
    data.add_argument("--out", metavar="FILE", help="where an evaluation without a workdir writes results")


def add_sets(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags that `sets` knows."""
    data = parser.add_argument_group("data of your own (docs/tutorials.md)")
    many: dict[str, Any] = dict(action="extend", nargs="+", default=[])  # a flag that is given again adds its sets
    data.add_argument("--retrieval", metavar="TABLE", help="evaluate retrieval on these pairs", **many)
    data.add_argument(
        "--labels",
        metavar="TABLE:COLUMN",
        help="evaluate classification into the classes of a column; or a folder with a folder a class",
        **many,
    )
    data.add_argument("--imagenet", metavar="FOLDER", help="evaluate classification on ImageNet's validation images")
    return data


def sets(flags: argparse.Namespace, alone: bool, otherwise: Sequence[str] = ()) -> list[str]:
    """Overrides that name the sets of `add_sets`' flags.

    Args:
      alone: in place of all that the configuration names.
      otherwise: for retrieval where no table is given.

    Raises:
      InputError: a set is nothing that can be used.
    """
    overrides = []
    if alone and (flags.labels or flags.retrieval or flags.imagenet):
        overrides += ["eval.suite=None", "eval.data_dir=None", *(f"eval.{kind}={{}}" for kind in evaluation.KINDS)]
    if captioned := flags.retrieval or otherwise:
        overrides.append(f"eval.retrieval={_by_name('--retrieval', map(_captioned, captioned))!r}")
    if flags.labels:
        overrides.append(f"eval.zero_shot={_by_name('--labels', map(_labelled, flags.labels))!r}")
    if flags.imagenet:
        overrides += ["eval.suite=('imagenet',)", f"eval.data_dir={flags.imagenet!r}"]
    return overrides


def read(flags: argparse.Namespace, keys: Sequence[str]) -> Given:
    """The meaning of `add_to`'s flags; `keys` of the command line come last, and so they count.

    Raises:
      InputError: WHAT, or a set, is nothing that this command can use.
    """
    config, workdir, what = flags.config, flags.workdir, flags.what
    given = dict(key.split("=", 1) for key in keys if "=" in key)
    overrides = []
    if flags.mode == "eval":
        if what and not workdir and _is_run(what):
            workdir = what
        elif what:  # any model; the workdir takes its results
            overrides.append(f"eval.model={what!r}")
    elif what and _is_experiment(what):
        if config:
            raise InputError(f"{what} and --config {config} are two experiments; give one")
        config = what
    elif what and not (config or workdir or storage.is_remote(what)) and _is_run(what):  # whose pictures are no data
        workdir = what
    elif what:
        if flags.mode == "plan" and not (storage.is_remote(what) or set(what) & set("*?[{") or storage.exists(what)):
            raise InputError(f"no such file: {located(what)}")
        config = config or "own"
        overrides.append(f"data.train={what!r}")
        if "data.format" not in given:
            overrides.append(f"data.format={_format(what)!r}")
        workdir = workdir or Path("runs") / name_of(what)
    if flags.val:
        overrides.append(f"data.val={_validation(flags.val, what, given.get('data.format'))!r}")
    tables_of_val = [path for path in [flags.val] if path and _is_table(path)]
    overrides += sets(flags, alone=flags.mode == "eval", otherwise=tables_of_val)
    overrides += _read_as_data(flags, [flags.val, what], tables_of_val, given)
    if flags.tokenizer:
        overrides.append(f"tokenizer.path={flags.tokenizer!r}")
    if config and not workdir and flags.mode != "eval":
        workdir = Path("runs") / Path(config.partition(":")[0]).stem
    if workdir and not storage.is_remote(workdir):
        workdir = Path(workdir)
    return Given(config, workdir or None, [*overrides, *keys])


def usual_keys() -> str:
    """The keys that people set, by group, with their defaults and what they take, for --help."""
    lines = ["keys that people set, with their defaults (docs/config.md has all):"]
    group = None
    for name in USUAL:
        key: Any = KEYS
        for part in name.split("."):
            key = key[part]
        if group != (group := name.rpartition(".")[0]):
            lines.append(f"\n{group or 'the run'}")
        lines.append(f"  {f'--config.{name}={key.default}':40} {key.expected}{' or None' if key.optional else ''}")
    return "\n".join(lines)


def name_of(data: str) -> str:
    """A name for data at a path: mine.csv -> mine, photos/ -> photos, shards/{00..31}.tar -> shards."""
    parts = [part for part in Path(data.rstrip("/")).parts if part not in ("/", "..", ".")]
    plain = [part for part in parts if not set(part) & set("*?{}[]:")]
    name = plain[-1] if plain else "own"
    return name.removesuffix(".gz").rpartition(".")[0] or name


def _is_run(folder: str) -> bool:
    return storage.is_folder(storage.join(folder, "checkpoints")) or _is_file(storage.join(folder, "metrics.jsonl"))


def _is_file(path: str) -> bool:
    return storage.exists(path) and not storage.is_folder(path)


def _is_experiment(what: str) -> bool:
    name = what.partition(":")[0]
    found = experiments.find(name)
    return name.endswith(".py") or (found is not None and found.suffix == ".py")


def _is_table(path: str) -> bool:
    return path.lower().endswith(tables.ENDINGS)


def _format(what: str) -> str:
    try:
        return guess_format(what)
    except InputError:
        if os.path.exists(os.path.expanduser(what)):
            raise
        near = difflib.get_close_matches(what, experiments.names(), 1)
        others = [name for name in experiments.names() if name != "own"]
        raise InputError(
            f"{what} is neither an experiment nor data. Expected one of {', '.join(others)}"
            f"{f' ({near[0]}?)' if near else ''}; or a table ({', '.join(tables.ENDINGS[::2])}), a folder, or shards "
            "(.tar, .tfrecord, .parquet)"
        ) from None


def _validation(val: str, train: str | None, kind: str | None) -> str | dict:
    """As config.data.val: a mixture of one where it has another format than the training data, which is `kind`, or
    guessed. Raises InputError where there is nothing to guess by."""
    if train is None or _is_experiment(train):
        return val
    try:
        own = guess_format(val)
    except InputError:
        if kind:
            return val
        raise
    return val if own == (kind or guess_format(train)) else {"val": {"path": val, "format": own}}


def _read_as_data(
    flags: argparse.Namespace, data: list[str | None], otherwise: list[str], given: dict[str, str]
) -> list[str]:
    """Overrides by which a set in the table that is trained or validated on has its columns and its folder."""
    captioned = dict(map(_captioned, flags.retrieval or otherwise))
    sets = {"retrieval": captioned, "zero_shot": _by_name("--labels", map(_labelled, flags.labels))}
    return [
        f"eval.{kind}.{name}.{key}={given[f'data.{key}']}"
        for kind, named in sets.items()
        for name, fields in named.items()
        for key in ("image_key", "caption_key", "image_folder", "delimiter", "encoding")
        if fields["path"] in data and f"data.{key}" in given and (kind, key) != ("zero_shot", "caption_key")
    ]


def _by_name(flag: str, sets: Iterable[tuple[str, dict]]) -> dict[str, dict]:
    """Name -> set; columns of one table, or of tables of one name, have the column in their names. Raises InputError
    where two have one name all the same."""
    given, found = list(sets), dict[str, dict]()
    names = [name for name, _ in given]
    for name, fields in given:
        if names.count(name) > 1 and "label_key" in fields:
            name = f"{name}-{fields['label_key']}"
        if name in found:
            both = f"{found[name]['path']} and {fields['path']}"
            raise InputError(f"{flag}: {both} would both be the set {name}; rename one of them")
        found[name] = fields
    return found


def _captioned(path: str) -> tuple[str, dict]:
    if _is_table(path):
        return name_of(path), {"path": path}
    if any(_is_file(storage.join(path, name)) for name in ("nshards.txt", "test/nshards.txt")):
        return name_of(path), {"path": path, "format": "clip_benchmark"}
    raise InputError(f"--retrieval {path}: expected a table of images and captions ({', '.join(tables.ENDINGS[::2])})")


def _labelled(text: str) -> tuple[str, dict]:
    endings = "|".join(map(re.escape, tables.ENDINGS))
    if table := re.fullmatch(rf"(.+?(?:{endings})):(.+)", text, re.IGNORECASE):  # a column may be a path: meta:label
        return name_of(table[1]), {"path": table[1], "label_key": table[2]}
    if storage.is_folder(text):
        return name_of(text), {"path": text, "format": "folder"}
    raise InputError(f"--labels {text}: expected TABLE:COLUMN, for example heldout.csv:label, or a folder of folders")
