"""Bytes of files, local or not: whole, ranges, many at once; and small files written."""

import contextlib
import io
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from rankclip_jax.common import files
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.storage.place import NoPlaceError, Place, answer_of, explained, is_remote, place_of, store_of

_HELD = 4096  # reads started and not yet taken


class MissingError(InputError):
    """There is no such file, or it is shorter than what is asked for: trying again does not help."""


def read(path: str, begin: int = 0, end: int | None = None) -> bytes:
    """Bytes [begin:end] of a file; None: to its end.

    Raises:
      MissingError: as its name says.
      InputError: it cannot be reached, after some minutes of trying, or may not be read.
    """
    return _result(path, begin, end, _start(path, begin, end))


def write(path: str, data: bytes) -> None:
    """Writes a file whole. Raises InputError as `read`."""
    if not is_remote(path):
        files.write_whole(path, data)
        return
    store, key = store_of(writable(path))
    with _errors_in_one_line(path):
        answer_of(path, store.write(key, data))


def delete(path: str) -> None:
    """Deletes a file, if there is one. Raises InputError as `read`."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
        return
    store, key = store_of(writable(path))
    with _errors_in_one_line(path):
        answer_of(path, store.write(key, None))


def writable(path: str) -> Place:
    """`place_of` a path that is to be written. Raises InputError for an http address."""
    place = place_of(path)
    if place.web:
        raise InputError(f"{path}: nothing can be written to an http address; give a local path, gs:// or s3://")
    return place


@contextlib.contextmanager
def _errors_in_one_line(path):
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, InputError) else explained(path, error) from None


def _start(path: str, begin: int, end: int | None) -> Any:
    """A future of TensorStore's, or the bytes of a local file."""
    if not is_remote(path):
        try:
            with open(path, "rb") as file:
                file.seek(begin)
                return file.read(-1 if end is None else end - begin)
        except FileNotFoundError:
            raise MissingError(f"no such file: {path}") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if end is not None and end <= begin:
        return b""
    store, key = store_of(place_of(path))
    whole = begin == 0 and end is None
    return store.read(key) if whole else store.read(key, byte_range=slice(begin, end))


def _result(path: str, begin: int, end: int | None, started: Any) -> bytes:
    if isinstance(started, bytes):
        found = started
    else:
        try:
            answer = answer_of(path, started)
        except ValueError as error:
            if "OUT_OF_RANGE" in str(error):
                raise MissingError(f"{path} ends before byte {end or begin}: {one_line(error)}") from None
            if "[HTTP code 410]" in str(error):  # gone
                raise MissingError(f"no such file: {path}") from None
            # TensorStore's words for a name that is too long or has a line end in it, curl's, a server's for too long.
            if re.search(r"Invalid \w+ object name|URL rejected|\[HTTP code 414\]", str(error)):
                raise NoPlaceError(f"{path}; {one_line(error)}") from None
            raise explained(path, error) from None
        if answer.state != "value":
            raise MissingError(f"no such file: {path}")
        found = answer.value
    if end is not None and len(found) != max(end - begin, 0):
        raise MissingError(f"{path} ends before byte {end}")
    return found


class ReadAhead:
    """Reads that are started long before they are taken, so that many are on their way at once, without a thread each.

    Attributes:
      failed: why the store stopped answering; from then on `take` raises it at once.
    """

    def __init__(self) -> None:
        self.failed: InputError | None = None
        self._started: OrderedDict[tuple[str, int, int | None], list] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, path: str, begin: int = 0, end: int | None = None) -> None:
        """Starts a read. What is never taken makes way for newer ones."""
        if self.failed or not is_remote(path):
            return
        with contextlib.suppress(InputError):  # `take` says it
            future = _start(path, begin, end)
            with self._lock:
                self._started.setdefault((path, begin, end), []).append(future)
                while len(self._started) > _HELD:
                    self._started.popitem(last=False)

    def check(self) -> None:
        """Raises InputError where the store stopped answering."""
        if self.failed:
            raise self.failed

    def take(self, path: str, begin: int = 0, end: int | None = None) -> bytes:
        """As `read`; from a read that was started, if there is one."""
        self.check()
        with self._lock:
            waiting = self._started.get((path, begin, end))
            future = waiting.pop() if waiting else None
            if waiting is not None and not waiting:
                del self._started[path, begin, end]
        try:
            return _result(path, begin, end, _start(path, begin, end) if future is None else future)
        except InputError as error:
            if is_remote(path) and not isinstance(error, MissingError | NoPlaceError):
                self.failed = error
            raise


class RemoteFile(io.RawIOBase):
    """A file that is not local, to seek and read in; one request a read."""

    def __init__(self, path: str, size: int):
        """`size`: its length in bytes."""
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As that of any file."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def size(self) -> int:
        """Its length in bytes."""
        return self._size

    def read(self, count: int | None = -1) -> bytes:
        """As that of any file."""
        end = self._size if count is None or count < 0 else min(self._at + count, self._size)
        found = read(self._path, self._at, end) if end > self._at else b""
        self._at += len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        """As that of any file."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)
