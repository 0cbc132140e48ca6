"""Collections of images with access by number: a folder, a csv, or shards."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import ENDINGS, opened

_SHARDS = {".tar": "webdataset", ".tfrecord": "tfrecord", ".tfrecords": "tfrecord", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images by number.

    Attributes:
      size: number of images.
      name: i -> a readable name of image i.
      image: i -> image i as a path or a PIL image; raises InputError if it cannot be read.
    """

    size: int
    name: Callable[[int], str]
    image: Callable[[int], object]


def open_pictures(data: str, image_key: str | None = None, delimiter: str = ",") -> Pictures:
    """Opens a collection.

    Args:
      data: a folder (all images below it, by name), a .csv or .tsv with a column of paths relative to the file, or
        shards: a .tar, .tfrecord or .parquet, also as a glob or {00000..00099} range. Shards need TensorFlow.
      image_key: column, feature or member of the image; None: the format's default.
      delimiter: of a csv.

    Raises:
      InputError: no images, or an unknown kind.
    """
    path = Path(data)
    if path.is_dir():
        return _folder(path)
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return _table(path, image_key or "image", "\t" if ending == ".tsv" else delimiter)
    if ending in _SHARDS:
        return _shards(data, _SHARDS[ending], image_key)
    raise InputError(f"cannot open {data}. Expected a folder, a .csv or .tsv, or shards ({', '.join(_SHARDS)})")


def _folder(path: Path) -> Pictures:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not files:
        raise InputError(f"{path} has no images ({', '.join(ENDINGS)}); for shards give their pattern, {path}/*.tar")
    return Pictures(len(files), lambda i: str(files[i].relative_to(path)), lambda i: files[i])


def _table(path: Path, image_key: str, delimiter: str) -> Pictures:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    with open(path, newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter)
        if image_key not in (reader.fieldnames or ()):
            columns = ", ".join(reader.fieldnames or ()) or "none"
            raise InputError(f"{path} has no column {image_key!r}; its columns are: {columns}. Set --image-key")
        names = [row[image_key] or "" for row in reader]
    if not names:
        raise InputError(f"{path} has no rows after its header")
    return Pictures(len(names), lambda i: names[i], lambda i: path.parent / names[i])


def _shards(pattern: str, kind: str, image_key: str | None) -> Pictures:
    from input_pipeline import encoded_images, sources  # TensorFlow

    spec = configs.complete({"data": {"format": kind, "image_key": image_key}}).data
    source = sources.open_source(spec, pattern, image_side=0)
    read = encoded_images.reader(source)

    return Pictures(source.size, source.where, lambda i: opened(read(i)))
