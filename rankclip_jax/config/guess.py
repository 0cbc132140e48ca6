"""The format of data by its path."""

import os
from pathlib import Path

from rankclip_jax.common import storage, tables
from rankclip_jax.common.errors import InputError

SHARDS = dict(tar="webdataset", tfrecord="tfrecord", tfrecords="tfrecord", parquet="parquet")

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


def guess_format(source: str) -> str:
    """The format suggested by a path, glob or range: of its ending, or of what the folder holds.

    Raises:
      InputError: it suggests none.
    """
    if source.lower().endswith(tables.ENDINGS):
        return "csv"
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        shards = {ending: list(folder.glob(f"*.{ending}")) for ending in SHARDS}
        if all((folder / table.stem).is_dir() for table in shards["parquet"]):
            del shards["parquet"]  # of img2dataset, about the folders of pictures beside
        return next((SHARDS[ending] for ending, files in shards.items() if files), "folder")
    kind = SHARDS.get(source.rpartition(".")[2].lower())
    if kind:
        return kind
    if storage.is_remote(source) and storage.is_folder(source):
        endings = {file.path.rpartition(".")[2] for file in storage.files_in(source)}
        return next((kind for ending, kind in SHARDS.items() if ending in endings), "folder")
    if source.lower().endswith(_COMPRESSED):
        raise InputError(f"{source} is compressed, so its samples cannot be read by number; decompress it first")
    raise InputError(
        f"cannot infer the format of {source} from its name; add --format, in training --config.data.format "
        "(see docs/data.md)"
    )
