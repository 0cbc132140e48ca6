"""Local copies of what programs need as local files: weights, tokenizers, the small files of a workdir or of an output
folder in a bucket.

Such a folder in a bucket is worked in as a local one, which notes where it belongs (ORIGIN: {"url": ..., "files":
{name: [size, time] of what the bucket has}}). Checkpoints are written to and read from the bucket itself and are no
part of the copy.
"""

import atexit
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import write_whole
from rankclip_jax.common.ownership import INDEX, MARKER, ORIGIN, listed
from rankclip_jax.common.storage import listing, reading
from rankclip_jax.common.storage.place import is_http, is_remote, join, name_of, parent, place_of

CHECKPOINTS = "checkpoints"
_OWNER = ".lock"  # in the bucket: who took the folder last; here the file of that name is of another use
_LEFT = (ORIGIN, _OWNER)  # what stays on this machine
_CHUNK = 64 << 20
_LARGE = (".tfrecord", ".parquet")  # of what is written, this goes to the bucket itself
_BESIDE = (".json", ".txt")  # what says what a file of weights is


def fetched(path: str) -> Path:
    """A local copy of a file, with the .json and .txt beside it; or of a folder, without its checkpoints/.

    It lasts until the program ends. A workdir's copy knows its origin.

    Raises:
      InputError: there is neither, or as `listing.stat`.
    """
    path = path.rstrip("/")
    single = listing.stat([path])[0]
    if single:
        local = _temporary(name_of(parent(path)) or "copy")
        beside = [] if is_http(path) else listing.files_in(parent(path))
        for file in [single, *(file for file in beside if file.path.endswith(_BESIDE))]:
            _copy(file, local / name_of(file.path))
        return local / name_of(path)
    local = _temporary(name_of(path))
    _fetch(path, local)
    if not any(local.iterdir()):
        listing.check_bucket(path)
        raise InputError(f"no such file or folder: {path}")
    write_whole(local / ORIGIN, json.dumps({"url": path, "files": {}}))
    return local


@contextlib.contextmanager
def workdir(path: str | Path | None) -> Iterator[Path | None]:
    """The local folder for a workdir: itself, or a copy of one in a bucket, which gets what was written at the end.

    Raises:
      InputError: the workdir is where no checkpoints can be saved; or as `push`, with what was raised in the block.
    """
    if path is None or not is_remote(path):
        yield None if path is None else Path(os.path.expanduser(path))
        return
    url = str(path).rstrip("/")
    if place_of(url).scheme != "gs":
        raise InputError(
            f"--workdir={url}: Orbax saves no checkpoints there; give gs://BUCKET/RUN, or a local folder (data may be "
            "in s3://)"
        )
    folder = _temporary(name_of(url))
    _fetch(url, folder)
    with _worked_in(folder, url):
        yield folder


@contextlib.contextmanager
def output(path: str | Path, command: str) -> Iterator[Path]:
    """The local folder for what a command writes: itself, or a copy of its small files in a bucket, which gets what
    was written at the end. Shards go to the bucket itself, `shown(folder)`.

    Raises:
      InputError: it cannot be reached, is an http address, or holds what none of our commands wrote; or as `push`,
        with what was raised in the block.
    """
    if not is_remote(path):
        yield Path(os.path.expanduser(path))
        return
    url = str(path).rstrip("/")
    reading.writable(url)
    folder = _temporary(name_of(url))
    there = {file.path[len(url) + 1 :]: file for file in listing.files_below(url)}
    if there and MARKER not in there:
        raise InputError(f"{url} holds files that {command} did not write ({min(there)} ...); give a new folder")
    if there:
        _copy(there[MARKER], folder / MARKER)
        for name in [name for names in listed(folder).values() for name in names]:
            if name in there and not name.endswith(_LARGE):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(there[name], folder / name)
    with _worked_in(folder, url):
        yield folder


@contextlib.contextmanager
def _worked_in(folder, url):
    known = {name: _stamp(folder / name) for name in _names(folder)}
    write_whole(folder / ORIGIN, json.dumps({"url": url, "files": known}))
    try:
        yield
    except InputError as error:
        _push_at_the_end(folder)
        raise InputError(str(error).replace(str(folder), url)) from None
    except BaseException:
        _push_at_the_end(folder)
        raise
    push(folder)


def origin(folder: str | Path) -> str | None:
    """Where the local copy of a workdir belongs; None: the folder is not a copy."""
    note = Path(folder) / ORIGIN
    return json.loads(note.read_text())["url"] if note.is_file() else None


def shown(folder: str | Path) -> str:
    """Where a folder is: its name in the bucket, if it is the copy of one."""
    return origin(folder) or str(folder)


def take(folder: str | Path) -> None:
    """Makes the local copy of a folder the only one that writes to the bucket; nothing for a local folder.

    A machine that is gone cannot give anything back, so the last that comes has it, and others notice (`check_ours`).
    """
    url, noted = origin(folder), Path(folder) / ORIGIN
    if url is None:
        return
    note = json.loads(noted.read_text()) | {"owner": secrets.token_hex(8)}
    reading.write(join(url, _OWNER), note["owner"].encode())
    write_whole(noted, json.dumps(note))


def check_ours(folder: str | Path) -> None:
    """Raises InputError where another machine took the folder in the bucket since `take`."""
    if origin(folder) is None:
        return
    note = json.loads((Path(folder) / ORIGIN).read_text())
    if "owner" in note and reading.read(join(note["url"], _OWNER)).decode() != note["owner"]:
        raise InputError(
            f"another training began in {note['url']}, and resumes from the last checkpoint; so this one stops. "
            "Nothing more is written there"
        )


def push(folder: str | Path, every: float = 0.0) -> None:
    """Copies to the bucket what changed in the local copy of a folder; does nothing for a local one.

    `every`: seconds; nothing is copied sooner after the last time.

    Raises:
      InputError: the bucket cannot be reached or written, or as `check_ours`.
    """
    folder = Path(folder)
    noted = folder / ORIGIN
    if origin(folder) is None or time.time() - noted.stat().st_mtime < every:
        return
    check_ours(folder)
    note = json.loads(noted.read_text())
    # The configuration last: it says that all is there.
    for name in sorted(_names(folder), key=lambda name: (name == "config.json", name)):
        stamp = _stamp(folder / name)
        if note["files"].get(name) != stamp:
            reading.write(join(note["url"], name), (folder / name).read_bytes())
            note["files"][name] = stamp
    write_whole(noted, json.dumps(note))


def _push_at_the_end(folder):
    """After an error, which is what the user shall read; what could not be copied stays, and is named."""
    try:
        push(folder)
    except InputError as error:
        atexit.unregister(_remove)  # ours alone: others in this process may clean up by rmtree too
        print(f"not all of {folder} could be copied to the bucket, so it stays: {error}", file=sys.stderr)


def _fetch(url, folder):
    for file in listing.files_below(url):
        name = file.path[len(url) + 1 :]
        parts = name.split("/")
        stays = parts[0] in (CHECKPOINTS, INDEX) or name in _LEFT
        if not stays and not any(part in ("", ".", "..") for part in parts):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(file, folder / name)


def _copy(file, local):
    with open(local, "wb") as out:
        for begin in range(0, file.size, _CHUNK):
            out.write(reading.read(file.path, begin, min(begin + _CHUNK, file.size)))


def _names(folder):
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in found if name not in _LEFT and not name.endswith(".part")]


def _stamp(path):
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _temporary(name):
    """An empty folder of this name, which goes when the program ends."""
    above = tempfile.mkdtemp(prefix="rankclip_jax.")
    atexit.register(_remove, above)
    os.mkdir(os.path.join(above, name))
    return Path(above, name)


def _remove(folder):
    shutil.rmtree(folder, ignore_errors=True)
