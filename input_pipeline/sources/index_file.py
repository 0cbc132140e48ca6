"""Index files: where the rows of shards begin and how long they are, so that a reader can map them or ask for a few.

  head      magic; CRC-32 of the table, its length, the length of its JSON
  table     JSON (kind, width, names of the shards, what is lost); for each shard int64 (5,): size, time, rows, first
            record, kinds of rows; CRC-32 of each CHUNK records of each shard, uint32
  records   from the next page on: int64 (rows, 2 M): M first bytes, then M lengths, -1 for what a row lacks

All numbers are little-endian. A file may come from anywhere: whatever does not fit together is a ValueError.
"""

import dataclasses
import functools
import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from input_pipeline.sources.mapping import mapped
from rankclip_jax.common import storage

ENDING = ".index"
CHUNK = 256  # records; the fingerprints of data contain their checksums, so this never changes
DAMAGED = (OSError, EOFError, MemoryError, RecursionError, ArithmeticError, LookupError, struct.error)
DAMAGED += (ValueError, TypeError, AttributeError)
_HEAD = struct.Struct("<8sIQQ")
_MAGIC = b"RCINDEX1"
_PAGE = 4096
_FIRST = 64 << 10  # bytes of the first request to a bucket, which mostly hold the table
_MOST = 5  # kinds of members, so that the kinds of rows fit one number


class Shard(NamedTuple):
    """A shard in an index file.

    Attributes:
      size, time: of the shard when it was indexed (storage.File).
      first, rows: its records in the file.
      kinds: bit p is set where a row has the pattern p: bit m of p where it has its member m.
      checks: CRC-32 of each CHUNK records.
      lost: (reason, samples) of what has no row.
    """

    name: str
    size: int
    time: int
    rows: int
    first: int
    kinds: int
    checks: np.ndarray
    lost: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class IndexFile:
    """An index file: `begin` is the byte of its first record. `path` is None where it could not be written."""

    path: str | None
    begin: int
    total: int
    width: int
    shards: tuple[Shard, ...]
    memory: np.ndarray | None = None

    @functools.cached_property
    def records(self) -> np.ndarray | None:
        """int64 (total, width), mapped, and private to this process where written to; None: they are in a bucket."""
        if self.memory is not None or self.path is None or storage.is_remote(self.path):
            return self.memory
        data = mapped(self.path, self.begin + self.nbytes)
        return data[self.begin :].view("<i8").reshape(self.total, self.width)

    @property
    def nbytes(self) -> int:
        """Of the records."""
        return self.total * self.width * 8


def described(name: str, stamp: tuple[int, int], records_RxK: np.ndarray, lost: tuple[tuple[str, int], ...]) -> Shard:
    """The entry of a shard; `first` is 0."""
    lengths_RxM = records_RxK[:, records_RxK.shape[1] // 2 :]
    if lengths_RxM.shape[1] > _MOST:
        raise ValueError(f"{lengths_RxM.shape[1]} kinds of members. Expected at most {_MOST}")
    patterns = np.unique((lengths_RxM >= 0) @ (1 << np.arange(lengths_RxM.shape[1])))
    return Shard(name, *stamp, len(records_RxK), 0, int((1 << patterns).sum()), checks_of(records_RxK), lost)


def checks_of(records_RxK: np.ndarray) -> np.ndarray:
    """CRC-32 of each CHUNK records, uint32."""
    data = np.ascontiguousarray(records_RxK, "<i8")
    return np.array([zlib.crc32(data[at : at + CHUNK].data) for at in range(0, len(data), CHUNK)], np.uint32)


def table(kind: str, width: int, shards: Sequence[Shard]) -> bytes:
    """The file up to its records."""
    lost = [[number, *one] for number, shard in enumerate(shards) for one in shard.lost]
    text = json.dumps({"kind": kind, "width": width, "names": [shard.name for shard in shards], "lost": lost}).encode()
    numbers = np.array([(s.size, s.time, s.rows, s.first, s.kinds) for s in shards], "<i8")
    data = text + numbers.tobytes() + b"".join(shard.checks.astype("<u4").tobytes() for shard in shards)
    head = _HEAD.pack(_MAGIC, zlib.crc32(data), len(data), len(text))
    return (head + data).ljust(_after(len(data)), b"\0")


def read(path: str, size: int, kind: str, width: int) -> IndexFile:
    """Reads the table of a file of `size` bytes. Raises one of DAMAGED for another kind of file, or a damaged one."""
    start = storage.read(path, 0, min(size, _FIRST if storage.is_remote(path) else _HEAD.size))
    magic, check, length, text = _HEAD.unpack_from(start)
    if magic != _MAGIC or not text <= length <= size:
        raise ValueError("no index file")
    end = _HEAD.size + length
    if len(start) < end:
        start += storage.read(path, len(start), end)
    data = start[_HEAD.size : end]
    if zlib.crc32(data) != check:
        raise ValueError("the table is damaged")
    about = json.loads(data[:text])
    names = [str(name) for name in about["names"]]
    if (about["kind"], about["width"]) != (kind, width):
        raise ValueError("of another kind")
    numbers = np.frombuffer(data, "<i8", 5 * len(names), text).reshape(-1, 5)
    sizes, times, rows, firsts, kinds = (column.tolist() for column in numbers.T)
    begin, total = _after(length), (size - _after(length)) // (8 * width)
    counts = [-(-count // CHUNK) for count in rows]
    checks = np.frombuffer(data, "<u4", sum(counts), text + numbers.nbytes)
    fits = all(0 <= first and 0 <= count and first + count <= total for first, count in zip(firsts, rows, strict=True))
    if not fits or size != begin + total * width * 8:
        raise ValueError("cut off")
    lost: dict[int, list] = {}
    for number, reason, samples in about["lost"]:
        lost.setdefault(int(number), []).append((str(reason), int(samples)))
    parts = np.split(checks, np.cumsum(counts)[:-1]) if counts else []
    told = (tuple(lost.get(number, ())) for number in range(len(names)))
    shards = tuple(map(Shard, names, sizes, times, rows, firsts, kinds, parts, told))
    return IndexFile(path, begin, total, width, shards)


def sound(records_RxK: np.ndarray, checks: np.ndarray, size: int, frame: int) -> bool:
    """Whether records have these checksums and fit a shard of `size` bytes."""
    return np.array_equal(checks_of(records_RxK), checks) and fits(records_RxK, size, frame)


def fits(records_RxK: np.ndarray, size: int, frame: int) -> bool:
    """Whether the members lie inside a shard of `size` bytes, each with `frame` bytes around it."""
    begin, length = np.split(np.asarray(records_RxK), 2, axis=1)
    inside = (begin >= 0) & (length >= 0) & (length <= size - frame - np.minimum(begin, size))
    return bool((inside | (begin == -1) & (length == -1)).all())


def _after(length: int) -> int:
    """The first byte of the records behind a table of so many bytes."""
    return -(-(_HEAD.size + length) // _PAGE) * _PAGE


def stem(kind: str) -> str:
    """What the names of a kind's files begin with."""
    return f"{zlib.crc32(kind.encode()):08x}-"


def file_name(kind: str, head: bytes) -> str:
    """The name of a file with this table: the same for the same contents, whoever writes it."""
    return f"{stem(kind)}{hashlib.sha256(head).hexdigest()[:20]}{ENDING}"


def is_named(name: str, kind: str) -> bool:
    """Whether a file in a folder of indices is one of the kind, by its name."""
    return name.startswith(stem(kind)) and name.endswith(ENDING)
