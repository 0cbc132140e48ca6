"""csv by RFC 4180, and tsv. pyarrow reads regular files, Python's csv the others, row by row.

A file is regular if every quotation mark is where RFC 4180 allows it. In any file each row is either good, or bad with
a reason: more or fewer fields than the header, a byte that cannot be decoded, a mark that is not closed.
"""

import contextlib
import csv
import functools
import io
import itertools
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rankclip_jax.common.encoded_text import HALF, EncodedText
from rankclip_jax.common.errors import InputError, printable
from rankclip_jax.common.quotation import is_quoted, quoted_fields

DELIMITERS = (",", ";", "\t", "|")
_BLOCK = 64 << 20  # bytes read at a time
_BLANKS = " \t\r\n\v\f"
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Rows:
    """Rows as they are read: `add` takes a good one, `bad` lists (number, reason) of the others."""

    def __init__(self, columns: int):
        self._values: list[list] = [[] for _ in range(columns)]
        self._chunks: list[list[pa.Array]] = [[] for _ in range(columns)]
        self.numbers: list[int] = []
        self.bad: list[tuple[int, str]] = []

    def add(self, number: int, values: Sequence[str]) -> None:
        for column, value in zip(self._values, values, strict=True):
            column.append(value)
        self.numbers.append(number)
        if len(self._values[0]) == 100_000:  # Arrow's strings take a fraction of the memory of Python's
            self._flush()

    def columns(self) -> list[pa.Array]:
        self._flush()
        return [pa.concat_arrays(chunks) for chunks in self._chunks]

    def _flush(self) -> None:
        for values, chunks in zip(self._values, self._chunks, strict=True):
            chunks.append(pa.array(values, pa.large_string()))
            values.clear()


class NoColumnError(InputError):
    """Attributes: names: any of which was looked for."""

    def __init__(self, message: str, names: Sequence[str]):
        super().__init__(message)
        self.names = tuple(names)


class _Header(NamedTuple):
    """Attributes: lines: number of lines down to its end; names: of its columns, without blanks and without unnamed
    ones at the end; blanks: there is a blank after each delimiter."""

    lines: int
    names: list[str]
    blanks: bool


def read_delimited(
    file: str,
    text: EncodedText,
    delimiter: str,
    wanted: Sequence[tuple[str, ...]],
    names: Sequence[str] | None = None,
) -> tuple[list[pa.Array], np.ndarray, list[tuple[int, str]]]:
    """The wanted columns of the good rows, large_string; the numbers of these rows, int64; the bad rows and reasons.

    Args:
      delimiter: if only another of DELIMITERS gives the wanted columns, that one is taken, and the console says so.
      wanted: for each column its possible names; the first that the header has is used.
      names: of the columns of a file without a header.

    Raises:
      InputError: no such column, several of the name, or what EncodedText.undecodable raises.
    """
    with _fields_of_any_size():
        with text.open() as lines:
            head = list(itertools.islice(lines, 100))
        header = _Header(0, list(names), False) if names else _header(head, delimiter)
        places = _places(header, wanted)
        if places is None:
            others = [one for one in DELIMITERS if _places(_header(head, one), wanted) is not None]
            if not others:
                raise _no_column(file, header, wanted, delimiter)
            print(f"{file}: its columns are separated by {others[0]!r}, not by {delimiter!r}", file=sys.stderr)
            delimiter, header = others[0], _header(head, others[0])
            places = _places(header, wanted) or []
        for name in (header.names[place] for place in places):
            if header.names.count(name) > 1:
                raise InputError(f"{file} has {header.names.count(name)} columns {name!r}; rename all but one")
        quoted = delimiter != "\t" or is_quoted(text.data, head[: header.lines])
        if text.decodable:
            body = _below(text.data, header.lines)
            found = _regular(body, header, places, delimiter, quoted, text.undecodable)
            if found is not None:
                return found
        with text.open() as lines:
            for _ in range(header.lines):
                next(lines)
            rows = _row_by_row(lines, header, places, delimiter, quoted, text.undecodable)
    return rows.columns(), np.array(rows.numbers, np.int64), rows.bad


def first_rows(text: EncodedText, delimiter: str, count: int) -> list[list[str]]:
    """The first rows, a header among them if there is one; without empty lines, and what is not regular."""
    with _fields_of_any_size(), text.open() as lines:
        head = list(itertools.islice(lines, count))
        quoted = delimiter != "\t" or is_quoted(text.data, head[: _header(head, delimiter).lines])
        rows = [fields for fields in _records(iter(head), delimiter, quoted, False) if fields and any(fields)]
    return rows[1:] if rows and _is_excels(rows[0][0]) else rows


def _is_excels(line: str) -> bool:  # its first line, which names the separator
    return line.lower().startswith("sep=")


@contextlib.contextmanager
def _fields_of_any_size() -> Iterator[None]:
    limit = csv.field_size_limit(sys.maxsize)  # of the whole process
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _header(head: list[str], delimiter: str) -> _Header:
    reader, begin = csv.reader(head, delimiter=delimiter), 0
    for fields in reader:
        blanks = len(fields) > 1 and all(field.startswith(" ") for field in fields[1:])
        if blanks:  # behind which a quotation mark opens a field
            fields = next(csv.reader(head[begin : reader.line_num], delimiter=delimiter, skipinitialspace=True))
        begin, names = reader.line_num, [name.strip() for name in fields]
        while names and not names[-1]:
            names.pop()
        if names and not (len(names) == 1 and _is_excels(names[0])):
            return _Header(reader.line_num, names, blanks)
    return _Header(len(head), [], False)


def _places(header: _Header, wanted: Sequence[tuple[str, ...]]) -> list[int] | None:
    places = [next((header.names.index(key) for key in keys if key in header.names), -1) for keys in wanted]
    return None if -1 in places else places


def _no_column(file: str, header: _Header, wanted: Sequence[tuple[str, ...]], delimiter: str) -> InputError:
    if not header.names:
        return InputError(f"{file} is empty")
    lacking = next(keys for keys in wanted if _places(header, [keys]) is None)
    names = printable(", ".join(header.names)[:300])
    return NoColumnError(
        f"{file} has no column {' or '.join(map(repr, lacking))}; its columns are: {names} (delimiter "
        f"{delimiter!r})",
        lacking,
    )


def _below(data: Any, lines: int) -> memoryview:
    """The bytes after so many lines."""
    if not lines:
        return memoryview(data)
    end = deque(itertools.islice(_LINE_END.finditer(data), lines), maxlen=1)
    return memoryview(data)[end[0].end() if end else len(data) :]


def _regular(
    data: memoryview,
    header: _Header,
    places: list[int],
    delimiter: str,
    quoted: bool,
    undecodable: Callable[[int, str], str],
) -> tuple[list[pa.Array], np.ndarray, list[tuple[int, str]]] | None:
    """What read_delimited returns, by pyarrow; None: the file is not regular."""
    if not len(data):
        return [pa.array([], pa.large_string()) for _ in places], np.zeros(0, np.int64), []
    if quoted:
        fields = quoted_fields(data, delimiter)
        if fields is None or (header.blanks and len(fields[0])):
            return None
    buffer = pa.py_buffer(data)
    span = pa.py_buffer(np.array([0, len(data)], np.int64))
    is_utf8 = not _not_utf8(pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, span, buffer]))
    ragged: list[tuple[int, int, str]] = []

    def skip(row):
        ragged.append((row.number - 1, row.actual_columns, row.text))
        return "skip"

    wanted = [str(place) for place in dict.fromkeys(places)]
    try:
        table = pyarrow.csv.open_csv(
            pa.BufferReader(buffer),
            # Rows are numbered only with one thread.
            pyarrow.csv.ReadOptions(
                use_threads=False, block_size=_BLOCK, column_names=[str(i) for i in range(len(header.names))]
            ),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=skip if is_utf8 else None,  # row.text must be
            ),
            pyarrow.csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.large_binary())),
        ).read_all()
    except (pa.ArrowInvalid, ValueError):  # a ragged row that is not UTF-8, a delimiter that is not ASCII
        return None
    columns = [table[str(place)].combine_chunks() for place in places]
    if len(header.names) > 1 and pc.any(functools.reduce(pc.and_, map(_is_blank, columns))).as_py():
        return None  # perhaps a row without a filled cell
    bad, empty, width = {}, [], len(header.names)
    for number, count, line in ragged:
        fields = next(csv.reader(io.StringIO(line, newline=""), **_dialect(delimiter, quoted, header.blanks)), [])
        if count > width and not any(field.strip() for field in fields[width:]):
            return None
        if width > 1 and count == 1 and not line.strip():
            empty.append(number)
        else:
            bad[number] = _ragged(count, width, delimiter, quoted)
    numbers_N = np.delete(np.arange(len(table) + len(ragged)), [number for number, *_ in ragged])
    numbers_N, given = (each - np.searchsorted(empty, each) for each in (numbers_N, np.array(list(bad), np.int64)))
    bad = dict(zip(given.tolist(), bad.values(), strict=True))
    wrong: dict[int, str] = {}
    for column in [] if is_utf8 else columns:
        for row in _not_utf8(column):
            wrong.setdefault(row, column[row].as_py().decode("utf-8", "surrogateescape"))
    if wrong:
        for row, value in sorted(wrong.items()):
            bad[int(numbers_N[row])] = undecodable(int(numbers_N[row]), value)
        kept = np.delete(np.arange(len(table)), list(wrong))
        columns, numbers_N = [column.take(kept) for column in columns], numbers_N[kept]
    return [column.cast(pa.large_string()) for column in columns], numbers_N, sorted(bad.items())


def _is_blank(array: pa.Array) -> pa.Array:
    return pc.match_substring_regex(array, f"^[{_BLANKS}]*$")


def _not_utf8(array: pa.Array, start: int = 0) -> list[int]:
    """Which values of large_binary are not UTF-8."""
    try:
        array.cast(pa.large_string())
        return []
    except pa.ArrowInvalid:
        if len(array) == 1:
            return [start]
    half = len(array) // 2
    return _not_utf8(array[:half], start) + _not_utf8(array[half:], start + half)


def _ragged(count: int, width: int, delimiter: str, quoted: bool) -> str:
    hint = f"; a text with {delimiter!r} in it needs quotation marks" if count > width and quoted else ""
    return f"wrong number of fields: {count}, and the header has {width}{hint}"


def _dialect(delimiter: str, quoted: bool, blanks: bool) -> dict[str, Any]:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return dict(delimiter=delimiter, strict=True, skipinitialspace=blanks, quoting=quoting)


def _row_by_row(
    lines: Iterator[str],
    header: _Header,
    places: list[int],
    delimiter: str,
    quoted: bool,
    undecodable: Callable[[int, str], str],
) -> Rows:
    rows, number, width = Rows(len(places)), -1, len(header.names)
    for fields in _records(lines, delimiter, quoted, header.blanks):
        if fields is None:
            number += 1
            rows.bad.append((number, "a quotation mark that is not closed at the end of its field"))
            continue
        if not fields or (width > 1 and not any(field.strip(_BLANKS) for field in fields)):
            continue  # an empty line, or a row of a spreadsheet without a cell that is filled
        number += 1
        more = len(fields) > width
        if len(fields) < width or (more and any(field.strip() for field in fields[width:])):
            rows.bad.append((number, _ragged(len(fields), width, delimiter, quoted)))
            continue
        values = [fields[place] for place in places]
        halves = [value for value in values if not value.isascii() and HALF.search(value)]
        if halves:
            rows.bad.append((number, undecodable(number, halves[0])))
        else:
            rows.add(number, values)
    return rows


def _records(lines: Iterator[str], delimiter: str, quoted: bool, blanks: bool) -> Iterator[list[str] | None]:
    """Rows as lists of fields. None: a line with a quotation mark that opens a field and is not closed at its end.

    Only that line is lost: reading continues with the next.
    """
    waiting: deque[str] = deque()
    taken: list[str] = []  # lines of the current row

    def feed():
        while True:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                return
            taken.append(line)
            yield line

    kind = _dialect(delimiter, quoted, blanks)
    reader = csv.reader(feed(), **kind)
    while True:
        taken.clear()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            waiting.extendleft(reversed(taken[1:]))
            reader = csv.reader(feed(), **kind)
            yield None
