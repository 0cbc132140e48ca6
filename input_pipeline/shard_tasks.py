"""The task of prepare: one shard. The same on every worker: this process, others of this machine, or Ray's."""

import dataclasses
import functools
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageFile
from tqdm import tqdm

from input_pipeline import shards, sources
from input_pipeline.encode import encode
from input_pipeline.rows import by_threads, read_rows
from input_pipeline.sources.offset_index import Scanned
from rankclip_jax.common import packing, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import BadImageError
from rankclip_jax.common.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that determine the contents of the shards; all shards of a folder have the same options.

    Attributes:
      shard_size: rows per shard, including bad ones.
      short_side: pixels; images with a longer short side are shrunk to it. None: sizes are kept.
      quality: of written JPEGs.
      tokenizer: writes each caption's ids under `tokens`; None: no ids.
      context_length: ids per caption.
      max_bad_fraction: stop at a larger share of bad rows, from 100 rows on.
    """

    shard_size: int = 10_000
    short_side: int | None = None
    quality: int = 95
    tokenizer: Tokenizer | None = None
    context_length: int = 77
    max_bad_fraction: float = 0.1


class Task(NamedTuple):
    """A shard to write.

    Attributes:
      number: of the shard.
      span: its rows of the source.
      rows: those of them that are wanted.
      before: (rows, bad ones) of the shards before it; None: not known yet, so that only the whole can be judged.
    """

    number: int
    span: range
    rows: range | np.ndarray
    before: tuple[int, int] | None


class Shard(NamedTuple):
    """A finished shard: its entry in the manifest, its bad samples, and the places of its records."""

    entry: dict
    bad_samples: list[dict]
    records: Scanned | None


def too_many(bad: int, rows: int, options: Options, example: dict) -> InputError:
    """The line for too many bad rows."""
    return InputError(
        f"{bad} of {rows} rows are unusable, more than config.data.max_bad_fraction = {options.max_bad_fraction}; "
        f"for example {example['where']}: {example['reason']}"
    )


class Job:
    """Yields the records of one shard after the other, and counts bad rows over all shards."""

    def __init__(
        self,
        source: sources.Source,
        options: Options,
        pool: ThreadPoolExecutor,
        workers: int,
        bar: tqdm,
        *,
        rows: int,
        bad: int,
    ):
        self._source, self._options, self._pool, self._workers = source, options, pool, workers
        self._bar, self._rows, self._bad = bar, rows, bad
        self.bad_samples: list[dict] = []  # of the shard last written
        self.lengths: Counter = Counter()  # of its captions: tokens, at most the context; without a tokenizer, words

    def records(self, shard: int, begin: int, numbers: range | np.ndarray) -> Iterator[bytes]:
        self.bad_samples, self.lengths = [], Counter()
        digits = len(str(self._options.shard_size - 1))
        for chunk in by_threads(self._pool, self._encode, read_rows(self._source, numbers), self._workers):
            good = [row for row in chunk if row.reason is None]
            tokens = self._tokens(good)
            for row, ids in zip(good, tokens, strict=True):
                yield _record(row, f"{shard:05d}{row.number - begin:0{digits}d}", ids)
            self._count(len(chunk), [row for row in chunk if row.reason is not None])

    def _encode(self, row):
        try:
            if row.reason is None:
                row.image = encode(row.image, short_side=self._options.short_side, quality=self._options.quality)
        except BadImageError as error:
            row.reason, row.detail = error.reason, error.detail
        return row

    def _tokens(self, rows):
        tokenizer = self._options.tokenizer
        if not tokenizer:
            self.lengths.update(len(caption.split()) for row in rows for caption in row.captions)
            return [None] * len(rows)
        for row in rows:
            if len(row.captions) > 1:
                where = self._source.where(row.number)
                raise InputError(f"{where} has several captions, but tokens are stored for only one; omit --tokenizer")
        tokens = tokenizer([row.captions[0] for row in rows], self._options.context_length)
        self.lengths.update(packing.lengths(tokens, tokenizer.eot_id).tolist())
        return tokens.tolist()

    def _count(self, rows, bad):
        for row in bad:
            where = self._source.where(row.number)
            sample = {"row": row.number, "where": where, "reason": row.reason, "detail": row.detail}
            self.bad_samples.append(sample)
        self._rows += rows
        self._bad += len(bad)
        self._bar.set_postfix_str(f"{self._bad:,} bad" if self._bad else "", refresh=False)
        self._bar.update(rows)
        if bad and self._rows >= 100 and self._bad > self._options.max_bad_fraction * self._rows:
            raise too_many(self._bad, self._rows, self._options, sample)


def _record(row, key, tokens):
    image = row.image
    features = {image.key: image.data, "txt": row.captions, "key": key, "sha256": image.sha256}
    features |= {name: getattr(image, name) for name in ("width", "height", "original_width", "original_height")}
    return shards.example(features | ({} if tokens is None else {"tokens": tokens}))


def write(job: Job, where: str, task: Task) -> Shard:
    """Writes a shard to the folder `where`, local or in a bucket."""
    name = shards.name(task.number)
    written, records = shards.put_shard(storage.join(where, name), job.records(task.number, task.span.start, task.rows))
    entry = {"name": name, "rows": [task.span.start, task.span.stop], **written, "lengths": dict(job.lengths)}
    return Shard(entry, job.bad_samples, records)


@dataclasses.dataclass(frozen=True)
class Worker:
    """What a worker needs to know, which may lie on another machine. It opens the source once.

    Attributes:
      data: config.data, as JSON, with the source's path in `train`.
      rows: of the source.
      where: the folder of the shards, which all workers can write.
    """

    data: str
    rows: int
    options: Options
    where: str

    def __call__(self, task: Task, threads: int) -> Shard:
        """Writes the shard."""
        source, options = _of_worker(self.data, self.rows, self.options.short_side), self.options
        if task.before is None:
            options = dataclasses.replace(options, max_bad_fraction=1.0)
        rows, bad = task.before or (0, 0)
        with ThreadPoolExecutor(threads) as pool:
            job = Job(source, options, pool, threads, tqdm(disable=True), rows=rows, bad=bad)
            return write(job, self.where, task)


def opened(data: str, short_side: int | None) -> sources.Source:
    """The source of a config.data in JSON. Raises InputError as sources.open_source."""
    spec = ConfigDict(json.loads(data))
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pictures.py has its own limit
    ImageFile.LOAD_TRUNCATED_IMAGES = spec.recover_truncated  # Pillow has only one setting per process
    return sources.open_source(spec, spec.train, image_side=short_side or 64)


@functools.lru_cache(maxsize=1)
def _of_worker(data, rows, short_side):
    source = opened(data, short_side)
    if source.size != rows:
        raise InputError(f"a worker finds {source.size} rows, not {rows}: every machine needs the same source")
    return source
