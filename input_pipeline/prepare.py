"""Converts a data set to TFRecord shards, or inspects it: python -m input_pipeline.prepare SOURCE OUT_DIR."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rankclip_jax.common import commands, files, storage, tasks

if __name__ == "__main__":
    commands.quiet_tensorflow()  # before its import

from input_pipeline import caption_lengths, filtering, shards, sources
from input_pipeline.inspection import inspect
from input_pipeline.manifest import Manifest
from input_pipeline.shard_tasks import Job, Options, Shard, Task, Worker, opened, too_many, write
from input_pipeline.sources import tfrecord
from input_pipeline.sources.fingerprint import fingerprint
from input_pipeline.sources.offset_index import Indexer
from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import at_work
from rankclip_jax.common.progress import progress
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config.guess import guess_format


def prepare(
    source: sources.Source,
    out_dir: Path,
    options: Options,
    described: dict,
    workers: int,
    run: Callable[[Iterator[Task]], Generator[Shard]] | None = None,
    wanted: filtering.Filter | None = None,
) -> Manifest:
    """Writes `source` to `out_dir` as 00000.tfrecord and so on, their index, manifest.json and bad_samples.jsonl.

    A record has img2dataset's keys: the image under jpg, png or webp; txt, key, width, height, original_width,
    original_height, sha256 (of the image's bytes), and tokens with a tokenizer. Finished shards that match the
    manifest are kept, so the same command resumes.

    Args:
      out_dir: local; or the copy of a folder in a bucket (storage.output), where the shards are written.
      described: other settings that must not change for a resumption, such as the source's path; kept in the manifest.
      workers: threads that decode and encode, both of which Pillow does outside Python's lock.
      run: tasks -> their results, in any order; None: one after the other, in this process.
      wanted: leaves out rows, good ones too; None: all good ones are written.

    Returns:
      The finished manifest.

    Raises:
      InputError: too many bad rows or no good one, files of others or shards of other settings in the folder, another
        start that is at work there, or a disk that is full or not writable.
    """
    _check_lost(source, options)
    others = (*(["tokenizer.json"] if options.tokenizer else []), *([filtering.FILE] if wanted else []))
    settings = described | _settings(source, options) | (wanted.settings() if wanted else {})
    files.make_folder(out_dir)
    with at_work(out_dir, "prepare", "give another OUT_DIR"):
        manifest = Manifest(out_dir, settings, others)
        left_out = wanted.stored(source, out_dir, workers) if wanted else None
        manifest.add_lost([{"row": None, "detail": "", **dataclasses.asdict(one)} for one in source.lost])
        if options.tokenizer:
            options.tokenizer.save(out_dir / "tokenizer.json")
        storage.push(out_dir)  # whose folder it is
        _write_missing(source, out_dir, options, manifest, left_out, workers, run)
        manifest.finish()
    if not any(shard["samples"] for shard in manifest.shards):
        listed = storage.join(storage.shown(out_dir), "bad_samples.jsonl")
        with open(out_dir / "bad_samples.jsonl", encoding="utf-8") as lines:
            example = next((bad for bad in map(json.loads, lines) if bad["row"] is not None), None)
        said = f"; for example {example['where']}: {example['reason']}" if example else ""
        raise InputError(f"none of the {manifest.rows:,} rows could be used{said}; {listed} has the reasons")
    return manifest


def _write_missing(source, out_dir, options, manifest, left_out, workers, run):
    """Writes the shards that are not finished, and their index; the manifest has each at once."""
    total, done = source.size, manifest.rows - manifest.left_out.total()
    total -= sum(left_out.counts(range(total)).values()) if left_out else 0
    where = storage.shown(out_dir)
    index = Indexer(tfrecord.kind(), where, [shard["name"] for shard in manifest.shards if shard["samples"]])
    missing = _missing(source, options, manifest, left_out)
    with ThreadPoolExecutor(workers) as pool, progress("prepare", total, unit="rows", done=done) as bar:
        job = Job(source, options, pool, workers, bar, rows=done, bad=manifest.bad.total())
        try:
            results = run(missing) if run else (write(job, where, task) for task in missing)
            with contextlib.closing(results):
                for entry, bad_samples, records in results:
                    if left_out:
                        entry["left_out"] = left_out.counts(range(*entry["rows"]))
                    manifest.add(entry, bad_samples)
                    if records:
                        if where == str(out_dir) and not (out_dir / entry["name"]).exists():
                            raise InputError(f"{out_dir} is not a folder that the workers share; give one, or a bucket")
                        index.add(entry["name"], records)
                    storage.push(out_dir, every=10)
                    if run:
                        bar.update(entry["samples"] + len(bad_samples))
                        _check_bad(manifest, options, bad_samples)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            manifest.remove_parts()
            raise
        finally:
            index.close()


def _check_lost(source, options):
    """Raises InputError where more samples are unreachable than config.data.max_bad_fraction."""
    unreachable = sum(part.samples for part in source.lost)
    if unreachable > options.max_bad_fraction * (source.size + unreachable):
        raise InputError(f"more lost than config.data.max_bad_fraction = {options.max_bad_fraction};{lost(source)}")


def _missing(source, options, manifest, left_out):
    """Yields the tasks of the shards that are not finished."""
    finished = {shard["name"] for shard in manifest.shards}
    before = manifest.rows - manifest.left_out.total(), manifest.bad.total()
    for number, name in enumerate(shards.names(source.size, options.shard_size)):
        if name not in finished:
            rows = range(number * options.shard_size, min((number + 1) * options.shard_size, source.size))
            yield Task(number, rows, left_out.kept(rows) if left_out else rows, before)
            before = None


def _check_bad(manifest, options, bad_samples):
    """Raises InputError for too many bad rows in the finished shards before the first that is not."""
    rows, bad = manifest.so_far()
    if bad_samples and rows >= 100 and bad > options.max_bad_fraction * rows:
        raise too_many(bad, rows, options, bad_samples[-1])


def _settings(source, options):
    settings = {"rows": source.size, "fingerprint": fingerprint(source)}
    settings |= dataclasses.asdict(dataclasses.replace(options, tokenizer=None))
    del settings["max_bad_fraction"], settings["tokenizer"]  # the stopping rule does not affect the contents
    if options.tokenizer:
        text = json.dumps(options.tokenizer.to_dict(), sort_keys=True)
        settings["tokenizer"] = hashlib.sha256(text.encode()).hexdigest()
    return settings


def lost(source: sources.Source) -> str:
    """Describes the unreachable samples of the source, which have no row."""
    return ";".join(f" {line}" for line in sources.told(source.lost))


def summary(manifest: Manifest, out_dir: str) -> str:
    """Describes the result, and how to train on it."""
    samples, size = (sum(shard[key] for shard in manifest.shards) for key in ("samples", "bytes"))
    written = sum(shard["samples"] > 0 for shard in manifest.shards)
    lines = [f"{samples:,} samples in {written:,} shards, {size / 1e6:,.1f} MB: {out_dir}"]
    if manifest.bad:
        lines.append(f"{manifest.bad.total():,} rows left out, listed in {storage.join(out_dir, 'bad_samples.jsonl')}:")
        lines += [f"{count:>10,}  {reason}" for reason, count in manifest.bad.most_common()]
    if manifest.left_out:
        lines.append(f"{manifest.left_out.total():,} rows left out by --min-score and --dedup:")
        lines += [f"{count:>10,}  {reason}" for reason, count in manifest.left_out.most_common()]
    lengths: Counter = Counter()
    for shard in manifest.shards:  # read again from JSON, whose keys are strings; older manifests have none
        lengths.update({int(length): count for length, count in shard.get("lengths", {}).items()})
    if lengths:
        unit = "tokens" if "tokenizer" in manifest.settings else "words"
        lines += caption_lengths.histogram(lengths, unit)
        if unit == "tokens":
            lines.append(caption_lengths.packed(lengths, manifest.settings["context_length"]))
    train = ["--config.data.format=tfrecord", f"--config.data.train={out_dir}"]
    if "tokenizer" in manifest.settings:
        train.append(f"--config.tokenizer.path={storage.join(out_dir, 'tokenizer.json')}")
        train.append(f"--config.model.context_length={manifest.settings['context_length']}")
    return "\n".join([*lines, f"train with: {shlex.join(train)}"])


def _flags():
    parser = argparse.ArgumentParser(
        prog=commands.prog("input_pipeline.prepare"),
        description="Converts a data set to TFRecord shards. The same command resumes a stopped run.",
        epilog="Set keys of the source as in training, for example --config.data.image_key=filepath.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="as config.data.train: a path, glob or {a..b} range")
    parser.add_argument("out_dir", metavar="OUT_DIR", nargs="?", help="folder for the shards: local, gs:// or s3://")
    parser.add_argument("--format", help="of the source, as config.data.format; default: inferred from SOURCE")
    parser.add_argument("--inspect", action="store_true", help="print statistics of SOURCE, draw examples into OUT_DIR")
    parser.add_argument("--sample", type=int, help="with --inspect: the most rows to inspect, evenly spaced")
    parser.add_argument("--short-side", type=int, help="shrink larger images to this many pixels, as JPEG; 288 for 224")
    parser.add_argument("--quality", type=int, default=95, help="of written JPEGs (95)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="rows per shard (10000)")
    parser.add_argument("--tokenizer", help="also store the captions' ids: tokenizer.json or hub id")
    parser.add_argument("--context-length", type=int, default=77, help="ids per caption (77)")
    parser.add_argument("--min-score", metavar="FILE:COSINE", help="leave out pairs below a cosine in a file of embed")
    parser.add_argument("--dedup", choices=filtering.DEDUP, help="leave out repeated pictures: same bytes, or alike")
    parser.add_argument("--threads", type=int, help="threads of each process that writes (its share of the cores)")
    by = parser.add_mutually_exclusive_group()
    by.add_argument("--workers", type=int, help="processes that write shards (one per 8 cores)")
    by.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=tasks.RAY_HELP)
    return parser


def _check(parser, flags):
    if flags.out_dir is None and not flags.inspect:
        parser.error("OUT_DIR is missing")
    for name in ("sample", "short_side", "shard_size", "context_length", "workers", "threads"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    try:
        flags.min_score = flags.min_score and filtering.parsed(flags.min_score)
    except ValueError:
        parser.error(f"--min-score {flags.min_score}: expected FILE:COSINE, such as scores.parquet:0.28")
    if not 1 <= flags.quality <= 100:
        parser.error(f"--quality must be 1 to 100; got {flags.quality}")


def main() -> None:
    """Exit codes: common/commands.py."""
    parser = _flags()
    flags, rest = parser.parse_known_args()
    for flag in rest:
        if not flag.startswith("--config.data."):
            parser.error(f"unknown flag {flag}")
    _check(parser, flags)
    workers = flags.workers or max(1, tasks.cores() // 8)
    threads = flags.threads or max(1, tasks.cores() // workers)
    with (
        commands.exit_codes("stopped; the same command resumes after the finished shards"),
        storage.output(flags.out_dir or ".", "prepare") as out_dir,
    ):
        kind = flags.format or guess_format(flags.source)
        # What is there is that, also where its name reads as a number or a list.
        train = repr(flags.source) if os.path.exists(os.path.expanduser(flags.source)) else flags.source
        overrides = [f"data.train={train}", *(flag.removeprefix("--config.") for flag in rest)]
        data = configs.complete(configs.override({"data": {"format": kind}}, overrides)).data
        source = opened(data.to_json(), flags.short_side)
        tokenizer = Tokenizer.load(flags.tokenizer) if flags.tokenizer else None
        wanted = None
        if flags.min_score or flags.dedup:
            scores = None
            if flags.min_score:
                file, least = flags.min_score
                scores = filtering.scores(file, least, source, data, data.max_bad_fraction)
            wanted = filtering.Filter(scores, flags.dedup)
        if flags.inspect:
            length = flags.context_length
            inspect(source, flags.source, out_dir, tokenizer, flags.sample, threads, length, wanted)
            return
        options = Options(
            flags.shard_size, flags.short_side, flags.quality, tokenizer, flags.context_length, data.max_bad_fraction
        )
        described = {"source": flags.source, "format": kind, "keys": rest}
        worker = Worker(data.to_json(), source.size, options, storage.shown(out_dir))
        run = None
        if flags.ray is not None:
            run = functools.partial(tasks.run_by_ray, worker, address=flags.ray, threads=flags.threads)
        elif workers > 1:
            run = functools.partial(tasks.run, worker, workers=workers, threads=threads)
        print(summary(prepare(source, out_dir, options, described, threads, run, wanted), storage.shown(out_dir)))
        if source.lost:
            print(f"lost:{lost(source)}", file=sys.stderr)


if __name__ == "__main__":
    main()
