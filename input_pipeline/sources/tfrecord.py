"""TFRecord shards of tf.train.Example, as written by img2dataset and `input_pipeline.prepare`.

TensorFlow's own reader reads a row of a local file from its byte offset: 97 us of CPU for 20 kB. What is not local
comes through byte_ranges.py. A record's checksum is verified either way. That of its length is verified when the index
is built, because nothing can be found after a wrong length.
"""

import dataclasses
import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from ml_collections import ConfigDict

from input_pipeline.graph import as_written, from_python, iterated, no_model, require
from input_pipeline.sources.byte_ranges import ahead_of
from input_pipeline.sources.index_places import Kind
from input_pipeline.sources.offset_index import Bytes, Peers, Scan, offset_index
from input_pipeline.sources.offsets import OffsetIndex
from input_pipeline.sources.paths import expand
from input_pipeline.sources.shard_blocks import shard_blocks
from input_pipeline.sources.source import Ahead, Blocks, Lost, Source, keys
from input_pipeline.sources.together import Together, given_or_alone, require_small, row_by_row
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError

_FRAME = 16  # bytes around a record: 8 of length and 4 of its checksum in front, 4 of checksum behind


@dataclasses.dataclass(frozen=True)
class Records:
    """Serialised records by number.

    Attributes:
      size: number of records.
      read: ops, row (int64 scalar), what `together` gave -> the record (string scalar); a wrong checksum raises
        DataLossError.
      where: the location of a record: file, number in the file, byte.
      lost: unreachable records.
      index, digest, ahead, blocks, together: as a Source's.
    """

    size: int
    read: Callable
    where: Callable[[int], str]
    lost: tuple[Lost, ...]
    index: Callable[[], list[np.ndarray]]
    ahead: Ahead | None = None
    digest: Callable[[], list[np.ndarray]] | None = None
    blocks: Blocks | None = None
    together: Together | None = None

    def first(self, count: int) -> list[bytes]:
        """The readable ones of the first `count` records."""
        data = tf.data.Dataset.range(min(count, self.size)).map(as_written(self.read)).ignore_errors()
        found = list(iterated(data))
        if self.ahead:
            self.ahead.check()
        return found


def open_tfrecord(
    spec: ConfigDict, path: str | Sequence[str], captions: bool = True, peers: Peers | None = None
) -> Source:
    """Opens shards. `spec`: image_key, caption_key, hint, cache_dir of config.data.

    A record may have several captions, and `tokens`, int64 (L,): the token ids of its caption. captions=False: none of
    the records needs one.

    Raises:
      InputError: no shard, no record, a compressed shard, or no image or caption under these keys.
    """
    paths = expand(path, endings=(".tfrecord", ".tfrecords"), hint=spec.get("hint"))
    image_keys = keys(spec.get("image_key"), ("jpg", "jpeg", "png", "webp"))
    caption_keys = keys(spec.get("caption_key"), ("txt", "caption"))
    records = open_records(paths, spec.get("cache_dir"), peers=peers, spec=spec)
    return examples(records, image_keys, caption_keys, needed=("image_key", "caption_key")[: 1 + captions])


def examples(
    records: Records,
    image_keys: tuple[str, ...],
    caption_keys: tuple[str, ...],
    needed: Sequence[str] = ("image_key", "caption_key"),
) -> Source:
    """A source of tf.train.Example records with one of the `image_keys` and one of the `caption_keys`, of any number of
    captions each.

    `needed`: the first records must have one of these.
    """
    first = [tf.train.Example.FromString(record).features.feature for record in records.first(10)]
    for wanted, option in ((image_keys, "image_key"), (caption_keys, "caption_key")):
        if option in needed and first and not any(key in example for example in first for key in wanted):
            raise InputError(
                f"{records.where(0)} and the next have no feature {' or '.join(wanted)}; the features are: "
                f"{', '.join(sorted(first[0]))}; set config.data.{option}"
            )
    lengths = {len(example["tokens"].int64_list.value) if "tokens" in example else 0 for example in first}
    tokens = lengths.pop() if len(lengths) == 1 else 0  # used only if all have the same length
    one = tf.io.FixedLenFeature((), tf.string, "")
    many = functools.partial(tf.io.FixedLenSequenceFeature, (), allow_missing=True)
    features = dict.fromkeys(image_keys, one) | dict.fromkeys(caption_keys, many(tf.string))
    if tokens:
        features["tokens"] = many(tf.int64)

    def read(row, *given):
        parsed = tf.io.parse_single_example(records.read(row, *given), features)
        sample = {"image": _first_with_bytes([parsed[key] for key in image_keys])}
        sample["caption"] = _first_with_bytes([parsed[key] for key in caption_keys])
        if tokens:
            require(tf.size(parsed["tokens"]) == tokens, f"it has not {tokens} tokens, as the first records have")
            sample["tokens"] = tf.ensure_shape(tf.cast(parsed["tokens"], tf.int32), (tokens,))
        return sample

    return Source(
        records.size,
        read,
        records.where,
        captions=lambda: (),
        lost=records.lost,
        index=records.index,
        digest=records.digest,
        ahead=records.ahead,
        blocks=records.blocks,
        together=records.together,
    )


def kind() -> Kind:
    """The index of TFRecord shards."""
    return Kind("tfrecord", 1, _FRAME, "<i8", _scan)


def open_records(
    paths: list[str],
    cache_dir: str | None = None,
    part: Callable | None = None,
    peers: Peers | None = None,
    spec: Mapping[str, Any] = {},
) -> Records:
    """Opens TFRecord files of any content by record number.

    Args:
      part: OffsetIndex -> int64 numbers of the records to use; None: all.
      spec: shuffle, block_rows, window_mb of config.data, for all records.

    Raises:
      InputError: a compressed file, or no record in any file.
    """
    index = offset_index(kind(), paths, cache_dir, peers)
    rows_N = part(index) if part else None
    size = index.size if rows_N is None else len(rows_N)
    if not size:
        more = f", nor have the other {len(paths) - 1} files" if len(paths) > 1 else ""
        raise InputError(f"{paths[0]} has no TFRecords{more}")
    return _Reader(index, rows_N, spec).records(size)


class _Reader:
    """Reads records by row: all of an index, or those of `rows_N`."""

    def __init__(self, index: OffsetIndex, rows_N: np.ndarray | None, spec: Mapping[str, Any]):
        self._index, self._rows_N = index, rows_N
        self._paths_F, self._wanted_N = tf.constant(index.paths), None if rows_N is None else tf.constant(rows_N)
        self._held = shard_blocks(spec, index, self._range_of_block, index.reads)
        self._in_python = self._held is not None or any(map(storage.is_remote, index.paths))

    def records(self, size: int) -> Records:
        """`size` of them."""
        index = self._index
        return Records(
            size,
            self._read,
            self._where,
            tuple(index.lost),
            self._with_rows(index.arrays),
            ahead_of(index.paths, index.reads, self._start, index.far or self._held is not None),
            self._with_rows(index.digest),
            self._held.blocks if self._held else None,
            row_by_row(1, self._fetch_small, self._places) if self._in_python else None,
        )

    def _read(self, row, given=None):
        return given_or_alone(given, lambda given_1: given_1[0], lambda: self._alone(row))

    def _alone(self, row):
        file, begin_1, length_1 = self._index.in_graph(row if self._wanted_N is None else self._wanted_N[row])
        begin, length = begin_1[0], length_1[0]
        if self._in_python:
            return from_python(self._fetch, row, file, begin, length)
        # One read of exactly this record: a larger buffer would also fetch its neighbours.
        dataset = tf.raw_ops.TFRecordDatasetV2(
            filenames=[self._paths_F[file]],
            compression_type="",
            buffer_size=length + _FRAME,
            byte_offsets=[begin],
        )
        only = dict(output_types=[tf.string], output_shapes=[()])
        options = no_model()._to_proto().SerializeToString()
        dataset = tf.raw_ops.OptionsDataset(input_dataset=dataset, serialized_options=options, **only)
        dataset = tf.raw_ops.TakeDataset(input_dataset=dataset, count=1, **only)
        return tf.raw_ops.DatasetToSingleElement(dataset=dataset, **only)[0]

    def _fetch(self, row, file, begin, length):
        """The record, in Python."""
        place = self._index.paths[file], int(begin), int(begin + length) + _FRAME
        frame = self._held.take(row, *place) if self._held else self._index.reads.take(*place)
        record = frame[12:-4]
        if struct.unpack_from("<I", frame, len(frame) - 4)[0] != _masked(google_crc32c.value(record)):
            raise InputError("the record does not match its checksum")
        return record

    def _fetch_small(self, *place):
        require_small(place[-1])
        return [self._fetch(*place)]

    def _places(self, rows):
        """Of each row, what _fetch takes."""
        file_R, records_Rx2 = self._index.of_rows(self._in_index(rows))
        return zip(rows.tolist(), file_R.tolist(), *records_Rx2.T.tolist(), strict=True)

    def _start(self, rows):
        for _, file, begin, length in self._places(rows):
            self._index.reads.start(self._index.paths[file], begin, begin + length + _FRAME)

    def _range_of_block(self, rows):
        """(first byte, end) of neighbouring rows of one file."""
        _, records_Rx2 = self._index.of_rows(rows)
        return int(records_Rx2[0, 0]), int(records_Rx2[-1].sum()) + _FRAME

    def _where(self, row):
        row, index = self._in_index(row), self._index
        file = index.file_of(row)
        return f"{index.paths[file]} record {row - index.starts[file]} (byte {index.of_rows([row])[1][0, 0]})"

    def _with_rows(self, arrays):
        return lambda: arrays() + ([] if self._rows_N is None else [self._rows_N])

    def _in_index(self, rows):
        return rows if self._rows_N is None else self._rows_N[rows]


def _first_with_bytes(candidates):
    """The first of several strings, or lists of strings, that is not empty; otherwise an empty one."""
    chosen = candidates[-1]
    for candidate in candidates[-2::-1]:
        chosen = tf.cond(tf.reduce_any(tf.strings.length(candidate) > 0), lambda c=candidate: c, lambda c=chosen: c)
    return chosen


def _scan(data: Bytes, size: int, path: str) -> Scan:
    if data[0:2] == b"\x1f\x8b":
        raise InputError(f"{path} is compressed, so its records cannot be read by number; decompress it first")
    begins, heads, at = [], [], 0
    while at + _FRAME <= size:
        begins.append(at)
        heads.append(bytes(data[at : at + 12]))
        if not any(heads[-1]):  # zeros, as a crash leaves them by the gigabyte: no length has such a checksum
            break
        at += _FRAME + struct.unpack_from("<Q", heads[-1])[0]
    head_Nx12 = np.frombuffer(b"".join(heads), np.uint8).reshape(-1, 12)
    stored = head_Nx12[:, 8:].copy().view("<u4")[:, 0]
    wrong = np.flatnonzero(stored != _masked_crc32c(head_Nx12[:, :8]))
    lost: tuple[Lost, ...] = ()
    if len(wrong):  # everything found after it is at wrong offsets
        at = begins[wrong[0]]
        begins, head_Nx12 = begins[: wrong[0]], head_Nx12[: wrong[0]]
        reason = f"the checksum of a record's length is wrong at byte {at}; the {size - at:,} bytes from there are lost"
        lost = (Lost(path, reason, max(1, round((size - at) * len(begins) / at)) if at else 1),)
    elif at != size:
        if at > size:  # the last record is longer than what is left
            at, head_Nx12 = begins.pop(), head_Nx12[:-1]
        lost = (Lost(path, f"truncated inside the record at byte {at}; it and everything after it are lost", 1),)
    return Scan(np.array(begins, np.int64), head_Nx12[:, :8].copy().view("<i8").reshape(-1), lost)


def _crc_table():
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, np.uint32(0x82F63B78) ^ (table >> 1), table >> 1).astype(np.uint32)
    return table


_CRC_TABLE = _crc_table()


def _masked_crc32c(bytes_NxK: np.ndarray) -> np.ndarray:
    """TFRecord's checksum (CRC-32C, rotated and offset) of each row of bytes, uint32 (N,)."""
    crc = np.full(len(bytes_NxK), 0xFFFFFFFF, np.uint32)
    for column in bytes_NxK.T:
        crc = _CRC_TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    return _masked(~crc)


def _masked(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
