"""Images a second from a bucket on the loopback and from the disk beside it, by rows and by blocks: what latency costs.

python -m benchmarks.buckets [--rows 3328] [--latency 0 0.05]

The bucket (tests/support/bucket.py) is a process of its own on the same machine: in Python, so that it takes a share of
the processors, which the disk does not. Shards are indexed, and Parquet is unpacked, before the clock starts. "Of the
disk" is by rows, as a local set is read. 18 lines of some 15 s each on 2 cores.
"""

import argparse
import functools
import json
import os
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3328, help="a multiple of 256: as many blocks of each lane")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.05], help="seconds a request")
    flags = parser.parse_args()
    keep_freed_memory()  # as training does
    made, batches = jpegs(flags.rows), flags.rows // BATCH
    print("| | from | order | images/s | of the disk | first batch, s | resumed, s | requests | bytes / bytes wanted |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as scratch:
        for kind, write in FORMATS.items():
            folder = Path(scratch) / kind
            folder.mkdir()
            path = write(folder, made)
            local = None  # images a second
            wanted = sum(len(image) + len(caption) for image, caption in made[: batches * BATCH])
            for latency in (None, *flags.latency):
                for shuffle in ("rows", "blocks"):
                    cache = Path(scratch) / f"{kind}.{latency}.{shuffle}"
                    server = None if latency is None else Server(Path(scratch), latency)
                    at = Set(kind, path.replace(scratch, "gs://bucket") if server else path, cache, shuffle)
                    at.opened(2)  # indexes, or unpacks
                    counted = [server.counted()] if server else []
                    rate, first, middle = at.measure(batches)
                    counted += [server.counted()] if server else []
                    _, resumed = at.opened(batches // 2, middle)
                    local = local or rate
                    cells = [kind, "disk" if latency is None else f"bucket, {1000 * latency:.0f} ms", shuffle]
                    cells += [f"{rate:.0f}", f"{rate / local:.0%}", f"{first:.1f}", f"{resumed:.1f}", "", ""]
                    if server:
                        once = kind == "parquet" and shuffle == "rows"  # which was read before, to unpack it
                        found, share = counted[not once], counted[not once]["bytes"] / wanted
                        cells[-2:] = [str(found["requests"]), f"{share:.3f}" + ", once" * once]
                        server.close()
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
