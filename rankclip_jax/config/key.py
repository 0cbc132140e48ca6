"""One configuration key: its default, and which values it takes. keys.py declares them with the functions here."""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rankclip_jax.common.errors import InputError


class Key(NamedTuple):
    """A key's default, and what is expected of other values.

    Attributes:
      convert: a value -> the value to store; raises ValueError where it is not what is expected.
      expected: in words, for messages: "an integer of at least 1".
      optional: None is allowed.
    """

    default: Any
    convert: Callable[[Any], Any]
    expected: str
    optional: bool

    def check(self, value: Any, where: str) -> Any:
        """The value to store. Raises InputError for a wrong one, naming `where`, what it is and what was expected."""
        if value is None and self.optional:
            return None
        try:
            return self.convert(value)
        except (ValueError, TypeError, OverflowError):
            none = " or None" if self.optional else ""
            raise InputError(f"{where}={value!r}. Expected {self.expected}{none}") from None


def _key(default: Any, convert: Callable[[Any], Any], expected: str, optional: bool = False) -> Key:
    return Key(default, convert, expected, optional or default is None)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _integer(value: Any) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool))
    return value


def _real(value: Any) -> float:
    _require(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
    return float(value)


def _string(value: Any) -> str:
    _require(isinstance(value, str) and bool(value))
    return value


def _regex(value: Any) -> str:
    try:
        re.compile(_string(value))
    except re.error:
        raise ValueError from None
    return value


def integer(default: int | None, low: int | None = None, optional: bool = False, high: int | None = None) -> Key:
    """A whole number, of at least `low` and at most `high`."""

    def convert(value):
        _require(low is None or _integer(value) >= low)
        _require(high is None or _integer(value) <= high)
        return _integer(value)

    bounds = [("at least", low), ("at most", high)]
    said = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
    return _key(default, convert, "an integer" + (f" of {said}" if said else ""), optional)


def real(
    default: float | None,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> Key:
    """A finite number in [low, high], with `above` and `below` as bounds that it must not reach."""

    def convert(value):
        number = _real(value)
        _require(low is None or number >= low)
        _require(high is None or number <= high)
        _require(above is None or number > above)
        _require(below is None or number < below)
        return number

    bounds = [("at least", low), ("above", above), ("at most", high), ("below", below)]
    said = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    return _key(default, convert, "a number" + (f" {said}" if said else ""), optional)


def boolean(default: bool | None) -> Key:
    """True or False."""

    def convert(value):
        _require(isinstance(value, bool))
        return value

    return _key(default, convert, "True or False")


def string(default: str | None, optional: bool = False) -> Key:
    """Text, not empty."""
    return _key(default, _string, "a string", optional)


def path(default: str | None) -> Key:
    """A path; ~ is the home folder."""
    return _key(default, lambda value: os.path.expanduser(_string(value)), "a path")


def encoding(default: str | None) -> Key:
    """The name of an encoding of text that Python knows."""

    def convert(value):
        try:
            "".encode(_string(value))
        except LookupError:
            raise ValueError from None
        return value

    return _key(default, convert, "an encoding, such as utf-8, latin-1 or gb18030")


def character(default: str | None) -> Key:
    """One character; a tab may be written \\t, as shells pass it on, or tab."""

    def convert(value):
        value = {"\\t": "\t", "tab": "\t"}.get(value, value)
        _require(len(_string(value)) == 1 and value not in '"\r\n')
        return value

    return _key(default, convert, "one character (a tab: \\t), no quotation mark or line end")


def choice(default: Any, *choices: Any) -> Key:
    """One of `choices`, or the default."""

    def convert(value):
        # True == 1 in Python, and is not meant here.
        _require(any(value == each and type(value) is type(each) for each in (default, *choices)))
        return value

    named = dict.fromkeys((default, *choices))
    return Key(default, convert, "one of " + ", ".join(str(one) for one in named if one is not None), None in named)


def choices(default: tuple, *choices: str) -> Key:
    """Any number of `choices`, each once; one alone is a tuple of it."""

    def convert(value):
        found = (value,) if isinstance(value, str) else tuple(value)
        _require(isinstance(value, list | tuple | str) and len(set(found)) == len(found) and set(found) <= set(choices))
        return found

    return _key(default, convert, f"a tuple of {' and '.join(choices)}, or of one of them, or ()")


def strings(default: tuple | None) -> Key:
    """Any number of strings; one alone is a tuple of it."""

    def convert(value):
        _require(isinstance(value, list | tuple | str))
        return tuple(_string(each) for each in ([value] if isinstance(value, str) else value))

    return _key(default, convert, "a tuple of strings")


def regexes(default: tuple) -> Key:
    """Any number of regular expressions; one alone is a tuple of it."""

    def convert(value):
        _require(isinstance(value, list | tuple | str))
        return tuple(_regex(each) for each in ([value] if isinstance(value, str) else value))

    return _key(default, convert, "a tuple of regular expressions")


def regex_rules(default: tuple) -> Key:
    """Any number of (regex, {field: value}) pairs; load.py checks the fields."""

    def convert(value):
        _require(isinstance(value, list | tuple))
        for rule in value:
            pattern, fields = rule
            _regex(pattern)
            _require(isinstance(fields, Mapping) and bool(fields) and all(isinstance(name, str) for name in fields))
        return tuple((pattern, dict(fields)) for pattern, fields in value)

    return _key(default, convert, 'a list of (regex, {"lr": 0.1, "weight_decay": 0.0, "freeze": True}) rules')


def reals(default: tuple | None, size: int | None) -> Key:
    """`size` numbers of at least 0, or any number of them; a tuple."""

    def convert(value):
        _require(isinstance(value, list | tuple) and size in (None, len(value)))
        numbers = tuple(_real(each) for each in value)
        _require(all(each >= 0 for each in numbers))
        return numbers

    many = f"{size} numbers" if size else "a tuple of numbers"
    return _key(default, convert, f"{many} from 0 on")


def paths(default: Any) -> Key:
    """What names data: a path, a list of paths, a number of scenes (format shapes), or a mixture by name."""

    def convert(value):
        if isinstance(value, list | tuple):
            _require(bool(value) and all(isinstance(each, str) and each for each in value))
            return tuple(map(os.path.expanduser, value))
        if isinstance(value, int):
            _require(_integer(value) > 0)
        else:
            _require(bool(value) and (isinstance(value, str | Mapping) or hasattr(value, "to_dict")))
        return os.path.expanduser(value) if isinstance(value, str) else value

    expected = "a path, a list of paths, a number of scenes above 0, or a mixture {name: {path: ...}}"
    return _key(default, convert, expected)


def pair(default: tuple | None, expected: str, ok: Callable[[Any, Any], bool], each: Callable = _real) -> Key:
    """Two numbers that fit together, as `expected` says."""

    def convert(value):
        first, second = value
        _require(isinstance(value, list | tuple) and ok(each(first), each(second)))
        return each(first), each(second)

    return _key(default, convert, expected)


def whole_pair(default: tuple | None, expected: str, ok: Callable[[int, int], bool]) -> Key:
    """`pair` of integers."""
    return pair(default, expected, ok, _integer)


def rules(default: Any, *names: str) -> Key:
    """One of `names`, or a list of (regex, mesh axes) rules: an axis, or an axis or None for each dimension."""

    def convert(value):
        if isinstance(value, str):
            _require(bool(value))
            return value  # parallel/sharding.py knows the names
        _require(isinstance(value, list | tuple) and bool(value))
        for rule in value:
            pattern, axes = rule
            _regex(pattern)
            _require(isinstance(axes, str | list | tuple))
            named = [_string(axis) for axis in ([axes] if isinstance(axes, str) else axes) if axis is not None]
            _require(len(set(named)) == len(named))
        return tuple(value)

    return _key(default, convert, f"one of {', '.join(names)}, or a list of (regex, axes) rules")
