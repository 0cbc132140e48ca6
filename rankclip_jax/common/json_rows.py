"""Rows of JSON: .jsonl, a list of objects, COCO's captions. And strings inside JSON by a path."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from rankclip_jax.common.encoded_text import HALF, EncodedText
from rankclip_jax.common.errors import InputError, one_line, printable


def find(value: Any, path: str) -> Any:
    """What is at a path: "caption", or "meta:caption" for a field of a field; of a list, what each item has there.

    Raises:
      KeyError: nothing is there.
    """
    if isinstance(value, list):
        return [find(item, path) for item in value]
    if not isinstance(value, dict):
        raise KeyError(path)
    if path in value:
        return value[path]
    name, _, rest = path.partition(":")
    if name not in value or not rest:
        raise KeyError(path)
    return find(value[name], rest)


def strings(value: Any) -> list[str]:
    """A text, or several without nulls, as a list. Raises ValueError for anything else. NaN is what pandas writes for
    null."""
    texts = [text for text in value if text is not None and text == text] if isinstance(value, list) else [value]
    if not all(isinstance(text, str | int | float) and text == text for text in texts):
        raise ValueError(f"not a text: {json.dumps(value, default=str)[:60]}")
    if any(HALF.search(str(text)) for text in texts):
        raise ValueError("half a surrogate pair, which is not a character")
    return [str(text) for text in texts]


def json_rows(
    file: str, text: EncodedText, wanted: Sequence[tuple[str, ...]]
) -> tuple[Iterator[list[list[str]] | ValueError], bool]:
    """(for each row, what is at the first of each column's paths that it has, or what is wrong; whether it is COCO's).

    Raises as json_items.
    """
    items, coco = json_items(file, text)
    if coco:
        wanted = [(*wanted[0], "file_name"), *(("caption",) for _ in wanted[1:])]
    return (_row(item, wanted) for item in items), coco


def json_items(file: str, text: EncodedText) -> tuple[Iterator[Any], bool]:
    """(the value of each row, or a ValueError that says what is wrong; whether the file is COCO's).

    Raises:
      InputError: the file is not valid JSON, or neither lines nor a list of objects nor COCO's.
    """
    if file.lower().removesuffix(".gz").endswith(".jsonl"):
        return _lines(text), False
    try:
        value = json.loads(str(text.data, "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 at byte {error.start:,}; set config.data.encoding") from None
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return _lines(text), False
        raise InputError(f"{file} is not valid JSON: {one_line(error)}") from None
    if isinstance(value, list):
        return iter(value), False
    if not (isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("images", "annotations"))):
        raise InputError(f"{file}: expected COCO's captions (images, annotations), or a list of objects")
    return _coco(value), True


def _row(item: Any, wanted: Sequence[tuple[str, ...]]) -> list[list[str]] | ValueError:
    if isinstance(item, ValueError):
        return item
    if not isinstance(item, dict):
        return ValueError("not an object with keys")
    row = []
    for paths in wanted:
        for path in paths:
            try:
                row.append(strings(find(item, path)))
                break
            except KeyError:
                continue
            except ValueError as error:
                return ValueError(f"{path}: {error}")
            except RecursionError:
                return ValueError(f"{path}: lists nested too deeply")
        else:
            return ValueError(f"no {' or '.join(paths)}; its keys are: {printable(', '.join(item)[:100])}")
    return row if len(row[0]) == 1 else ValueError(f"{len(row[0])} images")


def _lines(text: EncodedText) -> Iterator[Any]:
    """The value of each line that is not empty, or a ValueError."""
    with text.open() as opened:
        number, line = 0, ""
        for part in opened:
            line += part
            if part.endswith("\n") and line.strip():  # a \r alone is white space
                yield _value(text, number, line)
                number, line = number + 1, ""
        if line.strip():
            yield _value(text, number, line)


def _value(text: EncodedText, number: int, line: str) -> Any:
    try:
        if not line.isascii() and HALF.search(line):
            return ValueError(text.undecodable(number, line))
        return json.loads(line)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {one_line(error, 80)}")


def _coco(value: dict) -> Iterator[Any]:
    """COCO's images with their captions; then an error for each annotation of no image."""
    captions, damaged = defaultdict(list), []
    for annotation in value["annotations"]:
        try:
            if "caption" in annotation:
                captions[annotation.get("image_id")].append(annotation["caption"])
        except (TypeError, AttributeError):  # not an object, or an id that is a list
            damaged.append(annotation)
    for image in value["images"]:
        key = image.get("id") if isinstance(image, dict) else None
        found = None if isinstance(key, list | dict) else captions.pop(key, None)
        yield image | {"caption": found} if found else image
    for annotation in damaged:
        yield ValueError(f"not an annotation: {json.dumps(annotation)[:60]}")
    for image, lost in captions.items():
        for _ in lost:
            yield ValueError(f"a caption of image {image}, which is not listed")
