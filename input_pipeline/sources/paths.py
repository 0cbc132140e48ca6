"""Expands paths of a configuration: brace ranges, globs, folders and lists, local or in a bucket."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf

from rankclip_jax.common.errors import InputError, one_line

_RANGE = re.compile(r"\{([^{}]*)\}")


def expand(pattern: str | Sequence[str], *, endings: tuple[str, ...], hint: str | None = None) -> list[str]:
    """The files of a pattern, in order.

    Args:
      pattern: a path with ranges {00000..00331} (leading zeros are kept), choices {a,b} and wildcards *, ?, [...]; or a
        folder, which means its files with one of the `endings`; or several patterns, whose files are concatenated. gs://
        and other schemes of tf.io.gfile are supported.
      hint: message for users who do not have the data.

    Raises:
      InputError: no match, or a scheme that TensorFlow does not support here.
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
    for path in braces(pattern):
        found = _matches(path, endings)
        if not found:
            raise InputError(f"no such file: {path}" + (f"; {hint}" if hint else ""))
        paths += found
    return paths


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


def is_remote(path: str) -> bool:
    """Whether the path has a scheme, such as gs://."""
    return "://" in path


def stamps(paths: Sequence[str]) -> list[tuple[int, int]]:
    """(size in bytes, modification time in ns) of each file. Many at once, because buckets answer slowly."""

    def stamp(path):
        if not is_remote(path):  # TensorFlow returns the time of local files only in seconds
            stat = os.stat(path)
            return stat.st_size, stat.st_mtime_ns
        stat = tf.io.gfile.stat(path)
        return stat.length, stat.mtime_nsec

    try:
        with ThreadPoolExecutor(32) as pool:
            return list(pool.map(stamp, paths))
    except tf.errors.OpError as error:
        raise InputError(f"cannot be read: {one_line(error)}") from None
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None


def _matches(path, endings):
    try:
        if tf.io.gfile.isdir(path):
            names = sorted(tf.io.gfile.listdir(path))
            found = [tf.io.gfile.join(path, name) for name in names if name.endswith(endings)]
            if not found:
                raise InputError(f"{path} has no files that end in {' or '.join(endings)}")
            return found
        if tf.io.gfile.exists(path):
            return [path]
        return sorted(tf.io.gfile.glob(path)) if re.search(r"[*?\[]", path) else []
    except tf.errors.UnimplementedError:
        scheme = path.split("://")[0]
        raise InputError(
            f"{path}: this TensorFlow does not support {scheme}://; copy or mount the data, or install a TensorFlow "
            f"plug-in for it and import it first"
        ) from None
    except tf.errors.OpError as error:
        raise InputError(f"{path} cannot be reached: {one_line(error)}") from None
