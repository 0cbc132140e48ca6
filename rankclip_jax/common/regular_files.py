"""Local files that other people's files name: read at once if they are regular files, and refused otherwise."""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from rankclip_jax.common.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@contextlib.contextmanager
def open_regular(path: str | os.PathLike, max_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Opens a file to read, without waiting for the other end of a pipe. An OSError passes through.

    Raises:
      InputError: not a regular file, or larger than `max_bytes`. The message does not name the file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{_KINDS.get(stat.S_IFMT(found.st_mode), 'not a file')}, not a regular file")
        if max_bytes is not None and found.st_size > max_bytes:
            raise InputError(f"{found.st_size / 1e6:,.0f} MB; more than config.data.max_file_mb")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def read_regular(path: str | os.PathLike, max_bytes: int | None = None) -> bytes:
    """The bytes of a file. Raises as `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read()
