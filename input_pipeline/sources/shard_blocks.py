"""Blocks of shards whose rows are ranges of bytes (tars, TFRecord), each read in one request."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from input_pipeline.sources.offsets import OffsetIndex
from input_pipeline.sources.source import Blocks
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError

_WINDOW_BLOCKS = 16  # that a window has room for, at least


def largest(spec: Mapping[str, Any]) -> int:
    """Bytes that a block may have."""
    return (spec["window_mb"] << 20) // _WINDOW_BLOCKS


class ShardBlocks:
    """Runs of config.data.block_rows neighbouring rows of one shard.

    Attributes:
      blocks: as a Source's.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        index: OffsetIndex,
        span: Callable[[np.ndarray], tuple[int, int]],
        reads: storage.ReadAhead,
    ):
        """`span`: rows -> (begin, end) in their shard. `reads`: for rows of blocks that are not held."""
        self._index, self._span, self._reads, self._limit = index, span, reads, largest(spec)
        self._held = storage.Held(self._read)
        shards = itertools.pairwise([*index.starts, index.size])
        self._first = np.concatenate([np.arange(*shard, spec["block_rows"]) for shard in shards])
        self._rows = np.diff(np.append(self._first, index.size))
        self.blocks = Blocks(self._first, self._rows, sum(index.sizes), self._held.hold, self._held.drop)

    def take(self, row: int, path: str, begin: int, end: int) -> bytes:
        """Bytes [begin:end] of a shard, which are of this row. Raises InputError as storage.ReadAhead."""
        self._reads.check()
        try:
            found = self._held.get(int(np.searchsorted(self._first, row, side="right")) - 1)
        except storage.MissingError:  # the shard is shorter than it was: some of the rows may still be there
            found = None
        except InputError as error:
            self._reads.failed = error
            raise
        if not found:
            return self._reads.take(path, begin, end)
        first, data = found
        return data[begin - first : end - first]

    def _read(self, block):
        """(its first byte, its bytes); None: its rows are read one by one, since it is too large for a window."""
        first, rows = int(self._first[block]), int(self._rows[block])
        begin, end = self._span(np.arange(first, first + rows))
        within = begin < end <= begin + self._limit
        return (begin, storage.read(self._index.paths[self._index.file_of(first)], begin, end)) if within else None


def shard_blocks(spec: Mapping[str, Any], *args: Any) -> ShardBlocks | None:
    """The blocks of shards; None where config.data has no order of blocks."""
    return ShardBlocks(spec, *args) if spec.get("shuffle") == "blocks" else None
