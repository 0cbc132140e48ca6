"""The files of a workdir, read as if they were a stranger's: what is not as it should be is left out and named."""

import collections
import io
import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.evaluation import results_file
from rankclip_jax.figures import names
from rankclip_jax.figures.words import printable
from rankclip_jax.report import checks

_MOST_BYTES = 1 << 28  # of a file, and of what it unpacks to
_DEEPEST = 20  # lists and dicts in each other
_MOST_KEYS = 1000  # numbers of a run, each with a chart


class Files:
    """Reads the files of a workdir. Attributes: unreadable, file -> what is wrong with it, one line each."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.unreadable: dict[str, list[str]] = collections.defaultdict(list)

    def metrics(self) -> list[dict]:
        """metrics.jsonl: rows with "step" and numbers; and, as dicts, "start" and "counts"."""
        rows, known = [], set()
        for line, row in self._rows("metrics.jsonl"):
            step = row.pop("step", None)
            if not (isinstance(step, int) and checks.is_number(step) and 0 <= step <= checks.MOST_STEPS):
                self._wrong("metrics.jsonl", f"line {line}: step is {checks.in_words(step)}")
                continue
            kept: dict[str, Any] = {"step": step}
            for key, value in row.items():
                if checks.is_number(value) or (key in ("start", "counts") and isinstance(value, dict)):
                    kept[key] = value
                elif key != "failed":  # the log has it
                    self._wrong("metrics.jsonl", f"line {line}: {key[:80]} is {checks.in_words(value)}")
            known |= kept.keys()
            if len(known) > _MOST_KEYS:
                self._wrong("metrics.jsonl", f"line {line}: more than {_MOST_KEYS:,} different numbers")
                break
            rows.append(kept)
        return rows

    def config(self) -> dict:
        """config.json."""
        return self._dict("config.json")

    def samples(self) -> int | None:
        """Number of training samples, of data.json."""
        train = self._dict("data.json").get("train", {})
        samples = train.get("samples") if isinstance(train, dict) else None
        return samples if isinstance(samples, int) and checks.is_number(samples) else None

    def evaluations(self) -> dict:
        """Of eval.json, what was evaluated last (results_file.latest), with numbers that are in their ranges."""
        if not self._dict("eval.json"):
            return {}
        try:
            found = results_file.latest(self._folder / "eval.json")
        except InputError:
            return self._wrong("eval.json", "holds no results of evaluations") or {}
        results = self.checked("eval.json", found)
        for kind in ("missing", "evaluated"):
            said = found.get(kind, {})
            if not (isinstance(said, dict) and all(isinstance(words, str) for words in said.values())):
                self._wrong("eval.json", f"{kind} is {checks.in_words(said)}")
                said = {}
            results[kind] = said
        return results | {"step": found["step"], "model": found["model"]} if found else {}

    def checked(self, file: str, found: dict) -> dict:
        """{kind: {set: numbers}}, and nothing else that the file holds."""
        results: dict[str, dict] = {}
        for kind in names.KINDS:
            sets = found.get(kind, {})
            if not isinstance(sets, dict):
                self._wrong(file, f"{kind} is {checks.in_words(sets)}")
                continue
            for name, row in sets.items():
                if not isinstance(row, dict):
                    self._wrong(file, f"{kind}/{name[:80]} is {checks.in_words(row)}")
                    continue
                good = {key: value for key, value in row.items() if checks.in_range(key, value)}
                for key in row.keys() - good.keys():
                    self._wrong(file, f"{kind}/{name[:80]}: {key[:80]} is {checks.in_words(row[key])}")
                if good:
                    results.setdefault(kind, {})[name] = good
        return results

    def confusion(self) -> dict[str, dict]:
        """Set -> {"classes", "confusion"}."""

        def fits(found):
            classes, counts = found["classes"], found["confusion"]
            fitting = checks.are_texts(classes) and counts.shape == 2 * classes.shape and checks.are_counts(counts)
            return fitting and bool(counts.sum())

        return self._by_set("zero_shot_", ".npz", lambda file: self._arrays(file, ("classes", "confusion"), fits))

    def geometry(self) -> dict[str, dict]:
        """Set -> arrays (evaluation/artifacts.py)."""
        keys = ("image", "text", "explained", "captions", "edges", "positive", "negative")

        def fits(found):
            image, text, explained, captions, edges, positive, negative = (found[key] for key in keys)
            return (
                checks.are_texts(captions)
                and image.shape == text.shape == (len(captions), 2)
                and explained.shape == (2,)
                and all(checks.are_coordinates(array) for array in (image, text, explained, edges))
                and edges.ndim == 1
                and positive.shape == negative.shape == (len(edges) - 1,)
                and bool((np.diff(edges) > 0).all())
                and checks.are_counts(positive)
                and checks.are_counts(negative)
            )

        return self._by_set("geometry_", ".npz", lambda file: self._arrays(file, keys, fits))

    def examples(self) -> dict[str, dict]:
        """Set -> {"right", "wrong"}: lists of {"picture", "label", "predicted"}."""

        def example(one):
            return checks.text_fields(one, "label", "predicted") | checks.picture_field(one)

        def read(file):
            found = self._dict(file)
            return {which: list(self._each(file, found, which, example)) for which in ("right", "wrong")}

        return self._by_set("examples_", ".json", read)

    def retrieval(self) -> dict[str, dict]:
        """Set -> queries and answers (evaluation/artifacts.py)."""

        def of_image(asked):
            found = checks.answers_of(asked["answers"])
            answers = [checks.text_fields(answer, "caption") | checks.right_field(answer) for answer in found]
            return checks.picture_field(asked) | {"answers": answers}

        def of_text(asked):
            found = checks.answers_of(asked["answers"])
            answers = [checks.picture_field(answer) | checks.right_field(answer) for answer in found]
            return checks.text_fields(asked, "caption") | {"answers": answers}

        def read(file):
            found, ways = self._dict(file), (("image_to_text", of_image), ("text_to_image", of_text))
            return {key: list(self._each(file, found, key, one)) for way, one in ways for key in (way, f"{way}_wrong")}

        return self._by_set("retrieval_", ".json", read)

    def bad(self) -> dict[str, tuple[int, list[str]]]:
        """Reason -> (count, first places), of bad_samples.jsonl of all processes; the most frequent first."""
        places = collections.defaultdict(list)
        for path in sorted(self._folder.glob("bad_samples*.jsonl")):
            for line, sample in self._rows(path.name):
                reason, where = sample.get("reason"), sample.get("where")
                if isinstance(reason, str) and isinstance(where, str):
                    places[reason[:checks.LONGEST]].append(where[:checks.LONGEST])
                else:
                    self._wrong(path.name, f"line {line} names no reason or place")
        ordered = sorted(places.items(), key=lambda item: -len(item[1]))
        return {reason: (len(found), found[:5]) for reason, found in ordered}

    def _wrong(self, file: str, why: str) -> Any:
        """Names it; gives None, which the caller gives on."""
        self.unreadable[printable(file)].append(printable(why))
        return None

    def _bytes(self, file: str) -> bytes | None:
        """None: there is no such file, or none that can be read."""
        path = self._folder / file
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):  # a pipe would never end
                return self._wrong(file, "is not a file")
            if found.st_size > _MOST_BYTES:
                return self._wrong(file, f"has {found.st_size / 1e6:,.0f} MB")
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._wrong(file, error.strerror or one_line(error))

    def _dict(self, file: str) -> dict:
        data = self._bytes(file)
        if data is None:
            return {}
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return self._wrong(file, "is not JSON") or {}
        if not isinstance(found, dict):
            return self._wrong(file, f"is {checks.in_words(found)}, not an object") or {}
        if not checks.is_shallow(found, _DEEPEST):
            return self._wrong(file, f"is nested more than {_DEEPEST} deep") or {}
        return found

    def _rows(self, file: str) -> Iterator[tuple[int, dict]]:
        """(line, object). A last line that a crash cut off is left out, and not named."""
        data = self._bytes(file) or b""
        lines = data.split(b"\n")
        for line, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                if line < len(lines):
                    self._wrong(file, f"line {line} is not JSON")
                continue
            if isinstance(row, dict) and checks.is_shallow(row, _DEEPEST):
                yield line, row
            else:
                self._wrong(file, f"line {line} is {checks.in_words(row)}, not an object of numbers")

    def _arrays(self, file: str, keys: tuple, fits: Callable[[dict], bool]) -> dict | None:
        data = self._bytes(file)
        if data is None:
            return None
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as packed:
                if sum(member.file_size for member in packed.infolist()) > _MOST_BYTES:
                    return self._wrong(file, f"unpacks to more than {_MOST_BYTES >> 20} MB")
            with np.load(io.BytesIO(data)) as arrays:  # allow_pickle stays off
                found = {key: arrays[key] for key in keys}
            # Unsigned numbers could not be negated, small ones not multiplied.
            whole = {key: array.astype(np.int64) for key, array in found.items() if array.dtype.kind in "iu"}
        except Exception as error:  # whatever zipfile and NumPy raise on a damaged file
            return self._wrong(file, f"cannot be read ({one_line(error, 100)})")
        found |= whole
        return found if fits(found) else self._wrong(file, "holds other arrays than an evaluation leaves")

    def _each(self, file: str, found: dict, key: str, read: Callable[[Any], dict]) -> Iterator[dict]:
        """What `read` makes of each of a list; it raises ValueError, TypeError or KeyError for a wrong one."""
        some = found.get(key, [])
        if not isinstance(some, list):
            self._wrong(file, f"{key} is {checks.in_words(some)}")
            return
        for place, one in enumerate(some[:50], 1):
            try:
                yield read(one)
            except (ValueError, TypeError, KeyError) as error:
                self._wrong(file, f"{key} {place}: {one_line(error, 100)}")

    def _by_set(self, prefix: str, suffix: str, read: Callable[[str], Any]) -> dict:
        """Set -> what `read` makes of its file in eval/, where that is something."""
        try:
            entries = sorted(os.listdir(self._folder / "eval"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            self.unreadable["eval"] = [error.strerror or one_line(error)]
            return {}
        found = {
            file.removeprefix(prefix).removesuffix(suffix): read(f"eval/{file}")
            for file in entries
            if file.startswith(prefix) and file.endswith(suffix)
        }
        return {name: content for name, content in found.items() if content and any(map(len, content.values()))}
