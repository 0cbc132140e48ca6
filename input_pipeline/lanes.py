"""A process's part of the order of blocks (blocks.py): the good samples of its lanes, and how far it has read them."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from input_pipeline.blocks import BlockOrder
from input_pipeline.graph import as_written, mapped
from input_pipeline.sources import Together
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.tasks import cores

_AT_LEAST = 16  # samples that are decoded at a time
_AT_MOST = 2 * cores()  # of one lane, which is enough to keep the processors busy


class LaneStream:
    """As order.RowStream. A place is position * lanes + lane.

    Attributes:
      position: of each lane of this process.
    """

    def __init__(
        self,
        order: BlockOrder,
        together: Together,
        position: tuple[int, ...],
        batch_size: int,
        process: tuple[int, int],
    ):
        """`together`: of the source. `position`: (): all lanes begin. The others: as of pipeline.TrainBatches."""
        index, count = process
        lanes = order.lanes // count
        self._order, self._together, self._lanes = order, together, range(index * lanes, (index + 1) * lanes)
        self.position = position or (0,) * lanes
        self._rows = batch_size // lanes  # of a lane in a batch
        self._at_once = max(min(self._rows, _AT_MOST), -(-_AT_LEAST // lanes))
        self._few = 2 * self._at_once  # rows after which those before them are read
        self._behind = -(-self._few // order.window_places)  # windows that may be in use before the one that is begun
        self._start, self._span = tf.Variable(np.zeros(lanes, np.int64)), tf.Variable(0, dtype=tf.int64)

    def begin(self, batches: int) -> None:
        """Before an iterator of `samples` is made: it yields so many batches at most, from `position` on."""
        self._start.assign(self.position)
        self._span.assign(batches * self._rows)
        for lane, position in zip(self._lanes, self.position, strict=True):
            self._hold(lane, self._order.number_at(position), position)

    def samples(self, sample: Callable, good: dict) -> tf.data.Dataset:
        """The good ones of sample(place, row, what `together` gave), batch by batch.

        Where a lane has none, comes what has the "position" -1.
        """
        nothing = tf.nest.map_structure(tf.zeros_like, good) | {"position": tf.constant(-1, tf.int64)}

        def given(places, rows):
            return places, rows, self._together.in_graph(rows)

        def rows_of(i):
            def piece(number):
                found = tf.numpy_function(self._piece, [i, self._start[i], self._span, number], 2 * [tf.int64])
                return tuple(tf.ensure_shape(one, [None]) for one in found)

            pieces = tf.data.Dataset.range(tf.int64.max).map(as_written(piece))
            rows = pieces.flat_map(as_written(lambda *rows: tf.data.Dataset.from_tensor_slices(rows))).take(self._span)
            return rows.batch(self._at_once).map(as_written(given)).unbatch()

        def of_lane(i):
            read = mapped(rows_of(i), sample, self._at_once).ignore_errors()
            return read.concatenate(tf.data.Dataset.from_tensors(nothing).repeat())

        lanes = len(self._lanes)
        return tf.data.Dataset.range(lanes).interleave(as_written(of_lane), cycle_length=lanes, block_length=self._rows)

    @as_written
    def _piece(self, i, start, span, number):
        """(places, rows) of the first few rows of a window; then of the others, when the window before is read."""
        lane, (windows, rest) = self._lanes[i], divmod(int(number), 2)
        window = self._order.number_at(int(start)) + windows
        positions, rows = self._from(lane, window, start)
        if rest:
            self._drop(lane, window - self._behind)
            if self._order.begin(window + 1) < start + span:
                self._hold(lane, window + 1, start)
        else:
            self._hold(lane, window, start)
        part = slice(self._few, None) if rest else slice(self._few)
        return positions[part] * self._order.lanes + lane, rows[part]

    def _from(self, lane, window, start):
        positions, rows = self._order.window(lane, window)
        first = np.searchsorted(positions, start)
        return positions[first:], rows[first:]

    def _hold(self, lane, window, start):
        for block in self._order.blocks_of(self._from(lane, window, start)[1]):
            self._order.blocks.hold(block, (lane, window))

    def _drop(self, lane, window):
        if window >= 0:
            for block in self._order.blocks_of(self._order.window(lane, window)[1]):
                self._order.blocks.drop(block, (lane, window))

    def places(self) -> Iterator[int]:
        """What comes next: the next row of every lane, then those of the first lane."""
        for lane, position in zip(self._lanes, self.position, strict=True):
            positions = itertools.chain.from_iterable(found for found, _ in self._order.after(lane, position))
            yield int(next(positions)) * self._order.lanes + lane
        lane = self._lanes[0]
        for positions, _ in self._order.after(lane, self.position[0]):
            yield from (positions * self._order.lanes + lane).tolist()

    def row_of(self, place: Any) -> Any:
        """The row at a place, or the rows at several."""
        position, lane = np.divmod(np.asarray(place), self._order.lanes)
        return np.vectorize(self._order.row_at, otypes=[np.int64])(lane, position)[()]  # of one place a number

    def passed(self, places: np.ndarray) -> list[int]:
        """Moves `position` behind a batch with samples of these places; returns the places that were passed over."""
        lanes, dropped = self._order.lanes, []
        positions = places.reshape(len(self._lanes), -1) // lanes
        ends = tuple((positions[:, -1] + 1).tolist())
        for lane, begin, end, came in zip(self._lanes, self.position, ends, positions, strict=True):
            if end - begin > len(came):
                missing = np.setdiff1d(self._order.between(lane, begin, end), came)
                dropped += (missing * lanes + lane).tolist()
        self.position = ends
        return dropped
