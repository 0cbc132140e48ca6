"""Collections of images with access by number: a folder, a table, or shards."""

import dataclasses
import functools
import os
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rankclip_jax import config as configs
from rankclip_jax.common import folders, storage, tables
from rankclip_jax.common.errors import InputError, located
from rankclip_jax.common.pictures import ENDINGS, MAX_FILE_MB, BadImageError, opened
from rankclip_jax.common.regular_files import read_regular
from rankclip_jax.config.guess import SHARDS, guess_format, of_shards


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images by number.

    Attributes:
      size: number of images.
      name: i -> a readable name of image i.
      image: i -> image i as a path or a PIL image; raises InputError if it cannot be read.
      lost: (where, reason) of what has no number: bad rows of a table, unreachable samples of shards.
      captions: i -> the captions of image i; () where there are none.
      captioned: whether the collection has captions; of shards, whether some of 64 evenly spaced images have.
      captions_at_hand: whether they are in memory, as a table's are.
    """

    size: int
    name: Callable[[int], str]
    image: Callable[[int], object]
    lost: tuple[tuple[str, str], ...] = ()
    captions: Callable[[int], tuple[str, ...]] = lambda row: ()
    captioned: Callable[[], bool] = lambda: False
    captions_at_hand: bool = False

    def fingerprint(self) -> str:
        """A checksum of the names without their folders, which may move; of large collections of evenly spaced ones."""
        return self._checksum(lambda i: self.name(i).rpartition("/")[2])

    def fingerprint_of_captions(self) -> str:
        """The same of the captions."""
        return self._checksum(lambda i: "\0".join(self.captions(i)))

    def _checksum(self, text: Callable[[int], str]) -> str:
        texts = "\n".join(map(text, range(0, self.size, max(1, self.size // 100_000))))
        return f"{zlib.crc32(texts.encode()):08x}"

    def caption(self, i: int) -> str:
        """The first caption of image i; "" where there is none."""
        return next(iter(self.captions(i)), "")


def open_pictures(
    data: str,
    image_key: str | None = None,
    delimiter: str = ",",
    encoding: str | None = None,
    caption_key: str | None = None,
    image_folder: str | None = None,
) -> Pictures:
    """Opens a collection.

    Args:
      data: a folder (all images below it, by name; or its shards), a table with a column of paths relative to the file
        (common/tables.py), or shards: a .tar, .tfrecord or .parquet, also as a glob or {00000..00099} range. They need
        TensorFlow.
      image_key, caption_key: column, feature or member; None: the format's default.
      delimiter, encoding, image_folder: of a table, as tables.read_table.

    Raises:
      InputError: no images, or an unknown kind.
    """
    data = os.path.expanduser(data)
    path = Path(data)
    if path.is_dir() if not storage.is_remote(data) else storage.is_folder(data):
        return _folder(data, image_key, caption_key)
    if data.lower().endswith(tables.ENDINGS):
        return _table(data, image_key, delimiter, encoding, caption_key, image_folder)
    if kind := of_shards(data):
        return _shards(data, kind, image_key, caption_key)
    if not storage.is_remote(data) and not path.suffix and not path.exists():
        raise InputError(f"no such file or folder: {located(data)}")
    shards = ", ".join(f".{ending}" for ending in SHARDS)
    known = f"a folder, a table ({', '.join(tables.ENDINGS)}), or shards ({shards})"
    raise InputError(f"cannot open {data}. Expected {known}")


def _folder(path: str, image_key: str | None, caption_key: str | None) -> Pictures:
    names = list(folders.files_below(path))
    files = sorted(filter(folders.is_picture, names))
    texts = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(".txt")}
    if not files:
        if (kind := guess_format(path)) != "folder":
            return _shards(path, kind, image_key, caption_key)
        raise InputError(f"{path} has no images ({', '.join(ENDINGS)}) and no shards ({', '.join(SHARDS)})")

    def beside(row):
        return texts.get(os.path.splitext(files[row])[0])

    def captions(row):
        return _good([_text(storage.join(path, beside(row)))] if beside(row) else [])

    def image(row):
        return _file(storage.join(path, files[row]))

    captioned = functools.cache(lambda: any(map(beside, range(len(files)))))
    return Pictures(len(files), lambda row: _readable(files[row]), image, (), captions, captioned)


def _text(path: str) -> str:
    """A caption's file; "" where it cannot be read, as in training, which loses only its row."""
    try:
        data = storage.read(path) if storage.is_remote(path) else read_regular(path, MAX_FILE_MB * 1_000_000)
        return data.decode("utf-8-sig")
    except (InputError, OSError, UnicodeDecodeError):
        return ""


def _good(captions: Iterable[str]) -> tuple[str, ...]:
    """The captions that say something, as the sources' rule is."""
    return tuple(caption.strip() for caption in captions if any(map(_is_seen, caption)))


def _is_seen(character: str) -> bool:
    return not (character.isspace() or unicodedata.category(character) == "Cf")


def _readable(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 are escaped, as Parquet and consoles take only text."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _file(path: str) -> object:
    """A picture: the path of a local one."""
    if not storage.is_remote(path):
        return Path(path)
    try:
        return opened(storage.read(path))
    except (storage.MissingError, storage.NoPlaceError) as error:
        raise BadImageError(str(error)) from None
    except BadImageError:
        raise
    except InputError as error:  # no fault of the picture, which would be left out
        raise ConnectionError(str(error)) from None


def _table(
    file: str,
    image_key: str | None,
    delimiter: str,
    encoding: str | None,
    caption_key: str | None,
    image_folder: str | None,
) -> Pictures:
    keys = (image_key,) if image_key else tables.IMAGE_KEYS
    data = storage.read(file) if storage.is_remote(file) else None
    how: dict[str, Any] = dict(delimiter=delimiter, encoding=encoding, data=data, image_folder=image_folder)
    table = tables.read_table(file, keys, None, **how)
    names = table.images

    def name(row):
        return names[row].as_py()

    @functools.cache
    def texts():
        named = (caption_key,) if caption_key else tables.CAPTION_KEYS
        try:
            rows = tables.read_table(file, keys, named, **how)
        except InputError:  # a table of images alone
            if caption_key:
                raise
            return {}
        assert rows.texts is not None
        return dict(zip(rows.numbers.tolist(), rows.texts, strict=True))

    def captions(row):
        text = texts().get(int(table.numbers[row]))
        text = () if text is None else text.as_py()
        return _good([text] if isinstance(text, str) else text)

    lost = tuple((f"{file} row {number}", reason) for number, reason in table.bad)
    image = lambda row: _file(tables.image_path(table.folder, name(row)))  # noqa: E731
    return Pictures(len(names), name, image, lost, captions, lambda: bool(texts()), captions_at_hand=True)


def _shards(pattern: str, kind: str, image_key: str | None, caption_key: str | None) -> Pictures:
    from input_pipeline import encoded_images, sources  # TensorFlow

    keys = {"image_key": image_key, "caption_key": caption_key}
    spec = configs.complete({"data": {"format": kind, **keys}}).data
    source = sources.open_pictures(spec, pattern)
    read = encoded_images.reader(source)

    lost = tuple((one.where, one.reason) for one in source.lost)
    name, captions = lambda i: _readable(source.where(i)), encoded_images.captions(source)
    some = {i * source.size // 64 for i in range(64)}
    captioned = functools.cache(lambda: any(captions(i) for i in sorted(some)))
    return Pictures(source.size, name, lambda i: opened(read(i)), lost, captions, captioned)
