"""The order of blocks: runs of neighbouring rows in random order, and rows in random order within windows of blocks.

An epoch's permutation of the blocks is dealt to lanes. Each lane is an endless stream, with windows of its own blocks,
within which all rows are shuffled. A batch of B is the next B / lanes good rows of every lane, and a process reads some
of the lanes. So a batch is the same with any number of processes that divides the lanes.

Every block has as many places as the largest; what a shorter one lacks are holes, which are passed over. So the row at
a position is a function of (seed, epoch, lane, position), and to resume is to begin at the lanes' positions. An epoch
of a lane ends with its blocks; other lanes may be in another epoch by then.
"""

import functools
from collections.abc import Iterator

import numpy as np

from input_pipeline.sources import Blocks

Rows = tuple[np.ndarray, np.ndarray]  # int64 positions in a lane, and the rows there


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of `count` numbers, int64, that any version of NumPy draws by a key of numbers from 0 on."""
    return np.argsort(np.random.PCG64(key).random_raw(count), kind="stable")  # the streams of bit generators are fixed


class BlockOrder:
    """Which row is where in which lane.

    Attributes:
      blocks: of the source.
      lanes: how many.
      window_blocks: blocks of a window of a lane, at most.
      window_places: of such a window.
      window_bytes: of such a window, roughly.
    """

    def __init__(self, blocks: Blocks, *, seed: int, lanes: int, window_bytes: int):
        """`window_bytes`: of the windows of all lanes together; a window has one block at least."""
        self.blocks, self.lanes, self._seed = blocks, lanes, seed
        count, mean = len(blocks.first), max(blocks.size / len(blocks.first), 1)
        self._places = int(blocks.rows.max())  # of a block
        own = -(-count // lanes)  # blocks of a lane in an epoch; some have one less
        windows = -(-own // max(int(window_bytes / lanes / mean), 1))  # in an epoch, of like size
        self.window_blocks = -(-own // windows)
        self._own, self._windows = own, -(-own // self.window_blocks)
        self.window_places, self.window_bytes = self.window_blocks * self._places, self.window_blocks * mean
        self._permuted = functools.lru_cache(3)(lambda epoch: shuffled(count, seed, epoch).astype(np.int32))
        self.window = functools.lru_cache(4 * lanes)(self._window)

    def number_at(self, position: int) -> int:
        """The number of the window with a position; they are counted on from epoch to epoch."""
        epoch, place = divmod(position, self._own * self._places)
        return epoch * self._windows + place // self.window_places

    def begin(self, number: int) -> int:
        """The first position of a window."""
        epoch, own = divmod(number, self._windows)
        return (epoch * self._own + own * self.window_blocks) * self._places

    def _window(self, lane: int, number: int) -> Rows:
        epoch, own = divmod(number, self._windows)
        dealt = self._permuted(epoch)[lane :: self.lanes]
        blocks = dealt[own * self.window_blocks : (own + 1) * self.window_blocks]
        slots = shuffled(len(blocks) * self._places, self._seed, epoch, 1 + lane, own)
        block, row = blocks[slots // self._places], slots % self._places
        there = np.flatnonzero(row < self.blocks.rows[block])
        return self.begin(number) + there, self.blocks.first[block[there]] + row[there]

    def after(self, lane: int, position: int) -> Iterator[Rows]:
        """What comes from a position on, window by window, without end."""
        number = self.number_at(position)
        while True:
            positions, rows = self.window(lane, number)
            first = np.searchsorted(positions, position)
            yield positions[first:], rows[first:]
            number += 1

    def between(self, lane: int, begin: int, end: int) -> np.ndarray:
        """Positions in [begin:end] that have a row."""
        numbers = range(self.number_at(begin), self.number_at(end - 1) + 1)
        positions = np.concatenate([self.window(lane, number)[0] for number in numbers])
        return positions[(positions >= begin) & (positions < end)]

    def row_at(self, lane: int, position: int) -> int:
        """The row at a position that has one."""
        positions, rows = self.window(lane, self.number_at(position))
        return int(rows[np.searchsorted(positions, position)])

    def blocks_of(self, rows: np.ndarray) -> list[int]:
        """The blocks that have these rows."""
        return np.unique(np.searchsorted(self.blocks.first, rows, side="right") - 1).tolist()
