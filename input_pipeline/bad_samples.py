"""Samples that cannot be used: counted, named with the reason, and never silently lost."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from input_pipeline.sources import Source
from rankclip_jax.common.errors import InputError


class BadSamples:
    """Finds what tf.data's `ignore_errors` dropped, by the gaps it leaves, and writes a line about each row.

    The hot path stays inside the graph: only a dropped sample is read once more, alone, to learn its reason. What the
    source could not reach at all (Source.lost) is written down at the start, and counts, too.

    Attributes:
      count: samples passed over so far, repeated rows counted each time.
      reasons: reason -> different rows, those of earlier parts of the run included.
    """

    def __init__(self, source: Source, path: Path | None = None, max_fraction: float = 1.0):
        """`path`: a JSON-lines file to append to, each row once: row, where, reason, detail; None: only the console.

        Raises:
          InputError: more than `max_fraction` of the samples are lost from the start.
        """
        self.count, self._seen = 0, 0
        self._source, self._path, self._max_fraction = source, path, max_fraction
        self._named, self.reasons = set(), Counter()
        if path and Path(path).exists():
            for line in Path(path).read_text().splitlines():
                try:
                    entry = json.loads(line)
                    where, reason, samples = str(entry["where"]), str(entry["reason"]), int(entry.get("samples", 1))
                except (ValueError, TypeError, KeyError, RecursionError):  # the last line of a run that was killed
                    continue
                self._named.add(where)
                self.reasons[reason] += samples
        for one in source.lost:
            self._name(None, one.where, one.reason, "", one.samples)
        lost = sum(one.samples for one in source.lost)
        if lost > max_fraction * (source.size + lost):
            raise InputError(self._too_many(f"{lost} of about {source.size + lost} samples are lost"))

    def check(self, good: int, dropped: list[int], row_of: Callable, sample: Callable) -> None:
        """Notes that `good` samples came and the positions `dropped` did not.

        Raises:
          InputError: more than `max_fraction` of at least 100 samples were bad.
        """
        self._seen += good + len(dropped)
        self.count += len(dropped)
        for position in dropped:
            row = int(row_of(position))
            message = reason_of_failure(sample, position) or "could not be read, and could when tried again"
            detail, _, reason = message.rpartition("; ")
            self._name(row, self._source.where(row), reason, detail)
        if dropped and self._seen >= 100 and self.count > self._max_fraction * self._seen:
            raise InputError(self._too_many(f"{self.count} of {self._seen} samples could not be used"))

    def summary(self) -> str:
        """How many rows were bad for which reason, in one line."""
        by_reason = ", ".join(f"{rows:,} {reason}" for reason, rows in self.reasons.most_common())
        return f"{self.reasons.total():,} samples cannot be used and were passed over: {by_reason}"

    def _too_many(self, how_many):
        named_by = self._path or "the console"
        limit = f"more than config.data.max_bad_fraction = {self._max_fraction}"
        return f"{how_many}, {limit} ({self.summary()}); {named_by} names them"

    def _name(self, row, where, reason, detail, samples=1):
        if where in self._named:
            return
        self._named.add(where)
        self.reasons[reason] += samples
        print(f"bad sample passed over: {where}: {detail + '; ' if detail else ''}{reason}", file=sys.stderr)
        if self._path:
            entry = {"row": row, "where": where, "reason": reason, "detail": detail}
            with open(self._path, "a") as out:
                out.write(json.dumps(entry | ({"samples": samples} if row is None else {})) + "\n")


def reason_of_failure(sample: Callable, position: int) -> str | None:
    """Why `sample(position)` fails, "details; reason", the reason being one that many may share; None: it works."""
    try:
        sample(tf.constant(position, tf.int64))
    except tf.errors.NotFoundError as error:
        return f"{in_words(error).split('; ')[0]}; no such file"
    except tf.errors.DataLossError:
        return "the record does not match its checksum"
    except UnicodeDecodeError as error:  # TensorFlow quotes the sample's bytes in its message
        return _in_words(error.object.decode(errors="replace"))
    except Exception as error:  # TensorFlow's own, or whatever a Python part of the pipeline raises
        return in_words(error)
    return None


def in_words(error: Exception) -> str:
    """What TensorFlow says, in one line, without the names of its operations and without the sample's bytes."""
    return _in_words(getattr(error, "message", None) or str(error)) or type(error).__name__


def _in_words(message):
    said = re.search(r"Summarized data: b(['\"])(.*)\1", message, re.DOTALL)  # of our own assertions
    if said:
        return said[2]
    if "jpeg::Uncompress" in message or "Invalid JPEG" in message:
        return "broken or truncated JPEG"
    if "Could not parse example" in message:
        return "not a tf.train.Example"
    # The names of operations follow, and of what Python raised its stack.
    line, _, _ = re.sub(r"\{\{function_node .*?\}\} ?", "", message).strip().partition("\n")
    return "".join(c if c.isprintable() else "?" for c in line.partition(" [Op:")[0])[:200]
