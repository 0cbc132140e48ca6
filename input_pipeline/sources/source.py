"""The interface of a source: samples by row number, so that the pipeline can shuffle and resume at no cost."""

import dataclasses
import functools
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.graph import as_written, iterated, mapped, require
from input_pipeline.sources.together import Together
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.json_rows import find, strings

_BLOCKS, _BLOCK_ROWS = 256, 256  # what a tokenizer is trained on
_TOGETHER, _AT_ONCE, _GROUPS = 32, 4, 8  # rows whose reads are started at a time; such groups at once, and waiting


@dataclasses.dataclass(frozen=True)
class Lost:
    """Unreachable data, found on opening: a torn shard, a line with a missing column.

    Attributes:
      where: the file.
      reason: what is wrong with it.
      samples: number of lost samples: an estimate for a damaged shard, and 1 for a truncated one, where the number is
        unknown.
    """

    where: str
    reason: str
    samples: int


def told(lost: Iterable[Lost], reasons: int = 5) -> list[str]:
    """What is lost, a line for each of the most frequent `reasons`: how many samples, where the first is, and why."""
    by_reason: dict[str, list[Lost]] = {}
    for one in lost:
        by_reason.setdefault(one.reason, []).append(one)
    groups = sorted(by_reason.items(), key=lambda group: -sum(one.samples for one in group[1]))
    lines = []
    for reason, some in groups[:reasons]:
        more = f" and {len(some) - 1:,} more" if len(some) > 1 else ""
        lines.append(f"about {sum(one.samples for one in some):,} samples of {some[0].where}{more}: {reason}")
    others = [one for _, some in groups[reasons:] for one in some]
    if others:
        lines.append(
            f"about {sum(one.samples for one in others):,} more samples, for {len(groups) - reasons:,} other reasons"
        )
    return lines


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Starts reads of remote rows before the rows are needed: many at once, without a thread for each.

    Attributes:
      start: int64 rows (n,) -> None.
      check: raises InputError if the store stopped answering, which is no fault of any row.
    """

    start: Callable[[np.ndarray], None]
    check: Callable[[], None]


def all_ahead(some: Sequence["Ahead | None"]) -> "Ahead | None":
    """An Ahead that starts the same rows in each of several; None if all of them are local."""
    given = [one for one in some if one]

    def start(rows):
        for one in given:
            one.start(rows)

    def check():
        for one in given:
            one.check()

    return Ahead(start, check) if given else None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Runs of neighbouring rows that are read together, N of them, in the order of their rows.

    Attributes:
      first: int64 (N,), the first row of each.
      rows: int64 (N,), the rows of each.
      size: bytes of all blocks, roughly.
      hold: (block, user) -> None: starts to read a block, whose rows are taken from memory until all users drop it.
      drop: (block, user) -> None.
    """

    first: np.ndarray
    rows: np.ndarray
    size: int
    hold: Callable[[int, Hashable], None]
    drop: Callable[[int, Hashable], None]


class Reading(NamedTuple):
    """`read` as a Source's; `ahead`: None where all is local."""

    read: Callable
    ahead: Ahead | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of images and captions by number.

    Attributes:
      size: number of rows.
      read: TensorFlow ops: int64 scalar -> {"image": encoded bytes or uint8 (H, W, 3), "caption": string (), or (n,)
        for several captions}. Labelled sets add "label": int32, pre-tokenised ones "tokens": int32 (L,). An unusable
        row raises a tf.errors.OpError with the reason. With `together` it takes what that gave of the row (Given).
      where: row -> a readable location: file, row or key.
      captions: iterable of the captions, to train a tokenizer.
      labels: int32 (size,) of a labelled csv.
      lost: unreachable samples, which have no row.
      shares: of a mixture, (rows, rows per epoch) for each part; None: every row once per epoch.
      index: identifies the rows, not their location (fingerprint.py): strings, arrays with at least one axis, and
        (number of bytes, arrays that have as many together).
      digest: the same, shorter, of shards; None: `index` is short enough.
      ahead: None where all is local.
      text: reads {"caption"} alone; None: there is no cheaper way than `read`.
      blocks: of shards that were opened with config.data.shuffle=blocks.
      together: of what Python reads: several rows by one call. None: TensorFlow reads.
    """

    size: int
    read: Callable
    where: Callable[[int], str]
    captions: Callable[[], Iterable[str]]
    labels: np.ndarray | None = None
    lost: tuple[Lost, ...] = ()
    shares: tuple[tuple[int, int], ...] | None = None
    index: Callable[[], Iterable[Any]] = tuple
    digest: Callable[[], Iterable[str | np.ndarray]] | None = None
    ahead: Ahead | None = None
    text: Reading | None = None
    blocks: Blocks | None = None
    together: Together | None = None


def read_captions(source: Source, block_rows: int | None = None) -> Iterator[str]:
    """Captions of all rows, or of 256 evenly spaced blocks of neighbouring rows, without unreadable ones.

    `block_rows`: of each block; None: as many as a tokenizer is trained on. Raises InputError if the store stopped
    answering.
    """
    block_rows = block_rows or _BLOCK_ROWS
    count, size = min(source.size, _BLOCKS * block_rows), source.size
    rows = tf.data.Dataset.range(count)
    if size > count:
        rows = rows.map(as_written(lambda i: i // block_rows * size // _BLOCKS + i % block_rows))
    read, ahead = source.text or Reading(source.read, source.ahead)
    data = mapped(started_ahead(rows, ahead), lambda row: tf.reshape(read(row)["caption"], [-1]))
    for captions in iterated(data.ignore_errors().unbatch().batch(_TOGETHER)):
        yield from (caption.decode(errors="replace") for caption in captions)
    if ahead:
        ahead.check()


def started_ahead(data: tf.data.Dataset, ahead: Ahead | None, row_of: Callable | None = None) -> tf.data.Dataset:
    """The data set of int64 scalars, unchanged, with reads of their rows started ahead.

    `row_of`: ops, scalar -> row; None: they are rows.
    """
    if ahead is None:
        return data

    @as_written
    def start(numbers, rows):
        ahead.start(rows)
        return numbers

    pairs = data.map(as_written(lambda number: (number, tf.cast(row_of(number) if row_of else number, tf.int64))))
    started = mapped(  # several at once, since an index may have to be read first
        pairs.batch(_TOGETHER),
        lambda *pair: tf.ensure_shape(tf.numpy_function(start, pair, tf.int64), [None]),
        _AT_ONCE,
    )
    return started.prefetch(_GROUPS).unbatch()


def captions_in_json(text: tf.Tensor, path: str | None) -> tf.Tensor:
    """The captions, string (n,), at a path of a JSON text (json_rows.find; None: the whole text), or a bad row."""

    @as_written
    def parse(data):
        found, reason = [], ""
        try:
            value = json.loads(np.asarray(data, object).item())
            found = strings(find(value, path) if path else value)
        except KeyError:
            keys = f" (its keys: {', '.join(value)})" if isinstance(value, dict) else ""
            reason = f"no {path} in the JSON{keys}"
        except (ValueError, RecursionError) as error:
            reason = f"no caption in the JSON: {error}"
        # An exception here would print its traceback for every bad row.
        return np.array([caption.encode() for caption in found] or [b""], object), reason[:200].encode()

    captions, reason = tf.numpy_function(parse, [text], (tf.string, tf.string))
    require(tf.strings.length(reason) == 0, reason)
    return tf.ensure_shape(captions, (None,))


def decoded(text: tf.Tensor, encoding: str | None) -> tf.Tensor:
    """Texts as UTF-8 without a mark; a bad row where they are not of the encoding (None: UTF-8)."""
    if encoding:
        text, reason = tf.numpy_function(functools.partial(_decoded, encoding), [text], (tf.string, tf.string))
        require(tf.strings.length(reason) == 0, reason)
        return text
    as_utf8 = tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")
    require(tf.reduce_all(as_utf8 == text), "the caption is not UTF-8 (see config.data.encoding)")
    return tf.strings.regex_replace(text, "^\ufeff", "")


@as_written
def _decoded(encoding, texts):
    # An exception here would print its traceback for every bad row.
    given = np.asarray(texts, object)
    try:
        found = [text.decode(encoding).removeprefix("\ufeff").encode() for text in given.ravel()]
        return np.array(found, object).reshape(given.shape), b""
    except UnicodeError as error:
        return given, f"the caption is not {encoding}: {error.reason}".encode()  # type: ignore[attr-defined]


def keys(given: str | Sequence[str] | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Names in order of preference: config.data.image_key or .caption_key, or the defaults."""
    if given is None:
        return usual
    return (given,) if isinstance(given, str) else tuple(given)
