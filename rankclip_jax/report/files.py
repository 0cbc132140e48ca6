"""The files of a workdir, read as if they were a stranger's: what is not as it should be is left out and named."""

import base64
import binascii
import collections
import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rankclip_jax.common import pictures
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.evaluation import results_file
from rankclip_jax.figures import names
from rankclip_jax.figures.words import printable

_MOST_BYTES = 1 << 28  # of a file, and of what it unpacks to
_DEEPEST = 20  # lists and dicts in each other
_LONGEST = 1000  # letters of a caption or name
_MOST_STEPS, _LARGEST = 10**12, 1e30  # beyond them, no chart has ticks
_MOST_KEYS = 1000  # numbers of a run, each with a chart
_MOST_SIDE = 1024  # pixels of a picture, which evaluations leave with 112
_COUNTS = ("n", "images", "texts", "classes")


def number(value: Any) -> bool:
    """Whether it is one that can be drawn, or is not finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return (isinstance(value, float) and not math.isfinite(value)) or abs(value) <= _LARGEST


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
            if not (isinstance(step, int) and number(step) and 0 <= step <= _MOST_STEPS):
                self._wrong("metrics.jsonl", f"line {line}: step is {_said(step)}")
                continue
            kept: dict[str, Any] = {"step": step}
            for key, value in row.items():
                if number(value) or (key in ("start", "counts") and isinstance(value, dict)):
                    kept[key] = value
                elif key != "failed":  # the log has it
                    self._wrong("metrics.jsonl", f"line {line}: {key[:80]} is {_said(value)}")
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
        return samples if isinstance(samples, int) and number(samples) else None

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
                self._wrong("eval.json", f"{kind} is {_said(said)}")
                said = {}
            results[kind] = said
        return results | {"step": found["step"], "model": found["model"]} if found else {}

    def checked(self, file: str, found: dict) -> dict:
        """{kind: {set: numbers}}, and nothing else that the file holds."""
        results: dict[str, dict] = {}
        for kind in names.KINDS:
            sets = found.get(kind, {})
            if not isinstance(sets, dict):
                self._wrong(file, f"{kind} is {_said(sets)}")
                continue
            for name, row in sets.items():
                if not isinstance(row, dict):
                    self._wrong(file, f"{kind}/{name[:80]} is {_said(row)}")
                    continue
                good = {key: value for key, value in row.items() if _fits(key, value)}
                for key in row.keys() - good.keys():
                    self._wrong(file, f"{kind}/{name[:80]}: {key[:80]} is {_said(row[key])}")
                if good:
                    results.setdefault(kind, {})[name] = good
        return results

    def confusion(self) -> dict[str, dict]:
        """Set -> {"classes", "confusion"}."""

        def fits(found):
            classes, counts = found["classes"], found["confusion"]
            return _texts(classes) and counts.shape == 2 * classes.shape and _counts(counts) and bool(counts.sum())

        return self._by_set("zero_shot_", ".npz", lambda file: self._arrays(file, ("classes", "confusion"), fits))

    def geometry(self) -> dict[str, dict]:
        """Set -> arrays (evaluation/artifacts.py)."""
        keys = ("image", "text", "explained", "captions", "edges", "positive", "negative")

        def fits(found):
            image, text, explained, captions, edges, positive, negative = (found[key] for key in keys)
            return (
                _texts(captions)
                and image.shape == text.shape == (len(captions), 2)
                and explained.shape == (2,)
                and all(_small(array) for array in (image, text, explained, edges))
                and edges.ndim == 1
                and positive.shape == negative.shape == (len(edges) - 1,)
                and bool((np.diff(edges) > 0).all())
                and _counts(positive)
                and _counts(negative)
            )

        return self._by_set("geometry_", ".npz", lambda file: self._arrays(file, keys, fits))

    def examples(self) -> dict[str, dict]:
        """Set -> {"right", "wrong"}: lists of {"picture", "label", "predicted"}."""

        def example(one):
            return _texted(one, "label", "predicted") | _shown(one)

        def read(file):
            found = self._dict(file)
            return {which: list(self._each(file, found, which, example)) for which in ("right", "wrong")}

        return self._by_set("examples_", ".json", read)

    def retrieval(self) -> dict[str, dict]:
        """Set -> queries and answers (evaluation/artifacts.py)."""

        def of_image(asked):
            answers = [_texted(answer, "caption") | _right(answer) for answer in _listed(asked["answers"])]
            return _shown(asked) | {"answers": answers}

        def of_text(asked):
            answers = [_shown(answer) | _right(answer) for answer in _listed(asked["answers"])]
            return _texted(asked, "caption") | {"answers": answers}

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
                    places[reason[:_LONGEST]].append(where[:_LONGEST])
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
                return self._wrong(file, "is no file")
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
            return self._wrong(file, f"is {_said(found)}, not an object") or {}
        if not _shallow(found, _DEEPEST):
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
            if isinstance(row, dict) and _shallow(row, _DEEPEST):
                yield line, row
            else:
                self._wrong(file, f"line {line} is {_said(row)}, not an object of numbers")

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
            self._wrong(file, f"{key} is {_said(some)}")
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


def _said(value: Any) -> str:
    """In a few words."""
    words = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}
    return words.get(type(value)) or repr(value)[:40]


def _fits(key: str, value: Any) -> bool:
    """Whether a number of eval.json is in its range."""
    if key in _COUNTS:
        return isinstance(value, int) and number(value) and 0 < value <= 10**9
    if not number(value) or not math.isfinite(value):
        return False
    return (-1 if key in ("drop", "effective") else 0) <= value <= 1 if names.result(key).share else True


def _shallow(value: Any, deepest: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return deepest > 0 and all(_shallow(each, deepest - 1) for each in inner)


def _texts(array: np.ndarray) -> bool:
    return array.dtype.kind == "U" and array.ndim == 1 and len(array) > 0 and array.itemsize <= 4 * _LONGEST


def _counts(array: np.ndarray) -> bool:
    return array.dtype.kind == "i" and bool((array >= 0).all()) and bool((array <= _MOST_STEPS).all())


def _small(array: np.ndarray) -> bool:
    """Finite, and no further from 0 than distances of unit vectors are."""
    return array.dtype.kind in "fi" and bool((np.abs(array) <= 10).all())


def _listed(value: Any) -> list:
    if not isinstance(value, list) or not value:
        raise ValueError("no list of answers")
    return value[:10]


def _texted(one: dict, *keys: str) -> dict:
    if not all(isinstance(one[key], str) for key in keys):
        raise ValueError(f"no text in {' or '.join(keys)}")
    return {key: one[key][:_LONGEST] for key in keys}


def _right(one: dict) -> dict:
    return {"right": one["right"] is True}


def _shown(one: dict) -> dict:
    """The picture as a JPEG in base64, whatever it was."""
    try:
        image = pictures.opened(base64.b64decode(one["picture"], validate=True))
    except binascii.Error:
        raise ValueError("a picture that is not base64") from None
    if max(image.size) > _MOST_SIDE:
        raise ValueError("a picture of {} x {} pixels".format(*image.size))
    out = io.BytesIO()
    image = pictures.rgb(image)
    image.thumbnail((224, 224))
    image.save(out, "JPEG", quality=85)
    return {"picture": base64.b64encode(out.getvalue()).decode()}
