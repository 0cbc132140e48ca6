"""Images a second from a bucket on the loopback, and from the disk beside it: what latency costs, and how many bytes.

python -m benchmarks.buckets [--rows 4000] [--latency 0 0.05]

The bucket (tests/support/bucket.py) is a process of its own on the same machine: in Python, so that it takes a share of
the processors, which the disk does not. Shards are indexed, and Parquet is unpacked, before the clock starts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from ml_collections import ConfigDict

from benchmarks.input_pipeline import photograph
from input_pipeline import pipeline, sources
from rankclip_jax.common.tokenizer import Tokenizer
from tests.support.source_files import KEYS, write_parquet, write_tar, write_tfrecord

BATCH = 64
FORMATS = {"webdataset": write_tar, "tfrecord": write_tfrecord, "parquet": write_parquet}


def jpegs(rows: int) -> list[tuple[bytes, str]]:
    """[(JPEG of 400 x 300, caption)]: sixteen different pictures, again and again."""
    import io

    import numpy as np
    from PIL import Image

    made = []
    for i in range(16):
        out = io.BytesIO()
        Image.fromarray(photograph(np.random.default_rng(i), 300, 400)).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return [(made[i % 16], f"a photograph of number {i} among many others") for i in range(rows)]


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


def measure(kind: str, path: str, cache: Path, batches: int) -> tuple[float, float]:
    """(images a second after the first batch, seconds from opening the indexed set to the first batch)"""
    spec = ConfigDict(KEYS | dict(format=kind, cache_dir=str(cache)))
    begin = time.perf_counter()
    source = sources.open_source(spec, path, image_side=224)
    view = dict(batch_size=BATCH, image_side=224, context_length=32, crop_scale=(0.5, 1.0), canvas=408)
    stream = pipeline.TrainBatches(source, TOKENIZER, **view, seed=0, batches=batches)
    next(stream)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(batches - 1):
        next(stream)
    assert not stream.bad.count
    return (batches - 1) * BATCH / (time.perf_counter() - begin), first


TOKENIZER = Tokenizer.train(["a photograph of number 0123456789 among many others"], 300)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.05], help="seconds a request")
    flags = parser.parse_args()
    made, batches = jpegs(flags.rows), flags.rows // BATCH
    print("| | from | images/s | first batch, s | requests | bytes / bytes wanted |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as scratch:
        for kind, write in FORMATS.items():
            folder = Path(scratch) / kind
            folder.mkdir()
            path = write(folder, made)
            wanted = sum(len(image) + len(caption) for image, caption in made[: batches * BATCH])
            cache = Path(scratch) / f"{kind}.cache"
            measure(kind, path, cache, 2)  # indexes
            rate, first = measure(kind, path, cache, batches)
            print(f"| {kind} | disk | {rate:.0f} | {first:.1f} | | |", flush=True)
            for latency in flags.latency:
                cache = Path(scratch) / f"{kind}.{latency}.cache"
                server = Server(Path(scratch), latency)
                remote = path.replace(scratch, "gs://bucket")
                measure(kind, remote, cache, 2)  # indexes
                indexed = server.counted()
                rate, first = measure(kind, remote, cache, batches)
                found = server.counted()
                share = f"{found['bytes'] / wanted:.3f}"
                if kind == "parquet":  # read once, to unpack it
                    share = f"{indexed['bytes'] / wanted:.3f} once"
                where = f"bucket, {1000 * latency:.0f} ms"
                print(f"| {kind} | {where} | {rate:.0f} | {first:.1f} | {found['requests']} | {share} |", flush=True)
                server.close()


if __name__ == "__main__":
    main()
