"""Files that are complete under their names, or not there: written beside their place, brought to the disk, renamed."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from rankclip_jax.common.errors import InputError

_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room") | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"
)


@contextlib.contextmanager
def whole(path: str | Path, part: Path | None = None) -> Iterator[Path]:
    """Gives an empty file to write to; at the end of the block it gets the name `path`, and on an error it vanishes.

    A link at `path` is replaced itself; what it leads to stays.

    Args:
      part: a temporary name that is the caller's own: what a kill left there is replaced. None: one that no other file
        has.

    Raises:
      InputError: the disk is full or cannot be written, or `path` is a folder or a device.
    """
    path = Path(path)
    # 50 letters of any script fit a file system's 255 bytes, with the rest of the name.
    made = part or path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.part")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is not a file")
        if part:
            part.unlink(missing_ok=True)
        os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        yield made
        with open(made, "rb") as written:
            os.fsync(written.fileno())
        os.replace(made, path)
    except BaseException as error:
        made.unlink(missing_ok=True)
        # An error about another file is that of whoever reads it in the block.
        if isinstance(error, OSError) and str(error.filename) in ("None", str(made)):
            raise cannot_write(path, error) from None
        raise
    with contextlib.suppress(OSError):  # the rename itself to the disk, where folders can be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Writes a file (a str as UTF-8) whole or not at all. Raises InputError as `whole` does."""
    with whole(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where they are not there. Raises InputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None


def cannot_write(path: Path, error: OSError) -> InputError:
    """The line for a disk that is full or may not be written."""
    advice = _ADVICE.get(error.errno or 0)
    then = f"; {advice}, and start the same command again: what is finished is kept" if advice else ""
    return InputError(f"cannot write {path}: {error.strerror or error}{then}")
