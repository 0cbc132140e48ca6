"""Every source gives the same samples; shards by number, cached offsets, mixtures and the order of training."""

import bz2
import csv
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline import bad_samples, pipeline, sources
from input_pipeline.graph import require
from input_pipeline.sources import parquet_unpacked, paths
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import NO_IMAGE
from rankclip_jax.common.tokenizer import Tokenizer
from tests.support.source_files import (
    KEYS,
    LAYOUTS,
    WRITERS,
    example,
    open_as,
    read_all,
    samples,
    write_csv,
    write_parquet,
)

DATA = Path(os.environ.get("RANKCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def spec(layout, **options):
    return ConfigDict(KEYS | dict(format=layout) | options)


def opened(layout, path, **options):
    return sources.open_source(spec(layout, **options), path, image_side=8)


def test_records_of_one_caption_may_come_before_those_of_several(tmp_path):
    made = [(image, caption if i < 12 else [caption, "another"]) for i, (image, caption) in enumerate(samples(14))]
    with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as out:
        for image, caption in made:
            strings = [one.encode() for one in ([caption] if isinstance(caption, str) else caption)]
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=strings))
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))
            features = tf.train.Features(feature={"jpg": image, "txt": feature})
            out.write(tf.train.Example(features=features).SerializeToString())
    assert read_all(opened("tfrecord", str(tmp_path / "0.tfrecord"))) == made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_gives_the_same_images_captions_and_counts(layout, tmp_path):
    made = samples(31)
    source = open_as(layout, tmp_path, made)
    assert source.size == 31 and source.lost == ()
    several = layout.startswith("tfds")
    expected = [(i, [c, *(f"{c} again {k}" for k in range(several * n % 3))]) for n, (i, c) in enumerate(made)]
    assert read_all(source) == [(i, c if len(c) > 1 else c[0]) for i, c in expected]
    captions = [one for _, c in expected for one in c]
    assert list(source.captions()) == captions
    # In any order, by a row's number alone, also outside a graph, of either kind of integer.
    for row in (30, 0, 17):
        assert (
            source.read(tf.constant(row))["image"].numpy()
            == source.read(np.int64(row))["image"].numpy()
            == made[row][0]
        )
    assert len({source.where(row) for row in range(31)}) == 31


@pytest.mark.skipif(not (DATA / "wds").is_dir(), reason="the project's sample data are not here")
def test_the_shared_sample_is_the_same_through_every_source(tmp_path):
    rows = list(csv.DictReader(open(DATA / "cifar10" / "train.csv")))[:1000]
    by_record = read_all(opened("tfrecord", str(DATA / "tfrecord"), cache_dir=str(tmp_path)))
    assert [caption for _, caption in by_record] == [row["caption"] for row in rows]
    assert (
        read_all(opened("webdataset", str(DATA / "wds" / "{00000..00001}.tar"), cache_dir=str(tmp_path))) == by_record
    )
    for layout in ("csv", "folder", "parquet"):
        (tmp_path / layout).mkdir()
        assert read_all(open_as(layout, tmp_path / layout, by_record)) == by_record


@pytest.mark.skipif(not (DATA / "cifar10" / "broken").is_dir(), reason="the project's sample data are not here")
def test_the_broken_sample_is_read_on_and_names_its_four_rows(tmp_path, capsys):
    source = opened("csv", str(DATA / "cifar10" / "broken" / "sample.csv"))
    tokenizer = Tokenizer.train(source.captions(), 400)
    options = dict(batch_size=15, image_side=32, context_length=16, crop_scale=(1.0, 1.0), seed=0)
    batches = pipeline.TrainBatches(source, tokenizer, bad_path=tmp_path / "bad.jsonl", max_bad_fraction=0.1, **options)
    for _ in range(8):
        assert next(batches)["image"].shape[0] == 15
    pil = NO_IMAGE
    reasons = {9: "no such file", 22: "broken or truncated JPEG", 41: pil, 57: "empty caption"}
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {line["row"]: line["reason"] for line in lines} == reasons
    assert batches.bad.reasons == dict.fromkeys(reasons.values(), 1)
    assert batches.bad.summary().startswith("4 unusable samples skipped: 1 ")
    named = capsys.readouterr().err
    assert all(f"row {row}: " in named for row in (9, 22, 41, 57))
    recovering = pipeline.TrainBatches(source, tokenizer, recover_truncated=True, **options)
    for _ in range(8):
        next(recovering)
    assert "broken or truncated JPEG" not in recovering.bad.reasons and len(recovering.bad.reasons) == 3


def test_paths_by_brace_glob_folder_and_list(tmp_path):
    assert paths.braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert paths.braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    with pytest.raises(InputError, match=r"cannot read \{5..3\}. Expected a range"):
        paths.braces("{5..3}")
    names = [str(tmp_path / name) for name in ("0.tar", "1.tar", "[2].tar")]
    for name in names:
        Path(name).touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "2.tar").mkdir()
    expand = lambda pattern: paths.expand(pattern, endings=(".tar",))  # noqa: E731
    assert expand(str(tmp_path / "{0..1}.tar")) == names[:2]
    assert expand(str(tmp_path / "?.tar")) == names[:2]
    assert expand(str(tmp_path)) == names
    assert expand([names[1], str(tmp_path / "{0,1}.tar")]) == [names[1], *names[:2]]
    assert expand(names[2]) == [names[2]]  # a name of its own, not a set of characters
    with pytest.raises(InputError, match=r"no such file: .*3.tar$"):
        expand(str(tmp_path / "{0,3}.tar"))
    (tmp_path / "9.TAR").touch()
    assert expand(str(tmp_path)) == [*names[:2], str(tmp_path / "9.TAR"), names[2]]
    with pytest.raises(InputError, match="has no files that end in .parquet"):
        paths.expand(str(tmp_path), endings=(".parquet",))
    with pytest.raises(InputError, match="no path to the data is given; fetch it"):
        paths.expand(None, endings=(".tar",), hint="fetch it")
    with pytest.raises(InputError, match="nowhere:// is not supported"):
        expand("nowhere://bucket/{0..1}.tar")


def test_webdataset_keys_can_be_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for ending, data in (("left.png", b"left"), ("right.png", b"right"), ("en.txt", b"en"), ("de.txt", b"de")):
            (tmp_path / "x").write_bytes(data)
            tar.add(tmp_path / "x", f"k.{ending}")
    source = opened("webdataset", str(tmp_path), image_key=("none", "right.png"), caption_key="de.txt")
    assert read_all(source) == [(b"right", "de")]
    with pytest.raises(InputError, match=r"no sample has both an image \(.jpg or .* and a caption \(.txt or"):
        opened("webdataset", str(tmp_path))


def test_record_keys_can_be_named_and_are_found_among_several(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as out:
        out.write(example(png=b"a", caption="one"))
        out.write(example(webp=b"b", caption="two", txt=""))
        out.write(example(jpg=b"c", txt="three", caption="not this", tokens=[1, 2, 3]))
    assert read_all(opened("tfrecord", str(tmp_path))) == [(b"a", "one"), (b"b", "two"), (b"c", "three")]
    by_name = opened("tfrecord", str(tmp_path), image_key=("none", "webp", "png", "jpg"), caption_key="caption")
    assert read_all(by_name) == [(b"a", "one"), (b"b", "two"), (b"c", "not this")]
    path = str(tmp_path / "0.tfrecord")
    with pytest.raises(
        InputError, match="no feature picture; the features are: caption, png; set config.data.image_key"
    ):
        opened("tfrecord", path, image_key="picture")
    with pytest.raises(InputError, match="set config.data.caption_key"):
        opened("tfrecord", path, caption_key="title")


def test_wrong_files_are_refused_by_name(tmp_path):
    (tmp_path / "text.tfrecord").write_text("this is no TFRecord at all, only a text\n" * 10)
    with pytest.raises(InputError, match="text.tfrecord has no TFRecords"):
        opened("tfrecord", str(tmp_path / "text.tfrecord"))
    for name, layout, pack in (
        ("a.tfrecord", "tfrecord", gzip.compress),
        ("a.tar", "webdataset", gzip.compress),
        ("b.tar", "webdataset", bz2.compress),
        ("c.tar", "webdataset", lzma.compress),
    ):
        (tmp_path / name).write_bytes(pack(b"x" * 5000))
        with pytest.raises(InputError, match=f"{name} is compressed, .* decompress it first"):
            opened(layout, str(tmp_path / name))
    (tmp_path / "a.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match="a.parquet cannot be read as Parquet"):
        opened("parquet", str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"image": [1], "words": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="b.parquet: column image has type int64. Expected bytes, a path, or"):
        opened("parquet", str(tmp_path / "b.parquet"), caption_key="words")
    columns = "its columns are: image, words"
    with pytest.raises(InputError, match=f"b.parquet has no column text; {columns}; set config.data.image_key$"):
        opened("parquet", str(tmp_path / "b.parquet"), image_key="text")
    with pytest.raises(InputError, match=f"no column caption or txt or text; {columns}; set config.data.caption_key$"):
        opened("parquet", str(tmp_path / "b.parquet"), image_key="words")
    (tmp_path / "b.csv").write_text("Image,caption\na,b\n")
    with pytest.raises(InputError, match="no column 'image' or 'file_name'; .*; set config.data.image_key$"):
        opened("csv", str(tmp_path / "b.csv"))
    with pytest.raises(InputError, match="no column 'text'; .*; set config.data.caption_key$"):
        opened("csv", str(tmp_path / "b.csv"), image_key="Image", caption_key="text")
    twice = pa.Table.from_arrays([pa.array([b"x"]), *[pa.array(["x"])] * 4], ["image", "caption", "caption", "x", "x"])
    pq.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(InputError, match="c.parquet has 2 columns 'caption'; rename all but one"):
        opened("parquet", str(tmp_path / "c.parquet"))
    with pytest.raises(InputError, match="gone is not a folder"):
        opened("folder", str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no images \([^)]*\)$"):
        opened("folder", str(tmp_path / "empty"))
    (tmp_path / "empty/split=a").mkdir()
    (tmp_path / "empty/split=a/data_0.parquet").touch()
    with pytest.raises(InputError, match=r"no images .*; give its shards, '\S+/empty/\*/\*\.parquet'$"):
        opened("folder", str(tmp_path / "empty"))
    (tmp_path / "empty/mine.csv").touch()
    with pytest.raises(InputError, match=r"no images .*; give its table, \S+/empty/mine\.csv$"):
        opened("folder", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="a tfds path is NAME:SPLIT"):
        opened("tfds", "coco_captions")
    with pytest.raises(InputError, match="tfds 'coco_captions' is not prepared in .*tfds build coco_captions"):
        opened("tfds", "coco_captions:train", data_dir=str(tmp_path))
    with pytest.raises(InputError, match="tfds 'no_such_set' cannot be opened"):
        opened("tfds", "no_such_set:train", data_dir=str(tmp_path))
    with pytest.raises(InputError, match="unknown config.data.format=.*Expected csv, tfrecord"):
        opened("zip", "x")


def test_a_folder_whose_name_is_not_utf8_is_named(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "a.csv").write_text("image,caption\n0.png,a cat\n")
    with pytest.raises(InputError, match=r"caf\?/: its name is not UTF-8; rename it, or go to it by a link"):
        opened("csv", str(folder / "a.csv"))


def test_a_csv_counts_its_rows_as_they_stand_in_the_file(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbfimage,caption\n"  # a byte order mark, as Excel writes it
        b'0.png,"two\nlines and ""quotes"""\n'
        b"1.png\n"
        b"2.png,one,too many\n"
        b"\n"
        b"3.png,caf\xe9\n"  # not UTF-8
        b'4.png,a 6" pipe\n'
    )
    with pytest.raises(InputError, match=r'a.csv row 3: byte 0xe9 is not utf-8 \(in "caf\\xe9"\); set config.data.enc'):
        opened("csv", str(tmp_path / "a.csv"))
    for encoding in ("utf-8", "latin-1"):  # the byte order mark counts
        source = opened("csv", str(tmp_path / "a.csv"), encoding=encoding)
        assert list(source.captions()) == ['two\nlines and "quotes"', 'a 6" pipe']
        assert [source.where(row).split("a.csv ")[1].split(":")[0] for row in range(2)] == ["row 0", "row 4"]
        assert [(lost.where.split("a.csv ")[1], lost.reason) for lost in source.lost] == [
            ("row 1", "wrong number of fields: 1, and the header has 2"),
            ("row 2", "wrong number of fields: 3, and the header has 2; a text with ',' in it needs quotation marks"),
            ("row 3", "byte 0xe9 is not utf-8"),
        ]
    (tmp_path / "b.csv").write_text('image,caption\n0.png,good\n1.png,"never closed\n2.png,also good\n')
    source = opened("csv", str(tmp_path / "b.csv"))
    assert list(source.captions()) == ["good", "also good"]
    assert [(lost.where.split("b.csv ")[1], lost.reason) for lost in source.lost] == [
        ("row 1", "a quotation mark that is not closed at the end of its field")
    ]


def test_several_tables_keep_their_folders(tmp_path):
    made = samples(4)
    for name, part in (("x", made[:2]), ("y", made[2:])):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name, part)
    absolute = tmp_path / "z.csv"
    absolute.write_text(f"image,caption\n{tmp_path}/x/pictures/0.img,absolute\n")
    source = opened("csv", [str(tmp_path / "{x,y}" / "data.csv"), str(absolute)])
    assert read_all(source) == [*made, (made[0][0], "absolute")]
    assert "y/data.csv row 1: " in source.where(3) and source.where(4).endswith("x/pictures/0.img")


def test_a_folder_names_captions_without_image_and_goes_in_no_circles(tmp_path):
    made = samples(3)
    root = Path(WRITERS["folder"](tmp_path, made))
    (root / "alone.txt").write_text("no image")
    (root / "other.txt").write_text("an image that is not read")
    (root / "other.avif").touch()
    (root / "0000" / "up").symlink_to(root, target_is_directory=True)
    source = opened("folder", str(root))
    assert read_all(source) == made
    assert [(lost.where, lost.reason) for lost in source.lost] == [
        (f"{root}/alone.txt", "a caption without an image"),
        (f"{root}/other.txt", "other.avif beside it is of a format that is not read"),
    ]


def test_parquet_is_unpacked_once_and_needs_room(tmp_path, monkeypatch):
    made = samples(10)
    path = write_parquet(tmp_path, made)
    opened("parquet", path)
    tars = {tar: tar.stat().st_mtime_ns for tar in (tmp_path / ".rankclip_index").glob("*.tar")}
    assert len(tars) == 2
    assert read_all(opened("parquet", path)) == made
    assert {tar: tar.stat().st_mtime_ns for tar in (tmp_path / ".rankclip_index").glob("*.tar")} == tars
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("", (), dict(free=10)))
    with pytest.raises(InputError, match=r"GB, but .*mine has 0.0 GB free; set config.data.cache_dir"):
        opened("parquet", path, cache_dir=str(tmp_path / "mine"))


@pytest.mark.parametrize("finished", [True, False])
def test_parquet_that_another_process_unpacks_is_left_to_it(finished, tmp_path, monkeypatch):
    made, unpack, done = samples(10), parquet_unpacked._unpack, []
    path, kept = write_parquet(tmp_path, made), tmp_path / ".rankclip_index"
    opened("parquet", path)
    tars = sorted(kept.glob("*.tar"), key=lambda tar: made[0][0] not in tar.read_bytes())  # of 0.parquet, of 1.parquet
    whole = tars[0].read_bytes()
    for tar in tars:
        tar.unlink()
    script = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'ab') as locks:\n"
        "    fcntl.lockf(locks, fcntl.LOCK_EX, 1, int(sys.argv[2], 16))\n"
        "    print('held', flush=True)\n"
        "    input()"
    )
    command, pipe = [sys.executable, "-c", script, kept / ".unpacking", tars[0].name[:8]], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"held\n"

        def noted(file, *rest):
            done.append(Path(file).name)
            unpack(file, *rest)
            if len(done) == 1:  # the other comes to its end, or is killed before
                if finished:
                    tars[0].write_bytes(whole)
                other.kill()

        monkeypatch.setattr(parquet_unpacked, "_unpack", noted)
        assert read_all(opened("parquet", path)) == made
    assert done == (["1.parquet"] if finished else ["1.parquet", "0.parquet"])


def test_what_a_kill_left_of_unpacked_parquet_is_removed(tmp_path):
    path, kept = write_parquet(tmp_path, samples(10)), tmp_path / ".rankclip_index"
    opened("parquet", path)
    tar = next(kept.glob("*.tar")).name
    names = [f".{tar}.{16 * '0'}.part", f".{tar}.{16 * '1'}.part", f".{20 * '0'}.tar.{16 * '0'}.part", f".{tar}.part"]
    for name in names:
        (kept / name).write_bytes(b"half of it")
        os.utime(kept / name, ns=(0, 0))
    os.utime(kept / names[1])  # somebody may be at it
    opened("parquet", path)
    assert [(kept / name).exists() for name in names] == [False, True, True, True] and (kept / tar).exists()


def test_a_reason_is_the_same_in_a_graph_and_alone():
    def read(row):
        require(row < 0, "no [usual] image")
        return row

    for called in (read, tf.function(read)):
        with pytest.raises(tf.errors.OpError) as error:
            called(tf.constant(1))
        assert bad_samples.in_words(error.value) == "no [usual] image"
