"""Sets of hundreds of millions of pairs: how long a process takes to its first batch, and the memory it needs.

    python -m benchmarks.scale FOLDER [--pairs 10e6 100e6 400e6] [--shards 40000] [--processes 1 64]

The shards are simulated: all are one tar of small pictures, under many names (hard links). Their index exists, in as
many files as a run writes; in each file all shards share the records of one. Each measurement is a process of its own,
which stands for the first of so many: opening, the record of the data, and one batch of 32, without the imports, and
without reading what is read once in a process (TensorFlow's own start). The page cache is warm.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from PIL import Image

from rankclip_jax.common.ownership import INDEX

BATCH = 32


def make(folder: Path, shards: int, rows: int) -> None:
    """Writes a set of `shards` tars of `rows` pairs each, with its index."""
    from input_pipeline.sources import index_file, index_places, tar
    from input_pipeline.sources.offset_index import offset_index

    folder.mkdir(parents=True)
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as out:
        for row in range(rows):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (row % 256, row // 256 % 256, 0)).save(picture, "JPEG")
            for ending, data in (("jpg", picture.getvalue()), ("txt", f"picture {row}".encode())):
                member = tarfile.TarInfo(f"{row:09}.{ending}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    kind = tar.usual_kind()
    records = offset_index(kind, [str(first)]).of_shard(0)
    for old in (folder / INDEX).iterdir():
        old.unlink()
    for number in range(1, shards):
        os.link(first, folder / f"{number:05}.tar")
    stat = first.stat()
    shard = index_file.described("", (stat.st_size, stat.st_mtime_ns), records, ())
    per_file = max(1, index_places.AT_ONCE // records.nbytes)
    for begin in range(0, shards, per_file):
        names = (f"{number:05}.tar" for number in range(begin, min(begin + per_file, shards)))
        head = index_file.table(kind.name, 4, [shard._replace(name=name) for name in names])
        (folder / INDEX / index_file.file_name(kind.name, head)).write_bytes(head + records.tobytes())


def memory(name: str) -> float:
    """MB of this process, VmRSS (now) or VmHWM (at most)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def measure(pattern: str, count: int) -> dict:
    """{"rows", "open", "used" (processor), "batch": seconds, "before", "peak": MB} of one of `count` processes."""
    from ml_collections import ConfigDict

    from input_pipeline import pipeline, sources
    from input_pipeline.sources.fingerprint import fingerprint
    from rankclip_jax.common.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["picture 0123456789"], 300)
    view = dict(image_side=32, context_length=16, crop_scale=(1.0, 1.0), seed=0, canvas=32)
    few = sources.open_source(ConfigDict({"format": "shapes"}), 64, image_side=32)
    next(pipeline.TrainBatches(few, tokenizer, batch_size=BATCH, batches=1, **view))
    before, used, begin = memory("VmRSS"), time.process_time(), time.perf_counter()
    spec = ConfigDict(dict(format="webdataset", image_key=None, caption_key=None))
    peers = sources.Peers((0, count), str(Path(pattern).parent / "run"), lambda value: [value] * count)
    source = sources.open_source(spec, pattern, image_side=32, peers=peers)
    fingerprint(source)
    opened, used = time.perf_counter(), time.process_time() - used
    stream = pipeline.TrainBatches(source, tokenizer, batch_size=BATCH, process=(0, count), batches=1, **view)
    assert next(stream)["image"].shape[0] == BATCH and not stream.bad.count
    found = dict(rows=source.size, open=opened - begin, used=used, batch=time.perf_counter() - opened, before=before)
    return found | dict(peak=max(memory("VmHWM"), before))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the sets, which are kept")
    parser.add_argument("--pairs", type=float, nargs="+", default=[10e6, 100e6, 400e6])
    parser.add_argument("--shards", type=int, default=40_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # what a child measures
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measure(str(flags.folder / f"{{00000..{flags.shards - 1:05}}}.tar"), flags.one)))
        return
    print(
        "| pairs | processes | opened, s | of a processor, s | first batch, s | peak, MB | of it the set's |\n"
        + "| ---: " * 7
        + "|"
    )
    for pairs in flags.pairs:
        folder = flags.folder / f"{pairs:.0f}_{flags.shards}"
        if not folder.exists():
            make(folder, flags.shards, int(pairs) // flags.shards)
        for count in flags.processes:
            command = [sys.executable, "-m", "benchmarks.scale", str(folder), "--shards", str(flags.shards)]
            done = subprocess.run([*command, "--one", str(count)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            peak, own = (f"{found['peak'] - less:,.0f}" for less in (0, found["before"]))
            seconds = " | ".join(f"{found[name]:.1f}" for name in ("open", "used", "batch"))
            print(f"| {found['rows'] / 1e6:,.0f} M | {count} | {seconds} | {peak} | {own} |", flush=True)


if __name__ == "__main__":
    main()
