"""The interface of a source: samples by row number, so that the pipeline can shuffle and resume at no cost."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from rankclip_jax.common.json_rows import find, strings


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
class Source:
    """Rows of images and captions by number.

    Attributes:
      size: number of rows.
      read: TensorFlow ops: int64 scalar -> {"image": encoded bytes or uint8 (H, W, 3), "caption": string (), or (n,)
        for several captions}. Labelled sets add "label": int32, pre-tokenised ones "tokens": int32 (L,). An unusable
        row raises a tf.errors.OpError with the reason.
      where: row -> a readable location: file, row or key.
      captions: iterable of the captions, to train a tokenizer.
      labels: int32 (size,) of a labelled csv.
      lost: unreachable samples, which have no row.
      shares: of a mixture, (rows, rows per epoch) for each part; None: every row once per epoch.
      index: what says which rows these are, wherever they lie (fingerprint.py): strings, and arrays with an axis.
    """

    size: int
    read: Callable
    where: Callable[[int], str]
    captions: Callable[[], Iterable[str]]
    labels: np.ndarray | None = None
    lost: tuple[Lost, ...] = ()
    shares: tuple[tuple[int, int], ...] | None = None
    index: Callable[[], Iterable[str | np.ndarray]] = tuple


def read_captions(read: Callable, size: int, limit: int = 1_000_000) -> Iterator[str]:
    """Captions of all rows, or of `limit` evenly spaced rows, without unreadable ones."""
    count = min(size, limit)
    data = tf.data.Dataset.range(count).map(
        lambda i: tf.reshape(read(i * size // count)["caption"], [-1]),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    for captions in data.ignore_errors().as_numpy_iterator():
        yield from (caption.decode(errors="replace") for caption in captions)


def captions_in_json(text: tf.Tensor, path: str | None) -> tf.Tensor:
    """The captions, string (n,), at a path of a JSON text (json_rows.find); None: all of it. Else a bad row."""

    @tf.autograph.experimental.do_not_convert
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


@tf.autograph.experimental.do_not_convert
def _decoded(encoding, texts):
    # An exception here would print its traceback for every bad row.
    given = np.asarray(texts, object)
    try:
        found = [text.decode(encoding).removeprefix("\ufeff").encode() for text in given.ravel()]
        return np.array(found, object).reshape(given.shape), b""
    except UnicodeError as error:
        return given, f"the caption is not {encoding}: {error.reason}".encode()  # type: ignore[attr-defined]


def require(condition: tf.Tensor, message: str | tf.Tensor) -> None:
    """Makes the current row a bad one, with `message` as the reason, unless `condition` holds."""
    tf.debugging.Assert(condition, [message])


def keys(given: str | Sequence[str] | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Names of which the first that a sample has is used: config.data.image_key or .caption_key, or the defaults."""
    if given is None:
        return usual
    return (given,) if isinstance(given, str) else tuple(given)
