"""What `prepare` leaves out on request: --min-score, pairs of too low a cosine, and --dedup, repeated pictures."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from input_pipeline.duplicates import Look, Looks, look
from input_pipeline.rows import Row, by_threads, read_rows
from input_pipeline.sources import Source
from input_pipeline.sources.paths import expand
from input_pipeline.sources.source import keys
from rankclip_jax.common import files, storage, tables
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.foreign_files import refuse_inflating
from rankclip_jax.common.pictures import BadImageError
from rankclip_jax.common.progress import progress

FILE = "left_out.npz"  # in prepare's OUT_DIR, so that a second start need not look at all pictures again
DEDUP = ("exact", "near")
_AT_ONCE, _COMPARED = 100_000, 16
_COLUMNS = "row", "name", "cosine"  # of embed's files


@dataclasses.dataclass(frozen=True)
class Scores:
    """Attributes: file: of embed; least: cosine; cosines: float32 (rows of the source,), NaN without one."""

    file: str
    least: float
    cosines: np.ndarray


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Attributes: codes: uint8 (rows,), 0 or 1 + the number of the reason; reasons: in words."""

    codes: np.ndarray
    reasons: tuple[str, ...]

    def kept(self, rows: range) -> np.ndarray:
        """The numbers of those of `rows` that stay."""
        return np.flatnonzero(self.codes[rows.start : rows.stop] == 0) + rows.start

    def counts(self, rows: Sequence[int] | np.ndarray) -> dict[str, int]:
        """Reason -> how many of `rows`."""
        if isinstance(rows, range):
            rows = np.arange(rows.start, rows.stop, rows.step)
        counts = np.bincount(self.codes[rows], minlength=len(self.reasons) + 1)[1:].tolist()
        return {reason: count for reason, count in zip(self.reasons, counts, strict=True) if count}

    def reason(self, row: int) -> str | None:
        return self.reasons[self.codes[row] - 1] if self.codes[row] else None


@dataclasses.dataclass(frozen=True)
class Filter:
    """Attributes: scores: None: none are asked for; dedup: None, "exact" or "near"."""

    scores: Scores | None
    dedup: str | None

    def settings(self) -> dict[str, Any]:
        """What determines which rows are left out, for the manifest."""
        found: dict[str, Any] = {"dedup": self.dedup} if self.dedup else {}
        if self.scores:
            digest = hashlib.sha256(self.scores.cosines.tobytes()).hexdigest()
            found |= {"min_score": self.scores.least, "scores": digest}
        return found

    def left_out(self, source: Source, rows: range, workers: int) -> LeftOut:
        """Decides about `rows`; pictures are looked at by `workers` threads. Of repeated ones the first stays."""
        codes, reasons = np.zeros(source.size, np.uint8), []
        if self.scores:
            reasons = [f"no score in {self.scores.file}", f"cosine below {self.scores.least:g}"]
            codes[np.isnan(self.scores.cosines)] = 1
            codes[self.scores.cosines < self.scores.least] = 2
        if self.dedup:
            numbers = np.arange(rows.start, rows.stop, rows.step)
            looks = _looks(source, numbers[codes[numbers] == 0], workers)
            ways = ("the same picture came before", looks.copies), ("looks like one that came before", looks.alike)
            for name, find in ways[: DEDUP.index(self.dedup) + 1]:
                reasons.append(name)
                codes[find()] = len(reasons)
        return LeftOut(codes, tuple(reasons))

    def stored(self, source: Source, folder: Path, workers: int) -> LeftOut:
        """`left_out` of all rows; kept in `folder`, for the next start, where pictures had to be looked at."""
        path = folder / FILE
        if self.dedup and path.exists():
            try:
                refuse_inflating(path)
                with np.load(path, allow_pickle=False) as arrays:
                    found = LeftOut(arrays["codes"], tuple(arrays["reasons"].tolist()))
                if found.codes.shape == (source.size,) and found.codes.max(initial=0) <= len(found.reasons):
                    return found
            except Exception:  # whatever NumPy raises on a damaged file
                pass
        found = self.left_out(source, range(source.size), workers)
        if self.dedup:
            with files.whole(path) as part, open(part, "wb") as out:
                np.savez(out, codes=found.codes, reasons=np.array(found.reasons))
        return found


def _looks(source: Source, numbers: np.ndarray, workers: int) -> Looks:
    looks = Looks(source.size)

    def of(row: Row) -> tuple[int, Look | None]:
        try:
            return row.number, look(row.image) if row.reason is None else None
        except BadImageError:  # prepare will say so
            return row.number, None

    with ThreadPoolExecutor(workers) as pool, progress("compare", len(numbers)) as bar:
        for begin in range(0, len(numbers), _AT_ONCE):
            for found in by_threads(pool, of, read_rows(source, numbers[begin : begin + _AT_ONCE]), workers):
                for number, one in found:
                    if one:
                        looks.add(number, one)
                bar.update(len(found))
    return looks


def parsed(given: str) -> tuple[str, float]:
    """FILE:COSINE. Raises ValueError."""
    file, _, least = given.rpartition(":")
    if not file or not math.isfinite(float(least)) or abs(float(least)) > 1:
        raise ValueError
    return file, float(least)


def scores(file: str, least: float, source: Source, data: ConfigDict, most_without: float) -> Scores:
    """The cosines that embed wrote of the source's rows.

    Args:
      data: the source's config.data.
      most_without: the largest share of rows without a cosine.

    Raises:
      InputError: not a file of embed, or one without cosines, of another set, with too few of them, with a number that
        is not a cosine, or with none as large as `least`.
    """
    if storage.is_remote(file):
        raise InputError(f"--min-score {file}: copy it to this machine, and give its path")
    path = Path(os.path.expanduser(file))
    rows_S, names_S, cosines_S, size = _read(path)
    numbers_N, count = _numbers(source, data)
    if size != count:
        raise InputError(f"{path} has scores of {size:,} images, but {data.train} has {count:,}: embed it again")
    if np.nanmax(np.abs(cosines_S), initial=0) > 1.001:
        worst = int(np.nanargmax(np.abs(cosines_S)))
        raise InputError(f"{path}: the score of {names_S[worst]} is {cosines_S[worst]:g}, which is not a cosine")
    all_S, place_S = np.full(size, np.nan, np.float32), np.full(size, -1, np.int64)
    all_S[rows_S], place_S[rows_S] = cosines_S, np.arange(len(rows_S))
    scored = np.flatnonzero(place_S[numbers_N] >= 0)
    for row in scored[:: max(1, len(scored) // _COMPARED)].tolist():
        name, where = names_S[int(place_S[numbers_N[row]])], source.where(row)
        where = os.fsencode(where).decode("utf-8", "backslashreplace")
        if where.rpartition("/")[2].rpartition(": ")[2] != name.rpartition("/")[2].rpartition(": ")[2]:
            raise InputError(f"{path} has scores of another set: {name} where {data.train} has {where}")
    cosines = all_S[numbers_N]
    without = int(np.isnan(cosines).sum())
    if without > most_without * len(cosines) or without == len(cosines):
        raise InputError(
            f"{path} has no score for {without:,} of the {len(cosines):,} rows of {data.train}, more than "
            f"config.data.max_bad_fraction = {most_without}: was it embedded with these captions (--caption-key)?"
        )
    if not np.nanmax(cosines) >= least:
        raise InputError(
            f"--min-score {file}:{least:g} leaves nothing: the cosines are at most {np.nanmax(cosines):.3g}, "
            f"half of them at most {np.nanmedian(cosines):.3g}"
        )
    return Scores(path.name, least, cosines)


def _read(path: Path) -> tuple[np.ndarray, Any, np.ndarray, int]:
    """(rows, names, cosines, images of the collection) in a file of embed, or a folder of Parquet; float32 cosines."""
    try:
        found, about, lost = _of_npz(path) if path.suffix == ".npz" else _of_parquet(path)
        size, rows, names = int(about["size"]), found["row"], found["name"]
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except Exception as error:  # whatever NumPy and pyarrow raise
        raise InputError(f"{path} is not a file of rankclip_jax.embed ({one_line(error, kind=True)})") from None
    if "cosine" not in found:
        raise InputError(f"{path} has no cosines: its collection has no captions, or it is older; embed it again")
    cosines = found["cosine"]
    whole = rows.dtype == np.int64 and rows.shape == names.shape == cosines.shape and cosines.dtype == np.float32
    if not whole or ((rows < 0) | (rows >= size)).any() or len(np.unique(rows)) < len(rows):
        raise InputError(f"{path} is not a file of rankclip_jax.embed (its columns do not fit together)")
    if lost is not None and len(rows) + lost != size:
        raise InputError(
            f"{path} has {len(rows) + lost:,} of its collection's {size:,} images: shards are missing; run the same "
            "embed command again"
        )
    return rows, names, cosines, size


def _of_npz(path: Path) -> tuple[dict[str, np.ndarray], dict, None]:
    refuse_inflating(path)
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in _COLUMNS if key in arrays}, json.loads(str(arrays["about"])), None


def _of_parquet(path: Path) -> tuple[dict[str, np.ndarray], dict, int | None]:
    """(columns, metadata; of a folder, how many images its shards say they leave out)"""
    shards = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not shards:
        raise ValueError("no .parquet is in it")
    footers = [pq.read_metadata(shard) for shard in shards]
    there = [key for key in _COLUMNS if key in footers[0].schema.to_arrow_schema().names]
    table = pa.concat_tables([pq.read_table(shard, columns=there) for shard in shards])
    said = [footer.metadata or {} for footer in footers]
    lost = sum(len(json.loads(one.get(b"rankclip_jax_bad", b"[]"))) for one in said) if path.is_dir() else None
    return {key: table[key].to_numpy() for key in there}, json.loads(said[0][b"rankclip_jax"]), lost


def _numbers(source: Source, data: ConfigDict) -> tuple[np.ndarray, int]:
    """(embed's number of each row of the source, the number of images that embed found there).

    They differ in tables, where embed counts images without a caption too.
    """
    if data.format in ("folder", "tfrecord", "webdataset", "parquet"):
        return np.arange(source.size), source.size
    paths = expand(data.train, endings=tables.ENDINGS) if data.format == "csv" else []
    if len(paths) != 1:
        raise InputError(f"--min-score needs what embed opens: a folder, one table, or shards; not {data.train}")
    image_keys = keys(data.get("image_key"), tables.IMAGE_KEYS)
    content = storage.read(paths[0]) if storage.is_remote(paths[0]) else None
    images_N, pairs_N = (
        tables.read_table(
            paths[0], image_keys, texts, delimiter=data.delimiter or ",", encoding=data.encoding, data=content
        ).numbers
        for texts in (None, keys(data.get("caption_key"), tables.CAPTION_KEYS))
    )
    return np.searchsorted(images_N, pairs_N), len(images_N)
