"""Samples that cannot be used: counted, named with the reason, and never silently lost."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from input_pipeline.sources import Source
from rankclip_jax.errors import InputError


class BadSamples:
    """Finds what tf.data's `ignore_errors` dropped, by the gaps it leaves, and writes a line about each row.

    The hot path stays inside the graph: only a dropped sample is read once more, alone, to learn its reason.

    Attributes:
      count: samples passed over so far, repeated rows counted each time.
    """

    def __init__(self, source: Source, path=None, max_fraction: float = 1.0):
        """`path`: a JSON-lines file to append to, each row once; None: only the console."""
        self.count, self._seen = 0, 0
        self._source, self._path, self._max_fraction = source, path, max_fraction
        self._named = set()
        if path and Path(path).exists():
            self._named = {json.loads(line)["where"] for line in Path(path).read_text().splitlines()}

    def check(self, good: int, dropped: list[int], row_of: Callable, sample: Callable) -> None:
        """Notes that `good` samples came and the positions `dropped` did not.

        Raises:
          InputError: more than `max_fraction` of at least 100 samples were bad.
        """
        self._seen += good + len(dropped)
        self.count += len(dropped)
        for position in dropped:
            self._name(int(row_of(position)), reason_of_failure(sample, position))
        if dropped and self._seen >= 100 and self.count > self._max_fraction * self._seen:
            raise InputError(
                f"{self.count} of {self._seen} samples could not be used, more than config.data.max_bad_fraction = "
                f"{self._max_fraction}; {self._path or 'the console'} names them"
            )

    def _name(self, row: int, reason: str) -> None:
        where = self._source.where(row)
        if where in self._named:
            return
        self._named.add(where)
        print(f"bad sample passed over: {where}: {reason}", file=sys.stderr)
        if self._path:
            with open(self._path, "a") as out:
                out.write(json.dumps({"row": row, "where": where, "reason": reason}) + "\n")


def reason_of_failure(sample: Callable, position: int) -> str | None:
    """Why `sample(position)` fails, in one line; None if it does not."""
    try:
        sample(tf.constant(position, tf.int64))
    except tf.errors.OpError as error:
        return error.message.splitlines()[0][:200]
    return None
