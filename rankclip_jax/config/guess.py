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


def guess_format(source: str) -> str:
    """The format suggested by a path, glob or range: of its ending, or of what the folder holds.

    Raises:
      InputError: it suggests none.
    """
    if source.lower().endswith(tables.ENDINGS):
        return "csv"
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        shards = {end: [*folder.glob(f"*.{end}"), *folder.glob(f"*.{end}-[0-9]*-of-*")] for end in SHARDS}
        if all((folder / table.stem).is_dir() for table in shards["parquet"]):
            del shards["parquet"]  # of img2dataset, about the folders of pictures beside
        return next((SHARDS[ending] for ending, files in shards.items() if files), "folder")
    if kind := of_shards(source):
        return kind
    if storage.is_remote(source) and storage.is_folder(source):
        found = {of_shards(file.path) for file in storage.files_in(source)}
        return next((kind for kind in SHARDS.values() if kind in found), "folder")
    if source.lower().endswith(_COMPRESSED):
        raise InputError(f"{source} is compressed, so its samples cannot be read by number; decompress it first")
    raise InputError(
        f"cannot infer the format of {source} from its name; add --format, in training --config.data.format "
        "(see docs/data.md)"
    )
