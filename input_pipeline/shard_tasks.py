"""The task of prepare: one shard. The same on every worker: this process, others of this machine, or Ray's."""

import dataclasses
import functools
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from PIL import Image, ImageFile
from tqdm import tqdm

from input_pipeline import shards, sources
from input_pipeline.sources.offset_index import Scanned
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError


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
    rows: Any
    before: tuple[int, int] | None


class Shard(NamedTuple):
    """A finished shard: its entry in the manifest, its bad samples, and the places of its records."""

    entry: dict
    bad_samples: list[dict]
    records: Scanned | None


def write(job: Any, where: str, task: Task) -> Shard:
    """Writes a shard to the folder `where`, local or in a bucket; `job`: a prepare.Job."""
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
      options: prepare.Options.
      where: the folder of the shards, which all workers can write.
    """

    data: str
    rows: int
    options: Any
    where: str

    def __call__(self, task: Task, threads: int) -> Shard:
        """Writes the shard."""
        from input_pipeline.prepare import Job  # which imports this file

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
