"""Pictures that wait, fill the memory or take the processor: bad samples with a reason, the same by every reader."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import decode, encode, sources, transforms
from input_pipeline.bad_samples import reason_of_failure
from rankclip_jax.common import pictures, tables
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.regular_files import read_regular
from rankclip_jax.inference.pictures import open_pictures
from rankclip_jax.weights.view import View
from tests.support.source_files import KEYS, samples


def png(*size, mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG", compress_level=1)
    return out.getvalue()


def many_scans(side, scans):
    """A progressive JPEG whose last scan is repeated."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), (90, 120, 200)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def progressive(side):
    out = io.BytesIO()
    Image.new("RGB", (side, side), (90, 120, 200)).save(out, "JPEG", progressive=True, subsampling=0)
    return out.getvalue()


def by_graph(data):
    return decode.decode(tf.constant(data))


@pytest.fixture
def folder(tmp_path):
    """A folder with a good picture, a pipe and a file of 101 MB."""
    (tmp_path / "good.jpg").write_bytes(samples(1)[0][0])
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "large.jpg").open("wb") as out:
        out.truncate(101_000_000)
    return tmp_path


def test_only_regular_files_of_a_table_are_read(folder):
    def csv_of(*names, **spec):
        with (folder / "data.csv").open("w", newline="") as out:
            csv.writer(out).writerows([("image", "caption"), *((name, "a caption") for name in names)])
        spec = ConfigDict(KEYS | dict(format="csv") | spec)
        return sources.open_source(spec, str(folder / "data.csv"), image_side=8)

    source = csv_of("good.jpg", "pipe.jpg", "/dev/zero", "/dev/full", "large.jpg", ".", "none.jpg", "good.jpg")
    reasons = [reason_of_failure(source.read, row) for row in range(source.size)]
    assert reasons[0] is None and reasons[-1] is None
    assert reasons[1:-1] == [
        f"{folder}/pipe.jpg; a named pipe, not a regular file",
        "/dev/zero; a device, not a regular file",
        "/dev/full; a device, not a regular file",
        f"{folder}/large.jpg; 101 MB; more than config.data.max_file_mb",
        f"{folder}/.; a folder, not a regular file",
        f"{folder}/none.jpg; no such file",
    ]
    assert reason_of_failure(csv_of("large.jpg", max_file_mb=102).read, 0) is None
    for name in ".", "pipe.jpg", "large.jpg", "good.jpg":  # whatever becomes of it, no file stays open
        before = os.listdir("/proc/self/fd")
        with contextlib.suppress(InputError):
            read_regular(folder / name, 1_000_000)
        assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_parquet_has_the_limit_of_a_picture_that_is_asked_for(shuffle, folder):
    with (folder / "large.jpg").open("wb") as out:
        out.truncate(11_000_000)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": b"x" * 11_000_000, "path": None}, {"bytes": None, "path": "large.jpg"}], kind)
    pq.write_table(pa.table({"image": images, "caption": ["a", "b"]}), folder / "a.parquet", row_group_size=1)
    for most, readable in ((10, False), (12, True)):
        spec = ConfigDict(KEYS | dict(format="parquet", max_file_mb=most, shuffle=shuffle, window_mb=200))
        source = sources.open_source(spec, str(folder / "a.parquet"), image_side=8)
        reasons = [reason_of_failure(source.read, row) for row in range(2)]
        assert [reason is None for reason in reasons] == [readable] * 2
        assert all("config.data.max_file_mb" in reason for reason in reasons if reason)


def test_only_regular_files_of_a_folder_are_read(folder):
    for stem in ("good", "large"):
        (folder / f"{stem}.txt").write_text("a caption")
    (folder / "pipe.txt").write_text("a caption")
    (folder / "good2.jpg").write_bytes(samples(1)[0][0])
    os.mkfifo(folder / "good2.txt")
    source = sources.open_source(ConfigDict(KEYS | dict(format="folder")), str(folder), image_side=8)
    reasons = [reason_of_failure(source.read, row) for row in range(source.size)]
    assert reasons == [
        None,
        f"{folder}/good2.txt; a named pipe, not a regular file",
        f"{folder}/large.jpg; 101 MB; more than config.data.max_file_mb",
        f"{folder}/pipe.jpg; a named pipe, not a regular file",
    ]


def test_a_caption_that_cannot_be_read_is_none_of_a_collection(folder):
    for name, data in ("a", b"one"), ("b", b"\xef\xbb\xbftwo\n"), ("large", b"three"):
        (folder / f"{name}.jpg").touch()
        (folder / f"{name}.txt").write_bytes(data)
    for name in "cde":
        (folder / f"{name}.jpg").touch()
    os.mkfifo(folder / "c.txt")
    (folder / "d.txt").symlink_to("nowhere")
    (folder / "e.txt").write_bytes(b"fen\xeatre")
    with (folder / "large.txt").open("wb") as out:
        out.truncate(101_000_000)
    found = open_pictures(str(folder))
    captions = {found.name(i): found.captions(i) for i in range(found.size)}
    none = dict.fromkeys(("c.jpg", "d.jpg", "e.jpg", "good.jpg", "large.jpg", "pipe.jpg"), ())
    assert captions == {"a.jpg": ("one",), "b.jpg": ("two",)} | none


def test_only_regular_files_are_embedded_or_read_as_tables(folder):
    view = View(8, 8)
    with pytest.raises(InputError, match=r"pipe.jpg: a named pipe, not a regular file"):
        view(folder / "pipe.jpg")
    with pytest.raises(InputError, match=r"/dev/zero: a device, not a regular file"):
        view("/dev/zero")
    with pytest.raises(InputError, match=r"101 MB; more than"):
        view(folder / "large.jpg")
    os.mkfifo(folder / "pipe.csv")
    with pytest.raises(InputError, match=r"pipe.csv is a named pipe, not a regular file"):
        tables.read_table(str(folder / "pipe.csv"))


@pytest.mark.parametrize("read", [pictures.read, by_graph])
def test_scans_that_take_seconds_are_refused(read):
    few, many = many_scans(4000, 30), many_scans(4000, 2000)  # of 16 megapixels
    with pytest.raises(Exception, match=f"4000 x 4000; {pictures.MANY_SCANS}"):
        read(many)
    assert read(few) is not None  # more than an encoder makes
    assert read(many_scans(64, 2000)) is not None  # of a small picture they take no time


def test_scans_of_a_jpeg_inside_a_tiff_are_counted():
    out = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(out, "TIFF", compression="jpeg")
    tiff = out.getvalue()
    assert tiff.count(pictures.SCAN) > 30  # one or more in each strip
    pictures.opened(tiff)
    with pytest.raises(pictures.BadImageError, match="scans x pixels"):
        pictures.opened(tiff + 200 * 1000 * (pictures.SCAN + b"\0" * 10))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_large_picture_is_that_of_pillow(mode, monkeypatch):
    monkeypatch.setattr(pictures, "LARGE", 100), monkeypatch.setattr(decode, "LARGE", 100)
    monkeypatch.setattr(pictures, "_STRIP", 7)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 11, len(mode)), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, mode).save(out, "PNG")
    white = Image.new("RGBA", (11, 20), "white")
    expected = Image.alpha_composite(white, Image.fromarray(pixels, mode).convert("RGBA")).convert("RGB")
    for read in (pictures.read, by_graph):
        np.testing.assert_array_equal(np.asarray(read(out.getvalue())), np.asarray(expected))


@pytest.mark.parametrize("kind", ["baseline", "progressive", "PNG", "WEBP"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_large_picture_has_the_view_of_any_other(kind, exact, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(pixels).resize((300, 400), Image.Resampling.BICUBIC)
    image.save(out, "JPEG" if kind in ("baseline", "progressive") else kind, progressive=kind == "progressive")

    def windows(size_2):
        if exact:
            return transforms.centre_window(size_2, 32)
        numbers = transforms.window_numbers(tf.constant([1, 2], tf.int64))
        return transforms.windows(numbers[None], tf.convert_to_tensor(size_2)[None], (0.5, 1.0))[0]

    def views():
        for canvas in (None, 64):
            made = transforms.view(tf.constant(out.getvalue()), windows, side=32, canvas=canvas, exact=exact)
            yield from made.values()

    usual = list(views())
    monkeypatch.setattr(pictures, "LARGE", 100), monkeypatch.setattr(decode, "LARGE", 100)
    entered = []
    room_for = pictures.room_for
    monkeypatch.setattr(pictures, "room_for", lambda pixels: entered.append(pixels) or room_for(pixels))
    for one, other in zip(usual, views(), strict=True):
        np.testing.assert_array_equal(one, other)
    # A JPEG that goes row by row is decoded at an eighth of its sides; all of another is held all the same.
    assert max(entered) == 300 * 400
    assert exact or (min(entered) <= 300 * 400 // 16) == (kind == "baseline")


@pytest.mark.parametrize("progressive, held", [(True, 300 * 400), (False, 38 * 50)])
def test_a_jpeg_that_is_decoded_smaller_waits_for_what_its_decoder_holds(progressive, held, monkeypatch):
    entered = []
    monkeypatch.setattr(pictures, "room_for", lambda pixels: entered.append(pixels) or contextlib.nullcontext())
    out = io.BytesIO()
    Image.new("RGB", (300, 400)).save(out, "JPEG", progressive=progressive)
    encode.encode(out.getvalue(), short_side=16)
    assert entered and set(entered) == {held}


def test_a_large_jpeg_that_is_broken_is_a_bad_sample_with_the_usual_reason(monkeypatch):
    out = io.BytesIO()
    Image.effect_noise((80, 60), 90).convert("RGB").save(out, "JPEG")
    cut = tf.constant(out.getvalue()[:1500])
    for large in (pictures.LARGE, 100):
        monkeypatch.setattr(decode, "LARGE", large)
        assert reason_of_failure(lambda row: decode.decode(cut), 0) == "broken or truncated JPEG"
        assert decode.decode(cut, recover=True).shape == (60, 80, 3)


def test_threads_hold_no_more_pixels_than_one_picture_may_have(monkeypatch):
    monkeypatch.setattr(pictures, "LARGE", 10)
    room, inside, sums = pictures._Room(100), [], []

    def work(pixels):
        with room(pixels), room(pixels):  # decoded, and what is made of it
            inside.append(min(pixels, 100))
            sums.append(sum(inside))
            inside.remove(min(pixels, 100))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [60, 41, 100, 11, 99, 1000, 30, 30] * 50))
    assert len(sums) == 400 and max(sums) == 100 and room._free == 100
    with ThreadPoolExecutor(3) as pool, room(60):
        order = []
        waits = pool.submit(lambda: work(41) or order.append("the one that waited"))
        pool.submit(work, 40).result()  # for which there is room
        pool.submit(work, 10).result()  # which is not large
        order.append("these")
        assert not waits.done()
    assert order == ["these", "the one that waited"]
    with pytest.raises(ZeroDivisionError), room(60):
        1 / 0  # noqa: B018
    assert room._free == 100


# Of views of eight pictures at once: the peak, by kind, in what the pixels of one take.
PEAKS = """
import json, re, sys
from pathlib import Path
import tensorflow as tf
from input_pipeline import decode, transforms
from rankclip_jax.common import pictures
small, side, *large = sys.argv[1:]
# Smaller than large ones are, and so sooner; there is room for one of them.
pictures.LARGE = decode.LARGE = int(side) ** 2 - 1
pictures._STRIP //= 2
pictures.room_for = pictures._Room(int(side) ** 2)
options = tf.data.Options()
options.threading.private_threadpool_size = 8

def held(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def peak(path, exact):
    data = tf.io.read_file(path)
    windows = lambda size: transforms.centre_window(size, 64)
    view = lambda i: transforms.view(data, windows, side=64, canvas=120, exact=exact)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = held("VmRSS")
    for _ in tf.data.Dataset.range(8).map(view, num_parallel_calls=8).with_options(options):
        pass
    return (held("VmHWM") - before) / (3 * int(side) ** 2)

peak(small, True)  # what libraries take at their first call
print(json.dumps({f"{path} {exact}": peak(path, exact) for path in large for exact in (True, False)}))
"""


@pytest.mark.slow
def test_many_large_pictures_need_little_more_memory_than_one(tmp_path):
    side = 2100
    made = {"small.png": png(9, 9), "png": png(side, side, mode="RGBA"), "jpeg": progressive(side)}
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", PEAKS, "small.png", str(side), "png", "jpeg"]
    # What is freed goes back at once, so that the peak is of what is held.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1]).values()) < 8  # 8 at once would be more than 16
