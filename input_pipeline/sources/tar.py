"""WebDataset tars: members whose names are equal up to the first dot form a sample (00012.jpg, 00012.txt).

The headers of the tars are scanned once (tar_index.py). After that a sample is one range of bytes, read inside the
graph from local files (byte_ranges.py), otherwise by Python (together.py), as also from more local files than can be
mapped. `open_members` opens samples with any members:

  members = open_members(["test/0.tar"], {"image": ("jpg", "png", "webp"), "cls": ("cls",)})
  members.read(row)     ops: {"image": bytes, "cls": bytes}; a row without one of them is a bad row
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from input_pipeline.graph import from_python, require
from input_pipeline.sources import tar_headers as headers
from input_pipeline.sources import tar_index
from input_pipeline.sources.byte_ranges import ahead_of, byte_ranges
from input_pipeline.sources.index_places import Kind
from input_pipeline.sources.mapping import may_map
from input_pipeline.sources.offset_index import Peers, offset_index
from input_pipeline.sources.offsets import OffsetIndex
from input_pipeline.sources.paths import expand
from input_pipeline.sources.shard_blocks import shard_blocks
from input_pipeline.sources.source import (
    Ahead,
    Blocks,
    Reading,
    Source,
    captions_in_json,
    decoded,
    keys,
)
from input_pipeline.sources.together import Together, given_or_alone, require_small, row_by_row
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import ENDINGS, MAX_FILE_MB

_CAPTIONS = "txt", "caption"  # extensions, in order of preference
_FAR = np.int64(np.iinfo(np.int64).max)  # begins after every member


@dataclasses.dataclass(frozen=True)
class Members:
    """Samples of tars by number.

    Attributes:
      index: where the members are, in the order of `wanted`.
      read: ops, row (int64 scalar), what `together` gave -> {name: bytes (string scalar)}.
      alone: names -> a Reading of these members only, without reading the others.
      ahead, blocks, together: as a Source's.
    """

    index: OffsetIndex
    read: Callable
    ahead: Ahead | None
    alone: Callable[[Sequence[str]], Reading]
    blocks: Blocks | None
    together: Together | None

    def where(self, row: int) -> str:
        """The location of a sample: file and key."""
        file = self.index.file_of(row)
        path, (record,) = self.index.paths[file], self.index.of_rows([row])[1]
        begins = [int(begin) for begin in record[: len(record) // 2] if begin >= headers.BLOCK]
        names = tar_index.names_before(path, begins)
        found = [names.get(begin, "unknown: the tar has changed") for begin in begins]
        common = os.path.commonprefix(found)  # noqa: RUF071 (of letters)
        return f"{path} key {common.rpartition('.')[0] or found[0]}"


def open_webdataset(
    spec: ConfigDict, path: str | Sequence[str], captions: bool = True, peers: Peers | None = None
) -> Source:
    """Opens tars of images and captions. `spec`: image_key, caption_key, hint, cache_dir of config.data.

    A caption may be compressed (txt.gz). caption_key=json:caption is the field `caption` of the .json members, which
    may hold several captions. captions=False: no sample needs one, and `read` gives the image alone.

    Raises:
      InputError: no tar, a compressed tar, or no sample with an image or a caption under these keys.
    """
    caption_keys = keys(spec.get("caption_key"), _CAPTIONS)
    endings, fields = zip(*(key.partition(":")[::2] for key in caption_keys), strict=True)
    if "json" in endings and not all(fields):
        raise InputError(
            f"config.data.caption_key={','.join(caption_keys)} names the .json members, but not the caption's field in "
            "them. Expected for example json:caption"
        )
    wanted = _wanted(spec.get("image_key"), endings)
    paths = expand(path, endings=(".tar",), hint=spec.get("hint"))
    may_lack = () if captions else ("caption",)
    members = open_members(paths, wanted, spec.get("cache_dir"), may_lack=may_lack, peers=peers, spec=spec)

    def with_caption(members_read):
        def read(row, *given):
            sample = members_read(row, *given)
            text = _gunzipped(sample["caption"])
            caption = captions_in_json(text, fields[0]) if fields[0] else decoded(text, spec.get("encoding"))
            return sample | {"caption": caption}

        return read

    index, text = members.index, members.alone(["caption"])
    pictures = Reading(with_caption(members.read), members.ahead) if captions else members.alone(["image"])
    return Source(
        index.size,
        pictures.read,
        members.where,
        captions=lambda: (),
        lost=tuple(index.lost),
        index=index.arrays,
        digest=index.digest,
        ahead=pictures.ahead,
        text=Reading(with_caption(text.read), text.ahead),
        blocks=members.blocks,
        together=members.together if captions else None,
    )


def usual_kind() -> Kind:
    """The index of tars of images and captions under the usual keys."""
    return tar_index.kind(_wanted(None, _CAPTIONS), ())


def _wanted(image_key, endings):
    images = keys(image_key, tuple(ending[1:] for ending in ENDINGS))
    return {"image": images, "caption": (*endings, *(f"{ending}.gz" for ending in endings))}


def open_members(
    paths: list[str],
    wanted: Mapping[str, tuple[str, ...]],
    cache_dir: str | None = None,
    optional: tuple[str, ...] = (),
    may_lack: tuple[str, ...] = (),
    peers: Peers | None = None,
    spec: Mapping[str, Any] = {},
) -> Members:
    """Opens tars by the numbers of their samples.

    Args:
      wanted: name -> lower-case extensions after the first dot of a member's name; the first that a sample has is used.
      optional: names that a sample may lack; it then has empty bytes.
      may_lack: the same of names by which samples are paired all the same.
      peers: of a run of many processes.
      spec: shuffle, block_rows, window_mb and max_file_mb of config.data; a larger member is a bad sample.

    Raises:
      InputError: a compressed tar, or no sample with a member of one of the extensions.
    """
    index = offset_index(tar_index.kind(wanted, optional), paths, cache_dir, peers)
    if not index.size and index.lost:
        raise InputError(f"{index.lost[0].where} has no sample: {index.lost[0].reason}")
    lackable = (*optional, *may_lack)
    for i, name in enumerate(wanted):
        if name not in lackable and not index.some_row_has([i]):
            inside = "; a field of .json members is config.data.caption_key=json:FIELD" if name == "caption" else ""
            raise InputError(f"{paths[0]}: no sample has {_named(name)} that ends in {_dotted(wanted[name])}{inside}")
    required = [i for i, name in enumerate(wanted) if name not in lackable]
    if index.size and not index.some_row_has(required):
        kinds = " and ".join(f"{_named(name)} ({_dotted(wanted[name])})" for name in wanted if name not in lackable)
        raise InputError(f"{paths[0]}: no sample has both {kinds} under one name")
    reader = _Reader(index, wanted, required, spec)
    return Members(index, reader.read, reader.all.ahead, reader.alone, reader.blocks, reader.together)


class _Reader:
    """The M members of samples, in the order of `wanted`. They are adjacent, so a sample is one range of bytes."""

    def __init__(
        self, index: OffsetIndex, wanted: Mapping[str, tuple[str, ...]], required: list[int], spec: Mapping[str, Any]
    ):
        """`required`: the numbers of the members that no sample may lack."""
        self._index, self._wanted, self._required = index, wanted, required
        self._most = min((spec.get("max_file_mb") or MAX_FILE_MB) * 1_000_000, tar_index.LARGEST - 1)
        self._held = shard_blocks(spec, index, self._range_of_block, index.reads)
        in_python = self._held is not None or any(map(storage.is_remote, index.paths)) or not may_map(len(index.paths))
        self._slice_of = None if in_python else byte_ranges(index.paths)
        self.blocks = self._held.blocks if self._held else None
        self.together = row_by_row(len(wanted), self._take_members, self._places) if in_python else None
        self.all = self.alone(list(wanted))

    def read(self, row: tf.Tensor, given: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        """As Members.read."""
        by_name = lambda given_M: dict(zip(self._wanted, tf.unstack(given_M, len(self._wanted)), strict=True))  # noqa: E731
        return given_or_alone(given, by_name, lambda: self.all.read(row))

    def alone(self, names: Sequence[str]) -> Reading:
        """As Members.alone."""
        columns = [list(self._wanted).index(name) for name in names]

        def start(rows):
            for file, first, end, _ in self._ranges(rows, columns):
                if first < end:
                    self._index.reads.start(self._index.paths[file], first, end)

        far = self._index.far or self._held is not None
        ahead = ahead_of(self._index.paths, self._index.reads, start, far)
        return Reading(lambda row: self._read(row, names, columns), ahead)

    def _read(self, row, names, columns):
        """Ops: {name: bytes} of these members alone, which are the `columns` of all."""
        file, begin_M, length_M = self._index.in_graph(row)
        for i, (name, endings) in enumerate(self._wanted.items()):
            if i in self._required:
                elsewhere = f"the {name} is a link in the tar, or sparse; write it with tar -h --hard-dereference"
                require(length_M[i] != headers.ELSEWHERE, elsewhere)
                require(length_M[i] >= 0, f"no {name}: no member ends in {_dotted(endings)}")
            too_large = f"has more than {self._most // 1_000_000:,} MB (config.data.max_file_mb)"
            require(length_M[i] <= self._most, f"the {name} {too_large}")
        length_M = tf.where(length_M <= self._most, length_M, 0)  # the read may come before the assertion
        if len(columns) < len(self._wanted):
            begin_M, length_M = tf.gather(begin_M, columns), tf.gather(length_M, columns)
        end = tf.maximum(tf.reduce_max(begin_M + length_M), 0)
        first = tf.minimum(tf.reduce_min(tf.where(begin_M < 0, _FAR, begin_M)), end)  # the end where there is none
        if self._slice_of:
            span = self._slice_of(file, first, end - first)
        else:
            span = from_python(self._take, row, file, first, end)
        begin_M, length_M = tf.maximum(begin_M - first, 0), tf.maximum(length_M, 0)
        return {name: tf.strings.substr(span, begin_M[i], length_M[i]) for i, name in enumerate(names)}

    def _take(self, row, file, begin, end):
        """The bytes of a range, in Python: of a block that is held, or else of a read of their own."""
        place = self._index.paths[file], int(begin), int(end)
        return self._held.take(row, *place) if self._held else self._index.reads.take(*place)

    def _take_members(self, row, file, first, end, record):
        """The bytes of each member, in Python."""
        begins, lengths = record[: len(self._wanted)], record[len(self._wanted) :]
        require_small(max(*lengths, end - first))
        if any(lengths[i] < 0 for i in self._required):
            raise InputError("a member is missing")
        data = self._take(row, file, first, end)
        return [data[b - first : b - first + n] if n > 0 else b"" for b, n in zip(begins, lengths, strict=True)]

    def _ranges(self, rows, columns):
        """[(file, first byte, end, record)] of each row, with the members in these columns."""
        file_R, records_RxK = self._index.of_rows(rows)
        begin_RxM, length_RxM = (half[:, columns] for half in np.split(records_RxK, 2, axis=1))
        first_R = np.where(begin_RxM < 0, _FAR, begin_RxM).min(axis=1)
        end_R = (begin_RxM + np.where(length_RxM <= self._most, length_RxM, 0)).max(axis=1)
        return list(zip(*(of_R.tolist() for of_R in (file_R, first_R, end_R, records_RxK)), strict=True))

    def _places(self, rows):
        """Of each row, what _take_members takes."""
        ranges = self._ranges(rows, range(len(self._wanted)))
        return ((row, *place) for row, place in zip(rows.tolist(), ranges, strict=True))

    def _range_of_block(self, rows):
        """(first byte, end) of neighbouring rows of one file."""
        _, firsts, ends, _ = zip(*self._ranges(rows, range(len(self._wanted))), strict=True)
        return min(firsts), max(ends)


def _named(kind):
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _dotted(endings):
    return " or ".join(f".{ending}" for ending in endings)


def _gunzipped(text):
    return tf.cond(
        tf.strings.substr(text, 0, 2) == b"\x1f\x8b",
        lambda: tf.io.decode_compressed(text, "GZIP"),
        lambda: text,
    )
