"""What a source is: a set of samples that gives any row by number, so the pipeline shuffles and resumes for free."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Lost:
    """A part of the data that cannot be reached at all, found on opening: a torn shard, a line with a missing column.

    Attributes:
      where: the file.
      reason: what is wrong with it.
      samples: how many are lost; an estimate where a shard is damaged, and 1 where it was cut off, since how much is
        missing cannot be known.
    """

    where: str
    reason: str
    samples: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of images and captions by number.

    Attributes:
      size: number of rows.
      read: TensorFlow ops: int64 scalar -> {"image": encoded bytes or uint8 (H, W, 3), "caption": string () or, of
        an image that has several, (n,)}; labelled sets add "label": int32; pre-tokenised ones "tokens": int32 (L,).
        A row that cannot be used raises a tf.errors.OpError with the reason.
      where: names a row for a person: file, row or key.
      captions: iterable of the captions, for training a tokenizer.
      labels: int32 (size,) of a labelled csv.
      lost: what could not be reached and has no row.
      shares: of a mixture, a (rows, share of an epoch) for each of its parts, in rows; None: every row once.
    """

    size: int
    read: Callable
    where: Callable[[int], str]
    captions: Callable[[], Iterable[str]]
    labels: np.ndarray | None = None
    lost: tuple[Lost, ...] = ()
    shares: tuple[tuple[int, int], ...] | None = None


def read_captions(read: Callable, size: int, limit: int = 1_000_000) -> Iterator[str]:
    """Captions of all rows, or of `limit` rows evenly spread; rows that cannot be read are left out."""
    count = min(size, limit)
    data = tf.data.Dataset.range(count).map(
        lambda i: tf.reshape(read(i * size // count)["caption"], [-1]),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    for captions in data.ignore_errors().as_numpy_iterator():
        yield from (caption.decode(errors="replace") for caption in captions)


def require(condition: tf.Tensor, message: str) -> None:
    """Makes the row that is being read a bad one, with `message` as the reason, unless `condition` holds."""
    tf.debugging.Assert(condition, [message])


def keys(given: str | Sequence[str] | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Names to look under, the first that a sample has counts: config.data.image_key or .caption_key, or the usual."""
    if given is None:
        return usual
    return (given,) if isinstance(given, str) else tuple(given)
