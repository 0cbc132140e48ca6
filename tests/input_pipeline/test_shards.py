"""Shards by number: cached offsets, checksums, tars of every dialect, and memory."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from input_pipeline.bad_samples import reason_of_failure
from input_pipeline.sources import index_places, offset_index, paths, tfrecord
from rankclip_jax.common import storage
from rankclip_jax.common.tokenizer import Tokenizer
from tests.input_pipeline.test_mixtures import stream
from tests.input_pipeline.test_sources import opened
from tests.input_pipeline.test_stored_tokens import batches_of
from tests.support.source_files import (
    WRITERS,
    example,
    read_all,
    samples,
    write_tfrecord,
)


def test_offsets_are_kept_and_only_changed_shards_gone_through_again(tmp_path, monkeypatch):
    made = samples(20)
    path = write_tfrecord(tmp_path, made)
    gone_through = []
    scan = tfrecord._scan
    monkeypatch.setattr(tfrecord, "_scan", lambda data, size, path: gone_through.append(path) or scan(data, size, path))
    shards = [str(tmp_path / f"{i:05}.tfrecord") for i in (0, 1)]
    assert opened("tfrecord", path).size == 20 and sorted(gone_through) == shards
    gone_through.clear()
    assert read_all(opened("tfrecord", path)) == made and gone_through == []
    # A longer shard, and one of the same size that was written again.
    with tf.io.TFRecordWriter(shards[1]) as out:
        for image, caption in made[:13]:
            out.write(example(jpg=image, txt=caption))
    assert read_all(opened("tfrecord", path)) == made[:10] + made[:13] and gone_through == [shards[1]]
    gone_through.clear()
    os.utime(shards[0], ns=(0, 0))
    assert opened("tfrecord", path).size == 23 and gone_through == [shards[0]]
    # A stored index that was cut off is none.
    for kept in (tmp_path / ".rankclip_index").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    assert read_all(opened("tfrecord", path)) == made[:10] + made[:13]


@pytest.mark.parametrize("layout", ["tfrecord", "webdataset"])
def test_a_wildcard_matches_neither_the_index_nor_a_folder(layout, tmp_path):
    made = samples(6)
    WRITERS[layout](tmp_path, made)
    (tmp_path / "folder").mkdir()
    (tmp_path / "._00000.tar").write_bytes(b"left by macOS")
    for _ in range(2):  # the first leaves .rankclip_index
        assert read_all(opened(layout, str(tmp_path / "*"))) == made
    assert (tmp_path / ".rankclip_index").is_dir()


def test_zeros_at_the_end_of_a_shard_are_not_scanned_as_records(tmp_path, monkeypatch):
    shard, checked = tmp_path / "0.tfrecord", []
    with tf.io.TFRecordWriter(str(shard)) as out:
        for _ in range(4):
            out.write(example(jpg=b"x", txt="y"))
    size = shard.stat().st_size
    with shard.open("r+b") as out:  # as a machine that fell leaves a file
        out.truncate(100_000_000)
    sums = tfrecord._masked_crc32c
    monkeypatch.setattr(tfrecord, "_masked_crc32c", lambda found: checked.append(len(found)) or sums(found))
    source = opened("tfrecord", str(shard))
    assert source.size == 4 and f"is wrong at byte {size}" in source.lost[0].reason and checked == [5]


def test_a_wrong_length_that_ends_behind_the_shard_is_no_truncation(tmp_path):
    shard = tmp_path / "0.tfrecord"
    with tf.io.TFRecordWriter(str(shard)) as out:
        for _ in range(40):
            out.write(example(jpg=b"x", txt="y"))
    data = bytearray(shard.read_bytes())
    second = len(data) // 40
    data[second + 6] ^= 0x40
    shard.write_bytes(data)
    (lost,) = opened("tfrecord", str(shard)).lost
    assert f"the checksum of a record's length is wrong at byte {second}" in lost.reason and lost.samples == 39


def test_checksums_are_tensorflows(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "a")) as out:
        for length in (0, 1, 1000, 70_000):
            out.write(b"x" * length)
    data, at = (tmp_path / "a").read_bytes(), 0
    for length in (0, 1, 1000, 70_000):
        head = np.frombuffer(data[at : at + 12], np.uint8)
        assert tfrecord._masked_crc32c(head[None, :8])[0] == head[8:].view("<u4")[0]
        at += 16 + length


def test_tars_of_every_dialect(tmp_path):
    """Long names in pax and GNU form, folders, links, hidden files, capital endings, and joined tars."""
    image, caption = samples(1)[0]
    long_key = "a/" * 60 + "k" * 120
    for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "one.tar", "w", format=dialect) as tar:
            (tmp_path / "x.jpg").write_bytes(image)
            (tmp_path / "x.txt").write_text(caption)
            tar.add(tmp_path / "x.txt", "._hidden.txt")
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo("folder/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "x.jpg"
            tar.addfile(link)
            for key in ("folder/x", long_key, "\u00e9t\u00e9"):
                tar.add(tmp_path / "x.jpg", f"{key}.JPG")
                tar.add(tmp_path / "x.txt", f"{key}.txt")
        joined = (tmp_path / "one.tar").read_bytes() * 2  # with an end mark in the middle
        (tmp_path / f"joined{dialect}.tar").write_bytes(joined)
        source = opened("webdataset", str(tmp_path / f"joined{dialect}.tar"))
        keys = ["folder/link", "folder/x", long_key, "\u00e9t\u00e9"]
        assert [source.where(row).split(" key ")[1] for row in range(source.size)] == keys * 2 and source.lost == ()
        assert reason_of_failure(source.read, 0) == reason_of_failure(source.read, 4) == LINKED
        good = [next(iter(tf.data.Dataset.from_tensors(row).map(source.read))) for row in (1, 2, 3, 5, 6, 7)]
        assert [(one["image"].numpy(), one["caption"].numpy().decode()) for one in good] == [(image, caption)] * 6


def test_the_place_of_a_row_is_named_without_reading_its_tar(tmp_path, monkeypatch):
    keys = ["plain", "n" * 140, "sparse"]
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key, ending in ((key, ending) for key in keys for ending in ("jpg", "txt")):
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size = 100_000
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    data = bytearray((tmp_path / "0.tar").read_bytes())
    at = data.index(b"sparse.jpg")
    data[at + 156 : at + 157], data[at + 482] = b"S", 1  # a further header follows
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512]))
    data[at + 512 : at + 512] = bytes(512)
    (tmp_path / "0.tar").write_bytes(data)
    source, read, asked = opened("webdataset", str(tmp_path)), storage.read, []
    monkeypatch.setattr(storage, "read", lambda path, begin, end: asked.append(end - begin) or read(path, begin, end))
    assert [source.where(row) for row in range(3)] == [f"{tmp_path}/0.tar key {key}" for key in keys]
    assert len(asked) == 6 and max(asked) <= 8192
    with open(tmp_path / "0.tar", "r+b") as shard:
        shard.truncate(1000)
    assert source.where(1) == f"{tmp_path}/0.tar key unknown: the tar has changed"


LINKED = "the image is a link in the tar, or sparse; write it with tar -h --hard-dereference"


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
@pytest.mark.parametrize("linked", ["both", "txt"])
def test_what_a_tar_links_is_a_bad_row_and_never_vanishes(linked, shuffle, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, (image, caption) in enumerate(made := samples(6)):
        for ending, data in (("jpg", image), ("txt", caption.encode())):
            if i < 3 or (linked == "txt" and ending == "jpg"):
                (folder / f"{i}.{ending}").write_bytes(data)
            elif i < 5:  # as what finds duplicates leaves it
                os.link(folder / f"{i - 3}.{ending}", folder / f"{i}.{ending}")
            else:
                (folder / f"{i}.{ending}").symlink_to(f"2.{ending}")
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in sorted(os.listdir(folder)):
            tar.add(folder / name, name)
    source = opened("webdataset", str(tmp_path / "0.tar"), shuffle=shuffle, window_mb=64, block_rows=4)
    assert source.size == 6 and source.lost == ()
    what = LINKED if linked == "both" else LINKED.replace("image", "caption")
    assert [reason_of_failure(source.read, row) for row in range(6)] == [None] * 3 + [what] * 3
    assert source.where(5).endswith(" key 5") and made


def test_a_sparse_member_is_a_bad_row(tmp_path):
    """GNU's old form: sixteen pieces and more, so that a second header follows."""
    with (tmp_path / "0.tar").open("wb") as out:
        for key, kind in ("a", b"0"), ("b", b"S"), ("c", b"0"):
            for ending, data in (("jpg", samples(1)[0][0]), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
                head[156:157], head[482] = kind, kind == b"S"
                head[148:156] = b" " * 8
                head[148:156] = b"%06o\0 " % sum(head)
                out.write(bytes(head) + bytes(512) * (kind == b"S") + data + bytes(-len(data) % 512))
        out.write(bytes(1024))
    source = opened("webdataset", str(tmp_path / "0.tar"))
    assert [reason_of_failure(source.read, row) for row in range(3)] == [None, LINKED, None]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_tar_takes_no_memory(tmp_path):
    made = samples(2)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, (image, caption) in enumerate(made):
            for ending, data in (("jpg", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            hole = tarfile.TarInfo(f"hole{i}.bin")
            hole.size = 1 << 31  # a file with a hole has the length and not the bytes
            tar.offset += tar.fileobj.write(hole.tobuf()) + hole.size
            tar.fileobj.seek(tar.offset)

    def in_memory():
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) << 10

    before = in_memory()
    source = opened("webdataset", str(tmp_path))
    assert read_all(source) == made and (tmp_path / "0.tar").stat().st_size > 1 << 32
    assert in_memory() - before < 1 << 29


@pytest.mark.slow
def test_ten_million_records_are_opened_and_resumed_in_little_memory(tmp_path):
    """An index as large as a real one, over one real shard that all its rows point into."""
    made = samples(100)
    path = write_tfrecord(tmp_path, made)
    shard = str(tmp_path / "00000.tfrecord")
    index = offset_index.offset_index(tfrecord.kind(), [shard])
    records = np.tile(index.of_shard(0), (200_000, 1))
    shutil.rmtree(tmp_path / ".rankclip_index")
    place = index_places.Place(str(tmp_path / ".rankclip_index"), str(tmp_path))
    writer = index_places.Writer(tfrecord.kind(), [place])
    writer.add(shard, paths.stamps([shard])[0], records, ())
    writer.flush()
    source = opened("tfrecord", shard)
    assert source.size == 10_000_000 and records.nbytes == 16 * source.size
    tokenizer = Tokenizer.train([caption for _, caption in made], 400)
    far = 2 * source.size + 123_457
    whole = batches_of(source, tokenizer, start=far)
    came = [next(whole)["tokens"] for _ in range(3)]
    resumed = batches_of(source, tokenizer, start=far + 8)
    assert np.array_equal(next(resumed)["tokens"], came[2]) and whole.position == far + 12
    # Rows of an epoch are a permutation: as many different ones in any part of it as the part is long.
    assert len(set(stream(source, 20_000, start=far).tolist())) == 20_000
    captions = {caption for _, caption in made[:50]}
    assert {row for _, row in zip(range(100), source.captions(), strict=False)} <= captions
    assert path
