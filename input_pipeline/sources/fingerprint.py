"""Identifies the data of a source in 16 digits, so that a resumed run notices other data."""

import hashlib

import numpy as np

from input_pipeline.sources.source import Source

_LONG = 4_000_000  # rows; the checksums of an index stand for the offsets of more


def fingerprint(source: Source, before: bool = False) -> str:
    """A hash of the size and the index: every path and text of a table, the offsets of the samples in shards.

    Pixels, and the captions of shards and folders, are not part of it. Nor is the location of the data.

    Args:
      before: the one that earlier versions stored, which hashes the offsets of any number of rows.
    """
    digest = hashlib.blake2b(str(source.size).encode(), digest_size=8)
    parts = source.index if before or source.digest is None or source.size <= _LONG else source.digest
    for part in parts():
        if isinstance(part, str):
            part = part.encode()
            length, pieces = len(part), [part]
        else:
            length, pieces = part if isinstance(part, tuple) else (part.nbytes, [part])
        digest.update(length.to_bytes(8, "little"))
        for piece in pieces:
            digest.update(piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).tobytes())
    return digest.hexdigest()
