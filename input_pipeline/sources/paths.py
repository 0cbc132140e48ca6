"""Expands paths of a configuration: brace ranges, globs, folders and lists, local or in a bucket."""

import contextlib
import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError, located, one_line
from rankclip_jax.common.folders import is_leftover
from rankclip_jax.common.foreign_files import refuse_pointer

_OF_MANY = re.compile(r"-\d+-of-\d+$")  # a.tfrecord-00000-of-00002
_RANGE = re.compile(r"\{([^{}]*)\}")


def expand(pattern: str | Sequence[str], *, endings: tuple[str, ...], hint: str | None = None) -> list[str]:
    """The files of a pattern, in order.

    Args:
      pattern: a path with ranges {00000..00331} (leading zeros are kept), choices {a,b} and wildcards *, ?, [...]; or a
        folder, which means its files with one of the `endings`; or several patterns, whose files are concatenated.
        Local, or gs://, s3://, http(s):// (where a folder or a wildcard cannot be listed).
      hint: message for users who do not have the data.

    Raises:
      InputError: no match, a Git LFS pointer in place of the first file, or what `storage.stat` raises.
    """
    if isinstance(pattern, os.PathLike):
        pattern = os.fspath(pattern)
    if not pattern:
        raise InputError("no path to the data is given" + (f"; {hint}" if hint else ""))
    if not isinstance(pattern, str):
        if not isinstance(pattern, Sequence):
            raise InputError(f"config.data.train and .val must be a path or a list of paths; got {pattern!r}")
        return [path for one in pattern for path in expand(str(one), endings=endings, hint=hint)]
    paths = []
    choices = [pattern] if os.path.exists(pattern) else braces(pattern)
    there = _remote_files(choices) if storage.is_remote(pattern) else {}
    for path in choices:
        found = [path] if path in there else _matches(path, endings)
        if not found:
            if storage.is_remote(path):
                storage.check_bucket(path)
            raise InputError(f"no such file: {located(path)}" + (f"; {hint}" if hint else ""))
        paths += found
    if not storage.is_remote(paths[0]) and os.path.isfile(paths[0]):
        with contextlib.suppress(OSError):  # of which the reader speaks
            refuse_pointer(Path(paths[0]))
    return paths


def _remote_files(choices):
    """Those that are files under these names: many at once, because buckets answer slowly."""
    plain = [path for path in choices if not _is_glob(path)]
    return {path for path, found in zip(plain, storage.stat(plain), strict=True) if found}


def braces(pattern: str) -> list[str]:
    """`a{08..10}` -> a08, a09, a10; `{x,y}` -> x, y; without braces the pattern unchanged."""
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    first, dots, last = match[1].partition("..")
    if dots and first.isdigit() and last.isdigit() and int(first) <= int(last):
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise InputError(
            f"{pattern}: cannot read {match[0]}. Expected a range such as {{00000..00331}} or a choice such as {{a,b}}"
        )
    return [path for choice in choices for path in braces(pattern[: match.start()] + choice + pattern[match.end() :])]


def stamps(paths: Sequence[str]) -> list[tuple[int, int]]:
    """(bytes, time in ns or generation) of each file. Raises InputError as `storage.stat`, or if one is not there."""
    found = []
    for path, file in zip(paths, storage.stat(paths), strict=True):
        if file is None:
            raise InputError(f"{path} cannot be read: No such file or directory")
        found.append((file.size, file.time))
    return found


def _is_glob(path):
    return re.search(r"[*?\[]", path) is not None


def _matches(path, endings):
    if storage.is_remote(path):
        return _matches_remote(path, endings)
    try:
        if os.path.isdir(path):
            return _with_ending(path, sorted(item.path for item in os.scandir(path) if not item.is_dir()), endings)
        if os.path.exists(path):
            return [path]
        # Neither folders nor hidden files: an earlier start may have left .rankclip_index next to the shards.
        return [found for found in sorted(glob.glob(path)) if not os.path.isdir(found)] if _is_glob(path) else []
    except OSError as error:
        raise InputError(f"{path} cannot be reached: {one_line(error)}") from None


def _matches_remote(path, endings):
    if _is_glob(path):
        root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        levels = path[len(root) + 1 :].split("/")
        listed = storage.files_in if len(levels) == 1 else storage.files_below
        return [file.path for file in listed(root) if _fits(file.path[len(root) + 1 :], levels)]
    if not storage.is_folder(path):
        return []
    return _with_ending(path, [file.path for file in storage.files_in(path)], endings)


def _with_ending(folder, paths, endings):
    plain = lambda path: _OF_MANY.sub("", path.lower())  # noqa: E731
    found = [path for path in paths if plain(path).endswith(endings) and not is_leftover(storage.name_of(path))]
    if not found:
        raise InputError(f"{folder} has no files that end in {' or '.join(endings)}")
    return found


def _fits(name, levels):
    """As in a local folder: a wildcard matches neither a slash nor a leading dot."""
    parts = name.split("/")
    return len(parts) == len(levels) and all(
        fnmatch.fnmatchcase(part, level) and (level.startswith(".") or not part.startswith("."))
        for part, level in zip(parts, levels, strict=True)
    )
