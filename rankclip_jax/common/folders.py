"""Which files below a folder are pictures, and which folders are classes: the same for training, evaluation, embed."""

import os
from collections.abc import Iterator

from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import ENDINGS

# What systems leave behind, in addition to everything whose name begins with a dot.
_LEFTOVERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}


def is_leftover(name: str) -> bool:
    """Whether a file or folder is hidden, or left by a system: .ipynb_checkpoints, ._a.jpg, __MACOSX ..."""
    return name.startswith(".") or name in _LEFTOVERS


def is_picture(name: str) -> bool:
    """Whether a file's name ends as that of a picture, in any case."""
    return name.lower().endswith(ENDINGS)


def files_below(root: str) -> Iterator[str]:
    """Paths of all files, relative to `root`, in any order, without leftovers. Links are followed, each folder once.

    Raises:
      InputError: a folder cannot be read, whose files would be left out without a word.
    """
    if storage.is_remote(root):
        names = (file.path[len(root.rstrip("/")) + 1 :] for file in storage.files_below(root))
        yield from (name for name in names if not any(map(is_leftover, name.split("/"))))
        return
    seen = set()
    for folder, folders, files in os.walk(root, onerror=_refuse_unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_leftover(name)]
        below = folder[len(root) :].strip("/")
        yield from (f"{below}/{name}" if below else name for name in files if not is_leftover(name))


def _refuse_unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # of which the caller finds no files
        raise InputError(f"{error.filename} cannot be read: {error.strerror}; make it readable, or move it away")


def pictures_below(root: str) -> list[str]:
    """Paths of all pictures, relative to `root`, in order."""
    return sorted(name for name in files_below(root) if is_picture(name))


def class_folders(root: str) -> list[str]:
    """Names of the folders in a folder, without leftovers: numbers in numeric order, other names by letters."""
    if storage.is_remote(root):
        return in_order(list({name.partition("/")[0] for name in files_below(root) if "/" in name}))
    names = [item.name for item in os.scandir(root) if item.is_dir() and not is_leftover(item.name)]
    return in_order(names)


def in_order(names: list[str]) -> list[str]:
    """Names of classes in their order: numeric if all are whole numbers."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
