"""The shuffled order of the training stream, computed from the position without a list."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from input_pipeline.graph import as_written, mapped
from input_pipeline.sources import Source, started_ahead
from input_pipeline.tensorflow_import import tf

# Positions whose rows are found, and are read where Python reads them, at a time; and such groups at once.
_TOGETHER, _GROUPS = 32, 2


def row_at(source: Source, stream: tf.Tensor, seed: int) -> tf.Tensor:
    """The rows (int64) at positions `stream` (int or int64, scalar or vector, from 0) of the endless stream of `seed`.

    Epoch e has the positions from e * size to (e + 1) * size - 1 and contains every row once. In a weighted mixture it
    contains each part as often as its share, and the rows of a part have their own epochs.
    """
    stream = tf.cast(stream, tf.int64)
    epoch, place = stream // source.size, stream % source.size
    place = _shuffled(place, seed, epoch, source.size - 1)
    if source.shares is None:
        return place
    rows_M, share_M = (tf.constant(numbers, tf.int64) for numbers in zip(*source.shares, strict=True))
    part = tf.reshape(tf.searchsorted(tf.cumsum(share_M), tf.reshape(place, [-1]), side="right"), tf.shape(place))
    ends = (tf.cumsum(numbers, exclusive=True) for numbers in (share_M, rows_M))
    first_place, first_row, share, rows = (tf.gather(numbers, part) for numbers in (*ends, share_M, rows_M))
    own = epoch * share + place - first_place  # position in the part's own stream
    # Each part has its own shuffles: an odd factor gives each a different seed.
    part_seed = seed + (tf.cast(part, tf.int64) + 1) * 0x9E3779B1
    return first_row + _shuffled(own % rows, part_seed, own // rows, rows - 1)


def _shuffled(place, seed, epoch, last):
    """As tf.random.experimental.index_shuffle, which takes no vector of seeds."""
    key = [498247692, seed, epoch]  # the first number is that function's
    key = tf.stack([tf.broadcast_to(tf.cast(number, tf.int64), tf.shape(epoch)) for number in key], axis=-1)
    last = tf.cast(last, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=place, seed=tf.cast(key, tf.uint32), max_index=last, rounds=4)


def place_of(position: Any, batch_size: int, process: tuple[int, int]) -> Any:
    """Position in the stream of all processes, for `position` in that of one, which reads `batch_size` per batch."""
    index, count = process
    return (position // batch_size * count + index) * batch_size + position % batch_size


class RowStream:
    """A process's part of the order of rows: good samples, and how far it has read.

    A place is a position in the stream of all processes.

    Attributes:
      position: in this process's stream.
    """

    def __init__(self, source: Source, seed: int, position: int, batch_size: int, process: tuple[int, int]):
        """`batch_size`, `process`: as of pipeline.TrainBatches."""
        self._source, self._seed, self.position = source, seed, position
        self._batch_size, self._process = batch_size, process
        self._from, self._span = (tf.Variable(0, dtype=tf.int64) for _ in range(2))

    def begin(self, batches: int) -> None:
        """Before an iterator of `samples` is made: it reads so many batches at most, from `position` on."""
        self._from.assign(self.position)
        self._span.assign(batches * self._batch_size)

    def samples(self, sample: Callable, _good: dict) -> tf.data.Dataset:
        """The good ones of sample(place, row, and what `together` gave)."""

        def place_at(position):
            return place_of(position, self._batch_size, self._process)

        def found(positions):
            rows = self.row_of(place_at(positions))
            if self._source.together is None:
                return place_at(positions), rows
            return place_at(positions), rows, self._source.together.in_graph(rows)

        data = tf.data.Dataset.from_tensors(0)
        data = data.flat_map(as_written(lambda _: tf.data.Dataset.range(self._from, self._from + self._span)))
        data = started_ahead(data, self._source.ahead, lambda position: self.row_of(place_at(position)))
        data = mapped(data.batch(_TOGETHER), found, _GROUPS).unbatch()
        return mapped(data, sample).ignore_errors()

    def places(self) -> Iterator[int]:
        """What comes next."""
        for position in range(self.position, self.position + self._source.size):
            yield place_of(position, self._batch_size, self._process)

    def row_of(self, place: tf.Tensor) -> tf.Tensor:
        """The row at a place, or the rows at several."""
        return row_at(self._source, place, self._seed)

    def passed(self, places: np.ndarray) -> list[int]:
        """Moves `position` behind a batch with samples of these places; returns the places that were passed over."""
        stride = self._batch_size * self._process[1]
        begin, last = self.position, int(places[-1])
        self.position = last // stride * self._batch_size + last % self._batch_size + 1
        passed = place_of(np.arange(begin, self.position), self._batch_size, self._process)
        return np.setdiff1d(passed, places).tolist()
