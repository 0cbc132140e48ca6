"""Counts unusable samples and records each with its reason."""

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from input_pipeline.sources import Ahead, Source, told
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError, printable

SHOWN = 20  # of each reason, on the console; a file has them all


class BadSamples:
    """Finds samples dropped by tf.data's `ignore_errors`, by the gaps in the positions, and writes a line for each row.

    The hot path stays in the graph: only a dropped row is read once more, alone, to find the reason; not again in later
    epochs. Samples that the source cannot reach at all (Source.lost) are recorded and counted at the start.

    Attributes:
      seen: samples read so far.
      count: samples skipped so far; repeated rows count each time.
      reasons: reason -> number of distinct rows, including earlier parts of the run.
      found: the same of this process alone; the console names the first SHOWN of each.
    """

    def __init__(self, source: Source, path: Path | None = None, max_fraction: float = 1.0):
        """`path`: a JSON-lines file; each row is appended once: row, where, reason, detail. None: only the console.

        Raises:
          InputError: more than `max_fraction` of the samples are lost from the start.
        """
        self.count, self.seen = 0, 0
        self._source, self._path, self._max_fraction = source, path, max_fraction
        self._named, self._rows = set(), set()  # _rows: whose place and reason are known
        self.reasons, self.found = Counter(), Counter()
        if path and path.exists():
            text = path.read_text()
            if text and not text.endswith("\n"):  # the torn last line of a killed run
                with open(path, "a") as out:
                    out.write("\n")
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    where, reason, samples = str(entry["where"]), str(entry["reason"]), int(entry.get("samples", 1))
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue
                self._named.add(where)
                self.reasons[reason] += samples
        self._list_lost([one for one in source.lost if one.where not in self._named])
        lost = sum(one.samples for one in source.lost)
        if lost > max_fraction * (source.size + lost):
            raise InputError(self._too_many(f"{lost} of about {source.size + lost} samples are lost"))

    def check(self, good: int, dropped: list[int], row_of: Callable, sample: Callable) -> None:
        """Counts `good` samples and records those at the positions `dropped`.

        `row_of`: positions, int64 (n,) -> rows. `sample`: reads that at a position.

        Raises:
          InputError: more than `max_fraction` of at least 100 samples were bad.
        """
        self.seen += good + len(dropped)
        self.count += len(dropped)
        rows = np.asarray(row_of(np.array(dropped, np.int64))).tolist() if dropped else []
        for row, position in zip(rows, dropped, strict=True):
            if row in self._rows:
                continue
            detail, reason = why_dropped(sample, position, self._source.ahead)
            self._name(row, self._source.where(row), reason, detail)
            self._rows.add(row)
        if dropped and self.seen >= 100 and self.count > self._max_fraction * self.seen:
            raise InputError(self._too_many(f"{self.count} of {self.seen} samples are unusable"))

    def summary(self) -> str:
        """Number of bad rows by reason, in one line."""
        by_reason = [f"{rows:,} {reason}" for reason, rows in self.reasons.most_common(5)]
        by_reason += [f"and {len(self.reasons) - 5:,} other reasons"] if len(self.reasons) > 5 else []
        return f"{self.reasons.total():,} unusable samples skipped: {', '.join(by_reason)}"

    def _too_many(self, how_many):
        named_by = self._path or "the console"
        limit = f"more than config.data.max_bad_fraction = {self._max_fraction}"
        return f"{how_many}, {limit} ({self.summary()}); see {named_by}"

    def _list_lost(self, lost):
        for one in lost:
            self._named.add(one.where)
            self.reasons[one.reason] += one.samples
        for line in told(lost):  # thousands of rows can have one reason
            print(f"bad samples skipped: {line}", file=sys.stderr)
        if self._path and lost:
            with open(self._path, "a") as out:
                out.writelines(
                    json.dumps({"row": None, "detail": "", **dataclasses.asdict(one)}) + "\n" for one in lost
                )

    def _name(self, row, where, reason, detail):
        if where in self._named:
            return
        self._named.add(where)
        self.reasons[reason] += 1
        self.found[reason] += 1
        if self.found[reason] <= SHOWN:
            print(f"bad sample skipped: {printable(where)}: {detail + '; ' if detail else ''}{reason}", file=sys.stderr)
        elif self.found[reason] == SHOWN + 1:
            print(f"bad samples skipped: more for the same reason, {reason}", file=sys.stderr)
        if self._path:
            entry = {"row": row, "where": where, "reason": reason, "detail": detail}
            with open(self._path, "a") as out:
                out.write(json.dumps(entry) + "\n")


def reason_of_failure(sample: Callable, position: int, ahead: Ahead | None = None) -> str | None:
    """Why `sample(position)` fails: "details; reason", where samples can share a reason. None: it works.

    Raises InputError where that is no fault of the sample: the store stopped answering.
    """
    reason = _reason(sample, position)
    if reason is not None and ahead:
        ahead.check()
    return reason


def why_dropped(sample: Callable, position: int, ahead: Ahead | None) -> tuple[str, str]:
    """(detail, reason) of a sample that failed in the graph: it is read once more, alone. Raises as above."""
    message = reason_of_failure(sample, position, ahead) or "failed once, but could be read on retry"
    detail, _, reason = message.rpartition("; ")
    return detail, reason


def _reason(sample: Callable, position: int) -> str | None:
    try:
        sample(tf.constant(position, tf.int64))
    except tf.errors.NotFoundError as error:
        return f"{in_words(error).split('; ')[0]}; no such file"
    except tf.errors.DataLossError:
        return "the record does not match its checksum"
    except UnicodeDecodeError as error:  # the message contains the sample's bytes
        return _in_words(error.object.decode(errors="replace"))
    except Exception as error:  # of TensorFlow, or of a Python part of the pipeline
        return in_words(error)
    return None


def in_words(error: Exception) -> str:
    """TensorFlow's message in one line, without operation names and the sample's bytes."""
    return _in_words(getattr(error, "message", None) or str(error)) or type(error).__name__


def _in_words(message):
    # Of our own assertions: of one alone, and of one in a graph.
    said = re.search(r"Summarized data: b(?P<q>['\"])(?P<said>.*)(?P=q)", message, re.DOTALL)
    said = said or re.search(r"assertion failed: \[(?P<said>.*)\]", message)
    if said:
        return said["said"]
    if "jpeg::Uncompress" in message or "Invalid JPEG" in message:
        return "broken or truncated JPEG"
    if "Could not parse example" in message:
        return "not a tf.train.Example"
    # What follows is operation names, or the stack of a Python error.
    line, _, _ = re.sub(r"\{\{function_node .*?\}\} ?", "", message).strip().partition("\n")
    return printable(line.partition(" [Op:")[0][:200])
