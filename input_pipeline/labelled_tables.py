"""Labelled and captioned sets in tables: csv, tsv, .jsonl ... (rankclip_jax/common/tables.py)."""

import ast
import dataclasses
import json
import re
import sys
import unicodedata
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ml_collections import ConfigDict

from input_pipeline.graph import from_python
from input_pipeline.sources import Lost, Source, table
from input_pipeline.sources.byte_ranges import Files
from input_pipeline.sources.packed_strings import PackedStrings
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import folders, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tables import CAPTION_KEYS

_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")  # 3.0: as pandas writes a column with a gap
MOST_CLASSES = 1_000_000


def labels(spec: ConfigDict, path: str) -> tuple[Source, list[str]]:
    """(images with "label", names of the classes) of a table with names, or numbers, in the column label_key.

    Raises:
      InputError: as tables.read_table; numbers and names in one column, or a name that `classes` lacks.
    """
    rows = _filled_rows(spec, path, (spec.label_key,), "label")
    coded = pc.utf8_normalize(rows.texts, form="NFC").dictionary_encode()  # of equal looks, equal classes
    values, codes_N = coded.dictionary.to_pylist(), coded.indices.to_numpy()
    first = dict(zip(values, np.unique(codes_N, return_index=True)[1], strict=True))
    names, number_of = _classes_of(spec, path, values, lambda label: rows.where(first[label]))
    labels_N = np.array(number_of, np.int32)[codes_N]
    return of_files(PackedStrings(rows.paths), labels_N, rows.where, rows.lost), names


def captions(spec: ConfigDict) -> tuple[Source, list[str], np.ndarray]:
    """(images, each once, all captions, int64 (captions,) the row of each caption's image). Raises as above."""
    rows = _filled_rows(spec, spec.path, CAPTION_KEYS if spec.caption_key is None else (spec.caption_key,), "caption")
    coded = pc.replace_substring_regex(rows.paths, r"(^|/)(\./)+", r"\1").dictionary_encode()  # ./a.jpg is a.jpg
    image_of_text = coded.indices.to_numpy().astype(np.int64)
    order = np.argsort(image_of_text, kind="stable")
    first = np.unique(image_of_text, return_index=True)[1]
    labels_N = np.full(len(first), -1, np.int32)
    source = of_files(PackedStrings(coded.dictionary), labels_N, lambda row: rows.where(int(first[row])), rows.lost)
    return source, rows.texts.take(order).to_pylist(), image_of_text[order]


def of_files(
    paths: PackedStrings, labels_N: np.ndarray, where: Callable[[int], str], lost: tuple[Lost, ...] = ()
) -> Source:
    """A source of image files with labels, int32 (N,)."""
    labels = tf.constant(labels_N)
    images = Files(remote=any(map(storage.is_remote, paths)))

    def read(row):
        row = tf.cast(row, tf.int64)
        image = from_python(lambda row: images.read(paths.at(row)), row)
        return {"image": image, "caption": "", "label": labels[row]}

    ahead = images.ahead(paths.at)
    return Source(len(paths), read, where, captions=lambda: (), labels=labels_N, lost=lost, ahead=ahead)


def _classes_of(
    spec: ConfigDict, path: str, found: list[str], where: Callable[[str], str]
) -> tuple[list[str], list[int]]:
    """(names of all classes, the number of each label). `found`: the labels of a table; `where` each is first."""
    classes = read_list(spec.classes, "classes") if spec.get("classes") else None
    if classes and set(found) <= set(classes):
        return classes, _places(found, classes)
    numbers = {label: int(float(label)) for label in found if _NUMBER.fullmatch(label) and len(label) < 12}
    others = [label for label in found if label not in numbers]
    if others and classes:
        known = set(classes)
        wrong = next(label for label in found if label not in known)
        raise InputError(f"{where(wrong)}: label {wrong!r} is not in {spec.classes}")
    if others and numbers:
        number = next(iter(numbers))
        raise InputError(
            f"{path}: column {spec.label_key} has the label {others[0]!r} ({where(others[0])}) and the number {number} "
            f"({where(number)}). Expected class numbers in all rows, or names in all; if numbers are names here, list "
            "all names in a JSON file, classes=FILE.json"
        )
    if others:
        names = folders.in_order(others)
        return names, _places(found, names)
    labels = np.array(list(numbers.values()))
    if abs(farthest := max(labels, key=abs)) >= MOST_CLASSES:
        raise InputError(f"{path} has label {farthest}. Expected class numbers from 0, below {MOST_CLASSES:,}")
    tell_first(path, labels)
    if not (classes or spec.protocol or "train" in spec):
        raise InputError(
            f"{path}: column {spec.label_key} has class numbers, and nothing names the classes; set classes to a JSON "
            "list of names, or protocol"
        )
    return numbered_names(int(labels.max()) + 1), labels.tolist()


def _places(labels: list[str], names: list[str]) -> list[int]:
    place = {name: number for number, name in reversed(list(enumerate(names)))}  # of equal names the first
    return [place[label] for label in labels]


@dataclasses.dataclass(frozen=True)
class _FilledRows:
    """The rows of a table that have a text, and one text each: several of one image are several rows."""

    texts: pa.Array
    paths: pa.Array
    where: Callable[[int], str]
    lost: tuple[Lost, ...]


def _filled_rows(spec: ConfigDict, path: str, text_keys: tuple[str, ...], what: str) -> _FilledRows:
    rows = table.open_rows(spec, path, text_keys)
    texts, paths = rows.texts, rows.paths()
    number_N = np.arange(len(texts))
    if pa.types.is_large_list(texts.type):
        number_N = pc.list_parent_indices(texts).to_numpy()
        paths, texts = paths.take(number_N), texts.flatten()
    texts = pc.utf8_trim_whitespace(texts)
    filled = pc.greater(pc.binary_length(texts), 0)
    kept_N = number_N[filled.to_numpy(zero_copy_only=False)]
    empty = tuple(Lost(rows.where_of(row), f"no {what}", 1) for row in np.setdiff1d(np.arange(len(rows.texts)), kept_N))
    if not len(kept_N):
        raise InputError(f"{empty[0].where} and all others have no {what}")
    where = lambda row: rows.where(int(kept_N[row]))  # noqa: E731
    return _FilledRows(texts.filter(filled), paths.filter(filled), where, rows.lost + empty)


def tell_first(path: str, labels: np.ndarray) -> None:
    """Warns of class numbers that start at 1."""
    if labels.min() > 0:
        print(
            f"{path}: no row has class 0, the classes are {labels.min()} to {labels.max()}; class numbers start at 0: "
            "if these start at 1, every name is wrong",
            file=sys.stderr,
        )


def numbered_names(count: int) -> list[str]:
    """ "0", "1" ...: names of classes that have none."""
    return [str(number) for number in range(count)]


def read_list(path: str, key: str) -> list[str]:
    """A JSON list of strings; or "classes" of a classes.py as the authors' repository has it, which is not run."""
    if not storage.exists(path):
        raise InputError(f"{key}={path}: expected an existing JSON file with a list of strings")
    try:
        text = storage.read(path).decode("utf-8-sig")
        items = _classes_in_python(text) if path.endswith(".py") else json.loads(text)
    except (ValueError, SyntaxError, RecursionError) as error:
        raise InputError(f"{path} is not valid {'Python' if path.endswith('.py') else 'JSON'}: {error}") from None
    if not (isinstance(items, list) and items and all(isinstance(item, str) for item in items)):
        raise InputError(f"{path}: expected a JSON list of strings")
    return [unicodedata.normalize("NFC", item) for item in items]


def _classes_in_python(text: str) -> list[str] | None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "classes":
                    return ast.literal_eval(value)
    return None
