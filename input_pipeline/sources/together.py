"""Several rows read by one call of Python, before they are needed.

A call from the graph takes some 150 us of a processor, and a small row that lies in a file or in memory 15. What is
large, or cannot be read, is left to be read alone.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.graph import apart, as_written
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError

SMALL = 1 << 18  # bytes


class Given(NamedTuple):
    """What was read of a row, as ops: whether it was, bool, and its strings, (K,)."""

    there: tf.Tensor
    strings: tf.Tensor


class Together(NamedTuple):
    """Reads several rows.

    Attributes:
      strings: K, of each row.
      read: rows, int64 (N,) -> object (N, K), bytes; all empty where a row is to be read alone.
    """

    strings: int
    read: Callable[[np.ndarray], np.ndarray]

    def in_graph(self, rows_N: tf.Tensor) -> Given:
        """`read` as ops: of all the rows."""

        @as_written
        def given(rows_N):
            found_NxK = self.read(rows_N)
            return (found_NxK != b"").any(axis=1), found_NxK

        there_N, found_NxK = tf.numpy_function(given, [rows_N], [tf.bool, tf.string])
        return Given(tf.ensure_shape(there_N, [None]), tf.ensure_shape(found_NxK, [None, self.strings]))


def row_by_row(
    strings: int, fetch: Callable, places: Callable[[np.ndarray], Iterable[tuple]] | None = None
) -> Together:
    """Reads K `strings` of each row by fetch(its place).

    Where `fetch` or `places` raises InputError, rows are left to be read alone, which says why.

    Args:
      fetch: -> K bytes.
      places: rows, int64 (N,) -> what `fetch` is called with for each; None: the row.
    """

    def read(rows_N):
        found_NxK = np.full((len(rows_N), strings), b"", object)
        with contextlib.suppress(InputError):
            for given_K, place in zip(found_NxK, places(rows_N) if places else zip(rows_N.tolist()), strict=True):
                with contextlib.suppress(InputError):
                    given_K[:] = fetch(*place)
        return found_NxK

    return Together(strings, read)


def require_small(length: int) -> None:
    """Raises InputError where so many bytes are better read alone."""
    if length > SMALL:
        raise InputError(f"{length:,} bytes are read alone")


def given_or_alone(given: Given | None, of_given: Callable, alone: Callable) -> Any:
    """Ops: of_given(the strings (K,)), or alone() where nothing is given."""
    return alone() if given is None else tf.cond(given.there, lambda: of_given(given.strings), apart(alone))
