"""Whatever is done to the data: no hang, no crash, and every sample that does not come is accounted for."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import pipeline, sources
from input_pipeline.bad_samples import BadSamples, reason_of_failure
from input_pipeline.decode import decode
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from tests.support.source_files import (
    KEYS,
    WRITERS,
    example,
    open_as,
    read_all,
    samples,
    texts,
    write_tar,
    write_tfrecord,
)

TOKENIZER = Tokenizer.train(["caption"], 300)


def opened(layout, path, **options):
    return sources.open_source(ConfigDict(KEYS | dict(format=layout) | options), str(path), image_side=8)


def outcomes(source):
    """({row: (image bytes, caption)} of the rows that can be used, {row: reason} of the others), read one by one."""
    good, bad = {}, {}
    for row in range(source.size):

        def use(row):
            sample = source.read(row)
            decode(sample["image"])
            good[int(row)] = sample["image"].numpy(), texts(sample["caption"].numpy())

        reason = reason_of_failure(use, row)
        if reason:
            bad[row] = reason
    return good, bad


def train(source, count, tmp_path, **options):
    """The captions in `count` batches of 4, and the lines of bad_samples.jsonl."""
    texts = []

    def tokenizer(captions, length):
        texts.extend(captions)
        return TOKENIZER(captions, length)

    path = tmp_path / "bad.jsonl"
    given = dict(batch_size=4, image_side=8, context_length=8, crop_scale=(1.0, 1.0), seed=0) | options
    batches = pipeline.TrainBatches(source, tokenizer, bad_path=path, **given)
    for _ in range(count):
        batch = next(batches)
        assert batch["image"].shape == (4, 8, 8, 3) and batch["tokens"].shape == (4, 8)
    return set(texts), [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Captions


CAPTIONS = {
    "a megabyte": "word " * 200_000,
    "a megabyte without spaces": "x" * 1_000_000,
    "NUL inside": "before\0after",
    "NUL at the end": "ends with NUL\0",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f600",
    "right to left": "שלום \u202eעולם\u202c مرحبا بالعالم",  # noqa: RUF001
    "combining": "Z\u0351\u036b\u0343" + "\u0301" * 100,
    "quotes, delimiters, lines": "he said \"a, b\"\tand\r\n\n; 'c' \\",
    "markup": "&lt;b&gt; <script>alert(1)</script> {braces} %s {{x}} $HOME",
    "looks like a path": "../../etc/passwd",
}


@pytest.mark.parametrize("layout", ["csv", "tfrecord", "webdataset", "folder", "parquet"])
def test_captions_of_any_kind_come_as_they_are(layout, tmp_path):
    made = [(image, caption) for (image, _), caption in zip(samples(len(CAPTIONS)), CAPTIONS.values(), strict=True)]
    source = open_as(layout, tmp_path, made)
    assert dict(zip(CAPTIONS, (caption for _, caption in read_all(source)), strict=True)) == CAPTIONS
    assert list(source.captions()) == list(CAPTIONS.values())


@pytest.mark.parametrize("layout", ["csv", "tfrecord", "webdataset", "folder", "parquet"])
def test_empty_captions_are_named(layout, tmp_path):
    made = samples(8)
    for i, caption in ((1, ""), (3, " \t\n"), (4, "\u00a0\u3000 \u200b\ufeff"), (6, "kept"), (7, "\u200b\u732b")):
        made[i] = (made[i][0], caption)
    good, bad = outcomes(open_as(layout, tmp_path, made))
    assert good == {i: sample for i, sample in enumerate(made) if i not in (1, 3, 4)}
    assert bad == dict.fromkeys((1, 3, 4), "empty caption")


def test_captions_that_are_not_utf8_are_bad_rows_or_decoded_as_told(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as out:
        for image, _ in samples(4):
            out.write(example(jpg=image, txt=b"caf\xe9 \xff\xfe"))
    good, bad = outcomes(opened("tfrecord", tmp_path))
    assert good == {} and set(bad.values()) == {"the caption is not UTF-8 (see config.data.encoding)"}
    good, bad = outcomes(opened("tfrecord", tmp_path, encoding="latin-1"))
    assert {caption for _, caption in good.values()} == {"caf\xe9 \xff\xfe"} and bad == {}


# Images


def png_of_one_colour(width, height, rows=None):
    """A PNG of one colour, however large, in a few kilobytes: rows repeat, so zlib packs them a thousandfold.

    It is valid, unless it has fewer `rows` than it says.
    """

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row, packer = b"\0" + b"\x40" * ((width + 7) // 8), zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(rows or height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit a pixel
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def encoded(format, size=(16, 16), **options):
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, format, **options)
    return out.getvalue()


def bad_images():
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(good, "JPEG")
    jpeg, png, webp = good.getvalue(), encoded("PNG"), encoded("WEBP")
    bomb = bytearray(jpeg)  # a JPEG that says it is 65,000 x 65,000
    at = bomb.index(b"\xff\xc0")
    bomb[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    return {
        "0 bytes": (b"", "empty image"),
        "one byte": (b"\xff", None),
        "text": (b"<html>404 not found</html>", "an HTML page"),
        "zeros": (bytes(1000), "not an image"),
        "half a JPEG": (jpeg[: len(jpeg) // 2], "broken or truncated JPEG"),
        "a JPEG's head": (jpeg[:20], None),
        "half a PNG": (png[: len(png) // 2], None),
        "a PNG's head": (png[:10], None),
        "half a WebP": (webp[: len(webp) // 2], None),
        "a PNG with wrong bytes": (png[:45] + b"\xff" * 5 + png[50:], None),
        "a PNG of 100 megapixels": (png_of_one_colour(10_000, 10_000), "pixels"),
        "a PNG of 4 thousand megapixels": (png_of_one_colour(65_000, 65_000, rows=9), "pixels"),
        "a JPEG of 4 thousand megapixels": (bytes(bomb), "pixels"),
        "a GIF of 4 thousand megapixels": (b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + bytes(20), None),
        "noise": (np.random.default_rng(1).bytes(5000), "not an image"),
    }


def test_training_continues_with_every_good_sample_and_names_every_bad_one(tmp_path):
    """All the captions above and all these images in one set."""
    good = [(image, caption) for (image, _), caption in zip(samples(len(CAPTIONS)), CAPTIONS.values(), strict=True)]
    bad = bad_images()
    made = good + [(image, f"bad {i}") for i, (image, _) in enumerate(bad.values())]
    texts, lines = train(open_as("webdataset", tmp_path, made), 8, tmp_path)
    assert texts == set(CAPTIONS.values())
    reasons = {line["row"] - len(good): f"{line['detail']}; {line['reason']}" for line in lines}
    assert sorted(reasons) == list(range(len(bad)))
    for (name, (_, expected)), reason in zip(bad.items(), (reasons[i] for i in range(len(bad))), strict=True):
        assert (expected or "") in reason and len(reason) < 300 and reason.isprintable(), (name, reason)


# TFRecords


def test_truncated_shards_lose_their_tail_and_say_so(tmp_path, capsys):
    made = samples(16)
    write_tfrecord(tmp_path, made)
    shard = tmp_path / "00001.tfrecord"
    whole = shard.read_bytes()
    ends = [*record_offsets(whole), len(whole)][1:]
    for kept in (len(whole) - 1, len(whole) // 2, 30, 5, 0):
        shard.write_bytes(whole[:kept])
        source = opened("tfrecord", tmp_path)
        good, bad = outcomes(source)
        assert good == dict(enumerate(made[: 8 + sum(end <= kept for end in ends)])) and bad == {}
        assert [lost.where for lost in source.lost] == ([str(shard)] if kept else [])
        assert all("truncated inside the record at byte" in lost.reason for lost in source.lost)


def test_what_is_lost_is_written_down_and_counts_against_the_limit(tmp_path):
    made = samples(40)
    write_tfrecord(tmp_path, made)
    shard = tmp_path / "00001.tfrecord"
    data = bytearray(shard.read_bytes())
    at = list(record_offsets(data))[10]
    data[at] ^= 4  # in the length of the eleventh record of twenty
    shard.write_bytes(data)
    source = opened("tfrecord", tmp_path)
    reason = (
        f"the checksum of a record's length is wrong at byte {at}; the {len(data) - at:,} bytes from there are lost"
    )
    assert source.size == 30 and source.lost[0].reason == reason
    assert abs(source.lost[0].samples - 10) <= 2  # estimated by the bytes
    bad = BadSamples(source, tmp_path / "bad.jsonl", max_fraction=0.5)
    line = json.loads((tmp_path / "bad.jsonl").read_text())
    assert line["row"] is None and line["where"] == str(shard) and line["samples"] == source.lost[0].samples
    assert (
        bad.summary()
        == f"{source.lost[0].samples} unusable samples skipped: {bad.reasons.total()} {reason}"
    )
    with pytest.raises(
        InputError, match=r"are lost, more than config.data.max_bad_fraction = 0.1 .*; see the console"
    ):
        BadSamples(source, max_fraction=0.1)


def record_offsets(data):
    at = 0
    while at < len(data):
        yield at
        at += 16 + struct.unpack_from("<Q", data, at)[0]


def test_wrong_checksums_are_found_and_named(tmp_path):
    made = samples(40)
    write_tfrecord(tmp_path, made)
    shard = tmp_path / "00000.tfrecord"
    data = bytearray(shard.read_bytes())
    offsets = list(record_offsets(data))
    data[offsets[7] + 40] ^= 1  # a bit of a record's data
    data[offsets[11] - 1] ^= 0x80  # and of the checksum behind record 10
    shard.write_bytes(data)
    source = opened("tfrecord", tmp_path)
    good, bad = outcomes(source)
    assert good == {i: sample for i, sample in enumerate(made) if i not in (7, 10)}
    assert bad == dict.fromkeys((7, 10), "the record does not match its checksum")
    assert source.where(7).endswith(f"00000.tfrecord record 7 (byte {offsets[7]})")


def test_records_of_anything_else(tmp_path):
    made = samples(8)
    with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as out:
        for image, caption in made:
            out.write(example(jpg=image, txt=caption))
        out.write(example(txt="no image"))
        out.write(example(jpg=made[0][0]))
        out.write(example(jpg=[1, 2], txt="numbers for an image"))
        out.write(b"not an Example \xff\xff\xff")
        out.write(b"")
    good, reasons = outcomes(opened("tfrecord", tmp_path))
    assert good == dict(enumerate(made)) and sorted(reasons) == [8, 9, 10, 11, 12]
    assert (reasons[8], reasons[9], reasons[11], reasons[12]) == (
        "empty image",
        "empty caption",
        "not a tf.train.Example",
        "empty image",
    )
    assert "jpg" in reasons[10]


# Tars


def test_torn_tars_lose_their_tail_and_say_so(tmp_path):
    made = samples(16)
    write_tar(tmp_path, made)
    shard = tmp_path / "00001.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        ends = {m.offset_data + m.size: m for m in tar if m.name.endswith(".txt")}  # a sample's last member
    cuts = [len(whole) // 2, len(whole) // 2 // 512 * 512, 600, 512, 100]
    for kept in [*cuts, *np.random.default_rng(0).integers(1, max(ends), 5).tolist()]:
        shard.write_bytes(whole[:kept])
        source = opened("webdataset", tmp_path)
        complete = sum(end <= kept for end in ends)
        good, bad = outcomes(source)
        assert good == dict(enumerate(made[: 8 + complete]))
        # Of the last one there may be the image without the caption.
        assert bad in ({}, {8 + complete: "no caption: no member ends in .txt or .caption or .txt.gz or .caption.gz"})
        assert len(source.lost) == 1 and source.lost[0].where == str(shard), kept


def test_broken_headers_and_members_that_lack(tmp_path):
    made = samples(12)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, (image, caption) in enumerate(made):
            wanted = {"jpg": image, "txt": caption.encode()}
            if i in (2, 5):
                del wanted["jpg" if i == 2 else "txt"]
            for ending, content in wanted.items():
                member = tarfile.TarInfo(f"{i:03}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = opened("webdataset", tmp_path)
    good, bad = outcomes(source)
    assert good == {i: sample for i, sample in enumerate(made) if i not in (2, 5)}
    assert {row: reason.split(":")[0] for row, reason in bad.items()} == {2: "no image", 5: "no caption"}
    assert [source.where(row).split(" key ")[1] for row in bad] == ["002", "005"]
    with tarfile.open(tmp_path / "0.tar") as tar:
        header = tar.getmember("008.jpg").offset
    data = bytearray((tmp_path / "0.tar").read_bytes())
    data[header + 124] ^= 2  # in the size of member 008.jpg
    (tmp_path / "0.tar").write_bytes(data)
    source = opened("webdataset", tmp_path)
    assert source.size == 8 and source.lost[0].reason.startswith(f"a broken header at byte {header};")


# Anything


@pytest.mark.slow
# A row that is no UTF-8 and lacks a column is too much for pyarrow's handler of wrong rows; the table is then refused.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("layout", ["csv", "tfrecord", "webdataset", "folder", "parquet"])
def test_random_damage_never_hangs_crashes_or_loses_in_silence(layout, tmp_path):
    """Bytes flipped, cut out and put in anywhere: what comes is right, and what does not come is named."""
    made, rng = samples(10), np.random.default_rng(0)
    truth = {caption: image for image, caption in made}
    path = WRITERS[layout](tmp_path, made)
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    originals = {file: file.read_bytes() for file in files}
    refused = named = 0
    for _ in range(15):
        for file, data in originals.items():
            file.write_bytes(data)
        file = files[rng.integers(len(files))]
        data = bytearray(originals[file])
        at = int(rng.integers(len(data)))
        match rng.integers(3):
            case 0:
                data[at] ^= 1 << rng.integers(8)
            case 1:
                del data[at : at + int(rng.integers(1, 600))]
            case 2:
                data[at:at] = rng.bytes(int(rng.integers(1, 600)))
        file.write_bytes(data)
        try:
            source = opened(layout, path)
        except InputError:
            refused += 1
            continue
        good, bad = outcomes(source)
        if len(good) < len(made):  # a row that fails is named by the pipeline, and what has no row by the source
            assert bad or source.lost
            named += 1
        if layout == "tfrecord":  # it has checksums, so nothing wrong may come at all
            assert all(truth[caption] == image for image, caption in good.values())
    assert 0 < refused + named <= 15


@pytest.mark.slow
def test_data_that_vanishes_during_a_run_end_it_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_SPAN_BATCHES", 20)
    path = WRITERS["csv"](tmp_path, samples(40))
    options = dict(batch_size=4, image_side=8, context_length=8, crop_scale=(1.0, 1.0), seed=0)
    batches = pipeline.TrainBatches(opened("csv", path), TOKENIZER, **options)
    whole = pipeline.TrainBatches(opened("csv", path), TOKENIZER, **options)
    for _ in range(50):  # the stream continues across the ends of spans
        batch = next(batches)
    monkeypatch.setattr(pipeline, "_SPAN_BATCHES", 1000)
    whole = pipeline.TrainBatches(opened("csv", path), TOKENIZER, **options)
    for _ in range(50):
        expected = next(whole)
    assert np.array_equal(batch["image"], expected["image"]) and batches.position == whole.position == 200
    for image in (tmp_path / "pictures").iterdir():
        image.unlink()
    monkeypatch.setattr(pipeline, "_SPAN_BATCHES", 20)
    with pytest.raises(InputError, match="not one batch of good samples in 20 batches; .*no such file"):
        for _ in range(100):
            next(batches)
