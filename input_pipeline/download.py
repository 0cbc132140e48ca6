"""A list of image URLs to WebDataset shards, by img2dataset: python -m input_pipeline.download URLS OUT_DIR."""

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from input_pipeline import download_stats, url_list
from rankclip_jax.common import commands, storage
from rankclip_jax.common.cache import user_cache
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import write_whole
from rankclip_jax.common.ownership import Owned, at_work
from rankclip_jax.common.progress import progress
from rankclip_jax.common.tasks import cores
from rankclip_jax.config.key import encoding

ENV = user_cache() / "rankclip_jax" / "img2dataset"
# img2dataset imports imghdr, which Python 3.13 removed.
INSTALL = "python3 -m venv {0} && {0}/bin/pip install 'img2dataset>=1.47,<2' standard-imghdr"


def find_python(env: Path | None) -> Path:
    """A Python that has img2dataset: that of the environment `env`; None: this one, or that in ENV.

    It depends on a hundred packages that training does not need (OpenCV, pandas, wandb). Raises InputError with the
    command that installs it.
    """
    if env is None and importlib.util.find_spec("img2dataset"):
        return Path(sys.executable)
    env = env or ENV
    python = env / "bin" / "python"
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('img2dataset') is None)"
    try:
        if subprocess.run([python, "-c", look], capture_output=True).returncode == 0:
            return python
    except OSError:
        pass
    raise InputError(f"no img2dataset in {env}; install it: {INSTALL.format(shlex.quote(str(env)))}")


def check_distributor(python: Path, distributor: str) -> None:
    """Raises InputError, with the command that installs it, where `python` has no such distributor."""
    look = [str(python), "-c", f"import {distributor}"]
    if distributor != "multiprocessing" and subprocess.run(look, capture_output=True).returncode:
        raise InputError(f"{python} has no {distributor}; install it: {python} -m pip install {distributor}")


def download(urls: Path, out_dir: Path, options: argparse.Namespace) -> tuple[Counter, int]:
    """Downloads the part of `urls` not yet in `out_dir`, as 00000.tar ..., each with its .parquet and _stats.json.

    Args:
      options: the flags of the command line.

    Returns:
      What `count` says of the whole folder, and the number of URLs.

    Raises:
      InputError: a bad list, a folder of another list or other options or with files of others, another start that is
        at work there, or img2dataset failed.
    """
    own = out_dir / "_download"  # a folder, because img2dataset takes every .json next to the shards for its own
    try:
        settings = _settings(urls, options)
        owned = Owned(out_dir, "download", alone="give a new OUT_DIR")
        _same_as_before(out_dir, own / "settings.json", settings)
        owned.claim(f"{own.name}/{name}" for name in ("settings.json", "urls.parquet", "img2dataset.log"))
        own.mkdir(exist_ok=True)
        with at_work(out_dir, "download", "give another OUT_DIR"):
            total = _download_missing(owned, own, urls, settings, options)
    except OSError as error:
        raise InputError(f"{error.filename or out_dir}: {error.strerror or error}") from None
    return download_stats.count(out_dir, total), total


def _download_missing(owned, own, urls, settings, options):
    """Downloads what is not there; returns the number of URLs."""
    columns = options.url_column, options.caption_column, options.encoding
    total, left_out = url_list.normalise(urls, own / "urls.parquet", *columns)
    write_whole(own / "settings.json", json.dumps(settings))
    shards = range(-(-total // options.shard_size))
    owned.claim(name for shard in shards for name in _names(shard))
    _remove_unfinished(owned, shards)
    print(f"{total:,} URLs" + (f"; {left_out:,} rows without a URL or a caption left out" if left_out else ""))
    if total:
        python = find_python(options.env)
        check_distributor(python, options.distributor)
        try:
            private = {"RANKCLIP_DOWNLOAD_PRIVATE": "1"} if options.private else {}
            _run(python, _arguments(owned.folder, own, options), private, owned.folder, own / "img2dataset.log", total)
        finally:
            _remove_unfinished(owned, shards)
    return total


def _settings(urls, options):
    """What determines the contents of the shards."""
    with open(urls, "rb") as file:
        settings = {"URLS": hashlib.file_digest(file, "sha256").hexdigest()}
    names = ("url_column", "caption_column", "encoding", "shard_size", "short_side", "quality")
    return settings | {"--" + name.replace("_", "-"): getattr(options, name) for name in names}


def _arguments(out_dir, own, options):
    """Of img2dataset.download."""
    return {
        "url_list": str(own / "urls.parquet"),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(out_dir),
        # Its TFRecord writer needs tensorflow_io, which TensorFlow 2.21 no longer has; `prepare` converts the tars.
        "output_format": "webdataset",
        "image_size": options.short_side,
        "resize_mode": "keep_ratio",  # the shorter side, nothing cut off
        "resize_only_if_bigger": True,
        "skip_reencode": True,  # a JPEG that is small enough keeps its bytes
        "encode_quality": options.quality,
        "number_sample_per_shard": options.shard_size,
        "processes_count": options.processes,
        "distributor": options.distributor,
        "thread_count": options.threads,
        "timeout": options.timeout,
        "retries": options.retries,
        "extract_exif": False,
        "incremental_mode": "incremental",  # shards with a _stats.json are kept
    }


def _same_as_before(out_dir, path, settings):
    try:
        old = json.loads(path.read_text())
        changed = ", ".join(key for key in settings if old.get(key) != settings[key])
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it from a copy, or give another folder") from None
    if changed:
        raise InputError(f"{out_dir} was downloaded with another {changed}; give another folder")


def _names(shard: int) -> tuple[str, ...]:
    """The files that img2dataset writes for a shard, in this order; the first is temporary."""
    return f"_tmp/{shard}.feather", f"{shard:05d}.tar", f"{shard:05d}.parquet", f"{shard:05d}_stats.json"


def _remove_unfinished(owned, shards):
    """Removes the files of unfinished shards: _stats.json, which comes last, is missing or incomplete."""
    # img2dataset takes every .json here for its own, and removes all of _tmp.
    for path in owned.folder.glob("*.json"):
        if not download_stats.NAME.fullmatch(path.name):
            raise InputError(f"{path} is in img2dataset's way, and download did not write it; move it away")
    owned.remove("_tmp")
    for _, *files, stats in map(_names, shards):
        if not (owned.folder / stats).exists() or download_stats.read(owned.folder / stats) is None:
            for name in (stats, *files):
                owned.remove(name)


def _run(python, arguments, environment, out_dir, log, total):
    """Runs img2dataset with its output in `log`, and shows the progress by finished shards."""
    driver, index = Path(__file__).with_name("img2dataset_driver.py"), _Index(out_dir)
    finished = download_stats.Finished(out_dir)
    new = finished.new()
    with open(log, "w") as out, progress("download", total, unit="URLs", done=finished.urls) as bar:
        # A session of its own, so that all of its processes can be ended at once.
        child = subprocess.Popen(
            [python, driver, json.dumps(arguments)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Otherwise every process asks PyPI for updates.
            env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"} | environment,
        )
        try:
            while child.poll() is None:
                time.sleep(0.5)
                index.add(new)
                new, done = finished.new(), finished.urls
                bar.set_postfix_str(f"{finished.images / done:.0%} of them images" if done else "", refresh=False)
                bar.update(done - bar.n)
            index.add(new | finished.new())
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            index.close()
    if child.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise InputError(f"img2dataset failed: {last}; {log} has more, and the same command resumes")


class _Index:
    """The index of the tars with the usual keys, written as they are finished."""

    def __init__(self, out_dir: Path):
        self._out_dir, self._indexer = out_dir, None

    def add(self, names):
        new = [name for name in names if (self._out_dir / name).is_file()]
        if new and self._indexer is None:
            from input_pipeline.sources import tar  # and TensorFlow, while img2dataset is at work
            from input_pipeline.sources.offset_index import Indexer

            self._indexer = Indexer(tar.usual_kind(), self._out_dir, new)
        else:
            for name in new:
                self._indexer.add(name)

    def close(self):
        if self._indexer:
            self._indexer.close()


def _out_dir(path: str) -> Path:
    try:
        return storage.local(path, "OUT_DIR")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flags():
    parser = argparse.ArgumentParser(
        prog=commands.prog("input_pipeline.download"),
        description="Downloads the images of a URL list to WebDataset shards. The same command resumes it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "urls", metavar="URLS", type=Path, help="table (.csv, .tsv, .jsonl, also .gz) or .parquet of URLs"
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=_out_dir, help="folder of the shards, local")
    parser.add_argument("--url-column", help="its name in the header; default: found by what is in it")
    parser.add_argument("--caption-column", help="its name in the header; default: the only other, or caption, text")
    parser.add_argument("--encoding", help="of a table that is not UTF-8, for example latin-1")
    parser.add_argument("--short-side", type=int, default=288, help="shrink larger images to this many pixels (288)")
    parser.add_argument("--quality", type=int, default=95, help="of written JPEGs (95)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="URLs per shard (10000)")
    parser.add_argument("--processes", type=int, default=cores(), help="worker processes (one per core)")
    parser.add_argument(
        "--distributor",
        choices=["multiprocessing", "pyspark", "ray"],
        default="multiprocessing",
        help="of img2dataset: what runs the worker processes (multiprocessing)",
    )
    parser.add_argument("--threads", type=int, default=64, help="downloads at once in each process (64)")
    parser.add_argument("--timeout", type=int, default=10, help="seconds without an answer (10)")
    parser.add_argument("--retries", type=int, default=1, help="after a failed download (1)")
    parser.add_argument(
        "--private", action="store_true", help="also ask hosts that have no public address, as those of an intranet"
    )
    parser.add_argument("--env", type=Path, help=f"environment that has img2dataset; default: this one, or {ENV}")
    return parser


def main() -> None:
    """Exit codes: common/commands.py."""
    parser = _flags()
    flags = parser.parse_args()
    least = dict.fromkeys(("short_side", "shard_size", "processes", "threads", "timeout"), 1) | {"retries": 0}
    for name, low in least.items():
        if getattr(flags, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(flags, name)}")
    if not 1 <= flags.quality <= 100:
        parser.error(f"--quality must be 1 to 100; got {flags.quality}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that img2dataset is ended too
    with commands.exit_codes("stopped; the same command resumes after the finished shards"):
        flags.encoding = encoding(None).check(flags.encoding, "--encoding")
        counts, total = download(flags.urls, flags.out_dir, flags)
        print(download_stats.summary(counts, flags.out_dir, total))
        if not (counts["images"] or counts["shards not finished"]):
            raise InputError(f"none of the URLs of {flags.urls} gave an image")


if __name__ == "__main__":
    main()
