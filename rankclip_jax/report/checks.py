"""Whether values that a stranger's file holds are what they should be, and those that are, cut to a length."""

import base64
import binascii
import io
import math
from typing import Any

import numpy as np

from rankclip_jax.common import pictures
from rankclip_jax.figures import names

LONGEST = 1000  # letters of a caption or name
MOST_STEPS, _LARGEST = 10**12, 1e30  # beyond them, no chart has ticks
_MOST_SIDE = 1024  # pixels of a picture, which evaluations leave with 112
_COUNTS = ("n", "images", "texts", "classes")


def is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn, or one that is not finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return (isinstance(value, float) and not math.isfinite(value)) or abs(value) <= _LARGEST


def in_words(value: Any) -> str:
    """What a value is, in a few words."""
    words = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}
    return words.get(type(value)) or repr(value)[:40]


def in_range(key: str, value: Any) -> bool:
    """Whether a number of eval.json is in its range."""
    if key in _COUNTS:
        return isinstance(value, int) and is_number(value) and 0 < value <= 10**9
    if not is_number(value) or not math.isfinite(value):
        return False
    return (-1 if key in ("drop", "effective") else 0) <= value <= 1 if names.result(key).share else True


def is_shallow(value: Any, deepest: int) -> bool:
    """Whether lists and dicts are nested at most `deepest` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return deepest > 0 and all(is_shallow(each, deepest - 1) for each in inner)


def are_texts(array: np.ndarray) -> bool:
    """Whether these are N > 0 strings that are not too long."""
    return array.dtype.kind == "U" and array.ndim == 1 and len(array) > 0 and array.itemsize <= 4 * LONGEST


def are_counts(array: np.ndarray) -> bool:
    """Whether these are whole numbers from 0 on."""
    return array.dtype.kind == "i" and bool((array >= 0).all()) and bool((array <= MOST_STEPS).all())


def are_coordinates(array: np.ndarray) -> bool:
    """Whether all are finite, and no further from 0 than distances of unit vectors are."""
    return array.dtype.kind in "fi" and bool((np.abs(array) <= 10).all())


def answers_of(value: Any) -> list:
    """The first ten answers of a query. Raises ValueError where there are none."""
    if not isinstance(value, list) or not value:
        raise ValueError("no list of answers")
    return value[:10]


def text_fields(one: dict, *keys: str) -> dict:
    """These fields of an object. Raises ValueError where one is not text."""
    if not all(isinstance(one[key], str) for key in keys):
        raise ValueError(f"no text in {' or '.join(keys)}")
    return {key: one[key][:LONGEST] for key in keys}


def right_field(one: dict) -> dict:
    """Whether an answer is marked as right."""
    return {"right": one["right"] is True}


def picture_field(one: dict) -> dict:
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
