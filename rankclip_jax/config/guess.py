"""The format of data by its path."""

import os
import re
from pathlib import Path

from rankclip_jax.common import storage, tables
from rankclip_jax.common.errors import InputError

# As TensorFlow names shards, perhaps with wildcards: a.tfrecord-00000-of-00002, a.tfrecord*.
_SHARD = re.compile(r"\.(tar|tfrecords?|parquet)(\*|-[\d*?{}.,]+(-of-[\d*?]+)?)?$")
SHARDS = dict(tar="webdataset", tfrecord="tfrecord", tfrecords="tfrecord", parquet="parquet")

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


def of_shards(source: str) -> str | None:
    """The format of shards by the ending of a name, glob or range; None: it is not theirs."""
    shard = _SHARD.search(source.lower())
    return SHARDS[shard[1]] if shard else None


def _of_folder(kinds: set[str | None]) -> str:
    return next((kind for kind in SHARDS.values() if kind in kinds), "folder")


def guess_format(source: str) -> str:
    """The format suggested by a path, glob or range: of its ending, or of what the folder holds.

    Raises:
      InputError: it suggests none.
    """
    if source.lower().endswith(tables.ENDINGS):
        return "csv"
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        kinds = {name: of_shards(name) for name in os.listdir(folder)}
        about = {name for name in kinds if (folder / Path(name).stem).is_dir()}  # img2dataset's tables of such folders
        return _of_folder({kind for name, kind in kinds.items() if kind != "parquet" or name not in about})
    if kind := of_shards(source):
        return kind
    if storage.is_remote(source) and storage.is_folder(source):
        return _of_folder({of_shards(file.path) for file in storage.files_in(source)})
    if source.lower().endswith(_COMPRESSED):
        raise InputError(f"{source} is compressed, so its samples cannot be read by number; decompress it first")
    raise InputError(
        f"cannot infer the format of {source} from its name; add --format, in training --config.data.format "
        "(see docs/data.md)"
    )
