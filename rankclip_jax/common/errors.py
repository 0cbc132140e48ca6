"""The one exception for wrong input, and what exceptions and other people's names are in one line."""

import os
import re


class InputError(ValueError):
    """Something that the user gave is wrong. The message says what, where, and what to do, in one line.

    The command line prints it alone, without a traceback (common/commands.py).
    """


def located(path: str | os.PathLike) -> str:
    """A path that is not there, for a message: a relative one with the folder it is taken from, which may be another
    than that of the run that is resumed."""
    path = os.fspath(path)
    return path if os.path.isabs(path) or "://" in path else f"{path} (in {os.getcwd()})"


def check_utf8(path: str | os.PathLike) -> None:
    """Raises InputError for a path that is not UTF-8, in which Arrow and TensorBoard can name nothing."""
    if re.search("[\ud800-\udfff]", os.fspath(path)):  # as Python writes such bytes
        raise InputError(f"{printable(os.fspath(path))}: its name is not UTF-8; rename it, or go to it by a link")


def printable(text: str) -> str:
    """With ? for what no console shows: line ends, control characters, half a surrogate pair."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(error: BaseException, limit: int = 300, *, kind: bool = False) -> str:
    """What an exception says, in at most `limit` characters: white space collapsed; its type's name if it says nothing.

    kind: its type's name in front, for an exception that can be anything.
    """
    name, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, RecursionError) and not kind:  # of a parser, which speaks of its own stack
        text = "nested too deeply"
    line = f"{name}: {text}" if kind and text else text or name
    return line if len(line) <= limit else line[: limit - 3] + "..."
