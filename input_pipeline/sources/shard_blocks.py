"""Blocks of shards whose rows are ranges of bytes (tars, TFRecord), each read in one request."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from input_pipeline.sources.offset_index import OffsetIndex
from input_pipeline.sources.source import Blocks
from rankclip_jax.common.storage import HeldReads, ReadAhead

_WINDOW_BLOCKS = 16  # that a window has room for, at least


def reads_of(spec: Mapping[str, Any]) -> ReadAhead:
    """What reads the bytes of shards: in block order by blocks."""
    return HeldReads() if spec.get("shuffle") == "blocks" else ReadAhead()


def largest(spec: Mapping[str, Any]) -> int:
    """Bytes that a block may have."""
    return (spec["window_mb"] << 20) // _WINDOW_BLOCKS


def shard_blocks(
    spec: Mapping[str, Any], index: OffsetIndex, span: Callable[[np.ndarray], tuple[int, int]], reads: ReadAhead
) -> Blocks | None:
    """config.data.block_rows neighbouring rows of one shard are a block; None in the order of rows.

    A block that is too large for a window is not held: its rows are read one by one.

    Args:
      span: rows -> (begin, end) in their shard.
    """
    if not isinstance(reads, HeldReads):
        return None
    held, rows, limit = reads.held, spec["block_rows"], largest(spec)
    stops_F = np.append(index.starts[1:], index.size)
    first_N = np.concatenate([np.arange(*ends, rows) for ends in zip(index.starts, stops_F, strict=True)])
    rows_N = np.diff(np.append(first_N, index.size))

    def wanted(block):
        first = int(first_N[block])
        return (index.paths[index.file_of(first)], *span(np.arange(first, first + rows_N[block])))

    def hold(block: int, user: Hashable) -> None:
        path, begin, end = wanted(block)
        if begin < end <= begin + limit:
            held.hold((path, begin, end), user)

    def drop(block: int, user: Hashable) -> None:
        held.drop(wanted(block), user)

    return Blocks(first_N, rows_N, sum(index.sizes), hold, drop)
