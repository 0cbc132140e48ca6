"""Small good files of every kind that is read, files made to do harm, and random changes: for benchmarks/hostile.py."""

import csv
import io
import json
import os
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROWS = 6  # of each data set


def pictures(rng: np.random.Generator) -> dict[str, bytes]:
    """One of each format, and of the forms that decoders treat apart."""
    pixels = rng.integers(0, 256, (24, 31, 4), np.uint8)
    smooth = Image.fromarray(pixels[:6, :8, :3]).resize((31, 24), Image.Resampling.BICUBIC)
    rgba, found = Image.fromarray(pixels), {}
    for name, image, kind, options in (
        ("jpg", smooth, "JPEG", {}),
        ("progressive.jpg", smooth, "JPEG", {"progressive": True}),
        ("cmyk.jpg", smooth.convert("CMYK"), "JPEG", {}),
        ("png", rgba, "PNG", {}),
        ("palette.png", smooth.convert("P"), "PNG", {"transparency": 3}),
        ("16.png", Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        ("webp", smooth, "WEBP", {}),
        ("lossless.webp", rgba, "WEBP", {"lossless": True}),
        ("gif", smooth, "GIF", {"save_all": True, "append_images": [smooth.rotate(90)]}),
        ("bmp", smooth, "BMP", {}),
        ("tif", smooth, "TIFF", {"compression": "tiff_lzw"}),
        ("jpeg.tif", smooth, "TIFF", {"compression": "jpeg"}),
        ("float.tif", Image.fromarray(pixels[..., 0].astype(np.float32)), "TIFF", {}),
    ):
        out = io.BytesIO()
        image.save(out, kind, **options)
        found[name] = out.getvalue()
    return found


def _tar(folder, rows):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, (image, caption) in enumerate(rows):
            for ending, data in (("jpg", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _tfrecord(folder, rows):
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(folder / "0.tfrecord")) as out:
        for image, caption in rows:
            feature = {
                key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                for key, value in (("jpg", image), ("txt", caption.encode()))
            }
            out.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


def _parquet(folder, rows):
    images, captions = zip(*rows, strict=True)
    pq.write_table(pa.table({"image": images, "caption": captions}), folder / "0.parquet", row_group_size=4)


def _csv(folder, rows):
    with (folder / "0.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("image", "caption"), *((f"{i}.jpg", row[1]) for i, row in enumerate(rows))])


def _jsonl(folder, rows):
    lines = [json.dumps({"image": f"{i}.jpg", "caption": row[1]}) for i, row in enumerate(rows)]
    (folder / "0.jsonl").write_text("\n".join(lines) + "\n")


# format of config.data -> (the file that is changed, how it is written)
DATA = {
    "webdataset": ("0.tar", _tar),
    "tfrecord": ("0.tfrecord", _tfrecord),
    "parquet": ("0.parquet", _parquet),
    "csv": ("0.csv", _csv),
    "jsonl": ("0.jsonl", _jsonl),
}


def write_data(kind: str, folder: Path, rng: np.random.Generator) -> Path:
    """A good data set of ROWS samples; the file to be changed."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(pictures(rng)["jpg"], f'caption {i}, "quoted"') for i in range(ROWS)]
    for i, (image, _) in enumerate(rows):
        (folder / f"{i}.jpg").write_bytes(image)
    name, write = DATA[kind]
    write(folder, rows)
    return folder / name


def changed(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to three random changes."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        length = min(len(data) - at, rng.choice([1, 1, 2, 4, 8, 64, 512, len(data)]))
        some = bytes(rng.randrange(256) for _ in range(min(length, 64)))
        extreme = struct.pack(rng.choice("<>") + "q", rng.choice([0, -1, 2**31 - 1, -(2**31), 2**63 - 1, 2**40]))
        old = data[at : at + length]
        new = rng.choice([some, b"", b"\0" * length, old * 2, extreme[: rng.choice([2, 4, 8])], old[::-1]])
        data = data[:at] + new + data[at + length :]
    return data


def write_png(path: Path, side: int) -> None:
    """A PNG of one colour: few bytes, many pixels."""
    Image.new("RGB", (side, side)).save(path, "PNG", compress_level=1)


def write_many_scans(path: Path, side: int, scans: int) -> None:
    """A progressive JPEG whose last scan comes again and again."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), (90, 120, 200)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    path.write_bytes(data[:-2] + last * scans + data[-2:])


def _header(size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo("0.jpg").tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _pt(path: Path, pickled: bytes, data: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)


def crafted(folder: Path) -> Iterator[tuple[str, Path]]:
    """(reader of benchmarks/hostile.py, file) of files that were made to hang, to fill the memory or to run code."""
    folder.mkdir()

    def file(name: str, data: bytes | Callable[[Path], object]) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        data(path) if callable(data) else path.write_bytes(data)
        return path

    yield "picture", file("bomb.png", lambda path: write_png(path, 9400))
    yield "picture", file("scans.jpg", lambda path: write_many_scans(path, 4000, 3000))
    yield "picture", file("code.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touched) (w) file\n")
    yield "picture", file("deep.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + b"\0" * 99)
    pipe = folder / "pipe.jpg"
    os.mkfifo(pipe)
    for name, target in (("pipe", pipe), ("zero", Path("/dev/zero")), ("large", folder / "large.jpg")):
        if name == "large":
            with target.open("wb") as out:
                out.truncate(1 << 36)
        yield "csv", file(f"{name}.csv", f"image,caption\n{target},a caption\n".encode())
    sizes = (b"-1000", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"7" * 11)
    for i, size in enumerate(sizes):
        yield "webdataset", file(f"size{i}.tar", _header(size) + b"\0" * 1024)
    pax = b"14 size=-1000\n"
    yield "webdataset", file("pax.tar", _header(b"16", b"x") + pax.ljust(512, b"\0") + _header(b"0") + b"\0" * 1024)
    yield "jsonl", file("deep.jsonl", b'{"image": ' + b"[" * 1_000_000 + b"\n")
    yield "csv", file("quote.csv", b'image,caption\n"' + b"x" * 50_000_000)
    yield "weights", file("deep.pt", lambda path: _pt(path, b"\x80\x02" + b"(" * 2_000_000 + b"."))
    yield "weights", file("tuples.pt", lambda path: _pt(path, b"\x80\x02)" + b"\x85" * 2_000_000 + b"."))
    yield "weights", file("memo.pt", lambda path: _pt(path, b"\x80\x02Nr\xff\xff\xff\x7f."))
    yield "weights", file("inflates.pt", lambda path: _pt(path, b"\x80\x02}.", b"\0" * (1 << 30)))
    yield "weights", file("code.pt", lambda path: _pt(path, b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR."))
    yield "weights", file("inflates.npz", lambda path: np.savez_compressed(path, a=np.zeros(1 << 28, np.float32)))
    yield "weights", file("header.safetensors", struct.pack("<Q", 2**62) + b"{}")
    yield "weights", file("long.safetensors", struct.pack("<Q", 90_000_000) + b"[" * 90_000_000)
    for name, text in (("deep", "[" * 500_000), ("digits", f'{{"hidden_size": {"9" * 5000}}}'), ("null", "null")):
        model = folder / f"config_{name}"
        model.mkdir()
        (model / "config.json").write_text(text)
        (model / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        yield "weights", model
    yield "tokenizer", file("tokenizer_deep/tokenizer.json", b'{"a":' * 200_000)
    yield "tokenizer", file("tokenizer_long/tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 99999999999}}}')


def copied(source: Path, target: Path) -> Path:
    """A copy of a file or a folder."""
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return target
