"""Images a second from a bucket on the loopback and from the disk beside it, by rows and by blocks: what latency costs.

python -m benchmarks.buckets [--formats webdataset ...] [--rows 3328] [--latency 0 0.05] [--rounds 5]

The places take turns, and each number is a median of the rounds. The bucket (tests/support/bucket.py) is a process of
its own on the same machine: in Python, so that it takes a share of the processors, which the disk does not. Shards are
indexed, and Parquet is unpacked, before the clock starts. "Of the disk" is by rows, as a local set is read, and by the
same order, each of the same round. Eight minutes on 2 cores.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from ml_collections import ConfigDict

from benchmarks.input_pipeline import photograph
from input_pipeline import pipeline, sources
from input_pipeline.blocks import BlockOrder
from rankclip_jax.common.commands import keep_freed_memory
from rankclip_jax.common.tokenizer import Tokenizer
from tests.support.source_files import KEYS, write_parquet, write_tar, write_tfrecord

BATCH, LANES, WINDOW_MB = 64, 4, 64  # a window is half of the set
FORMATS = {
    "webdataset": write_tar,
    "tfrecord": write_tfrecord,
    "parquet": functools.partial(write_parquet, group=64),
}


def jpegs(rows: int) -> list[tuple[bytes, str]]:
    """[(JPEG of 400 x 300, caption)]: sixteen pictures, again and again, each with its number behind the picture."""
    import io

    import numpy as np
    from PIL import Image

    made = []
    for i in range(16):
        out = io.BytesIO()
        Image.fromarray(photograph(np.random.default_rng(i), 300, 400)).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return [(made[i % 16] + i.to_bytes(4), f"a photograph of number {i} among many others") for i in range(rows)]


class Server:
    """A bucket in a process of its own."""

    def __init__(self, folder: Path, latency: float):
        command = [sys.executable, "-m", "tests.support.bucket", str(folder), "--latency", str(latency)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        port = self._process.stdout.readline().strip()
        os.environ |= {"TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}

    def counted(self) -> dict:
        """{"requests", "bytes"} since the last time."""
        self._process.stdin.write("count\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        """Once nothing is read any more: what is asked of a server that is gone is asked again for minutes."""
        gc.collect()
        while self.counted()["requests"]:
            time.sleep(0.5)
        self._process.stdin.close()
        self._process.wait()


class Set:
    """A set in one place and one order."""

    def __init__(self, kind: str, path: str, cache: Path, shuffle: str):
        """`cache`: of its index, and of unpacked Parquet."""
        keys = dict(format=kind, cache_dir=str(cache), shuffle=shuffle, block_rows=64, window_mb=WINDOW_MB)
        self._spec, self._path = ConfigDict(KEYS | keys), path

    def opened(self, batches: int, start=0) -> tuple[pipeline.TrainBatches, float]:
        """(the batches after the first one, seconds until that was there)"""
        begin, order = time.perf_counter(), None
        source = sources.open_source(self._spec, self._path, image_side=224)
        if self._spec.shuffle == "blocks":
            order = BlockOrder(source.blocks, seed=0, lanes=LANES, window_bytes=WINDOW_MB << 20)
        view = dict(batch_size=BATCH, image_side=224, context_length=32, crop_scale=(0.5, 1.0), canvas=408)
        options = dict(seed=0, start=start, order=order, batches=batches)
        stream = pipeline.TrainBatches(source, TOKENIZER, **view, **options)
        next(stream)
        return stream, time.perf_counter() - begin

    def measure(self, batches: int) -> tuple[float, float, Any]:
        """(images a second after the first batch, seconds to the first batch, the position in the middle)"""
        stream, first = self.opened(batches)
        begin = time.perf_counter()
        for number in range(1, batches):
            next(stream)
            if number == batches // 2:
                middle = stream.position
        assert not stream.bad.count
        return (batches - 1) * BATCH / (time.perf_counter() - begin), first, middle


TOKENIZER = Tokenizer.train(["a photograph of number 0123456789 among many others"], 300)


def turn(
    scratch: Path, kind: str, path: str, batches: int, latency: float | None, shuffle: str, first_round: bool
) -> dict:
    """The numbers of one epoch and of a resumed half; latency None: from the disk."""
    server = None if latency is None else Server(scratch, latency)
    where = path.replace(str(scratch), "gs://bucket") if server else path
    at = Set(kind, where, scratch / f"{kind}.{latency}.{shuffle}", shuffle)
    if first_round:
        at.opened(2)  # indexes, or unpacks
    unpacked = server.counted() if server else {}
    rate, first, middle = at.measure(batches)
    counted = server.counted() if server else {}
    resumed = at.opened(batches // 2, middle)[1]
    if server:
        server.close()
    once = kind == "parquet" and shuffle == "rows"  # its bytes were read before, to unpack it
    return dict(rate=rate, first=first, resumed=resumed) | (unpacked if once else counted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--rows", type=int, default=3328, help="a multiple of 256: as many blocks of each lane")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.05], help="seconds a request")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    keep_freed_memory()  # as training does
    made, batches = jpegs(flags.rows), flags.rows // BATCH
    wanted = sum(len(image) + len(caption) for image, caption in made[: batches * BATCH])
    places = list(itertools.product((None, *flags.latency), ("rows", "blocks")))
    columns = "first batch, s | resumed, s | requests | bytes / bytes wanted"
    print(f"| | from | order | images/s | of the disk: by rows, same order | {columns} |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind in flags.formats:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            (scratch / kind).mkdir()
            of = functools.partial(turn, scratch, kind, FORMATS[kind](scratch / kind, made), batches)
            rounds = [{place: of(*place, not number) for place in places} for number in range(flags.rounds)]
        for place in places:
            names = ("rate", "first", "resumed")
            median = {name: statistics.median(one[place][name] for one in rounds) for name in names}
            latency, shuffle = place
            of_disk = [
                statistics.median(one[place]["rate"] / one[None, order]["rate"] for one in rounds)
                for order in ("rows", shuffle)
            ]
            cells = [kind, "disk" if latency is None else f"bucket, {1000 * latency:.0f} ms", shuffle]
            cells += [f"{median['rate']:.0f}", ", ".join(f"{share:.0%}" for share in of_disk)]
            cells += [f"{median['first']:.1f}", f"{median['resumed']:.1f}"]
            asked = rounds[0][place]  # the same in all, but that Parquet is unpacked once
            cells += ["", ""] if latency is None else [str(asked["requests"]), f"{asked['bytes'] / wanted:.3f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
