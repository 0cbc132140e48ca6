"""Where a csv or tsv has quotation marks, and whether they are where RFC 4180 allows them."""

from typing import Any

import numpy as np


def quoted_fields(data: Any, delimiter: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(first mark, last mark, whether there are marks between) of each quoted field; None: RFC 4180 is not kept."""
    array, ends = np.frombuffer(data, np.uint8), [*delimiter.encode(), *b"\r\n"]
    marks = _positions(array, '"')
    if not len(marks):
        return marks, marks, marks
    if len(marks) % 2:
        return None
    opens, closes = marks[0::2], marks[1::2]
    # A mark that closes directly before one that opens is a doubled mark inside a field.
    apart = closes[:-1] + 1 != opens[1:]
    first, last = opens[np.r_[True, apart]], closes[np.r_[apart, True]]
    before = np.where(first > 0, array[first - 1], ends[-1])
    after = np.where(last + 1 < len(array), array[(last + 1) % len(array)], ends[-1])
    if not (np.isin(before, ends).all() and np.isin(after, ends).all()):
        return None
    return first, last, np.diff(np.searchsorted(marks, np.r_[first, len(array)])) > 2


def _positions(array: np.ndarray, characters: str) -> np.ndarray:
    """Where any of the characters are, in order, int64."""
    found = [np.zeros(0, np.int64)]
    for at in range(0, len(array), 1 << 20):  # blocks that fit into the cache
        block = array[at : at + (1 << 20)]
        found.append(np.flatnonzero(np.logical_or.reduce([block == ord(c) for c in characters])) + at)
    return np.concatenate(found)


def is_quoted(data: Any, header: list[str]) -> bool:
    """Whether a tsv is quoted as programs write it: its header is, or the fields that must be and no others.

    Excel also quotes a field with a comma. A text that merely stands in quotation marks does not count.
    """
    names = "".join(header).strip()
    if names.startswith('"') and names.endswith('"'):
        return True
    fields = quoted_fields(data, "\t")
    if fields is None or not len(fields[0]):
        return False
    first, last, doubled = fields
    array = np.frombuffer(data, np.uint8)

    def has(characters):
        found = _positions(array, characters)
        return np.searchsorted(found, first) < np.searchsorted(found, last)

    needed = doubled | has("\t\r\n")
    commas = _positions(array, ",")
    field = np.searchsorted(first, commas) - 1
    by_excel = len(commas) and (field >= 0).all() and (commas < last[field]).all()
    return bool((needed | has(",") if by_excel else needed).all())
